"""Results of finished runs, and the file that holds a line for each."""

import json
import platform
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from openclip_otco.errors import UserError
from openclip_otco.files import write_text
from openclip_otco.runs.train_log import rsum
from openclip_otco.study.study import Flags
from openclip_otco.version import __version__


@dataclass(frozen=True)
class Result:
    """A finished run: its settings and its metrics."""

    run: str
    data: str
    loss: str
    seed: int
    flags: list[str]
    scenes: Flags | None
    epochs: list[dict[str, float]]  # OpenCLIP's validation metrics, recalls in 0 to 1
    rsum_last: float  # 0 to 600
    rsum_best: float
    epoch_last: int  # counted from 1
    epoch_best: int
    seconds_per_step: float | None
    seconds: float  # of the run, with its start and its validation
    device: str | None
    versions: dict[str, str]
    # Of `openclip-otco evaluate` after the last epoch, where the validation images have several captions each.
    retrieval: dict[str, float] | None = None

    @property
    def last(self) -> dict[str, float]:
        """OpenCLIP's validation metrics after the last epoch."""
        return next(metrics for metrics in self.epochs if metrics["epoch"] == self.epoch_last)

    def curve(self) -> tuple[list[int], list[float]]:
        """Epochs, and the validation rsum after each."""
        return [int(metrics["epoch"]) for metrics in self.epochs], [rsum(metrics) for metrics in self.epochs]


def have_standard_retrieval(results: Sequence[Result]) -> bool:
    """Whether all of `results` have standard retrieval, of several captions an image.

    If one of them has not, no results are compared by it.
    """
    return bool(results) and all(result.retrieval for result in results)


def versions() -> dict[str, str]:
    """Versions of the packages that a run's numbers depend on."""
    found = {"openclip-otco": __version__, "Python": platform.python_version()}
    for package in ("open_clip_torch", "torch", "timm", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def line(result: Result) -> str:
    """`result` as a line of JSON, without the line's end."""
    return json.dumps(asdict(result))


def parse(text: str) -> Result:
    """The result of a line that the function `line` has made.

    Raises:
        ValueError: the text is no such line.
    """
    try:
        return Result(**json.loads(text))
    except TypeError as error:
        raise ValueError(str(error)) from error


def write(path: Path, results: Iterable[Result]) -> None:
    """Write a line of JSON per result."""
    write_text(path, "".join(f"{line(result)}\n" for result in results))


def read(path: Path) -> list[Result]:
    """The results in `path`, empty if there is no such file.

    Raises:
        UserError: the file cannot be read, or a line is no result.
    """
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    results = []
    for number, text in enumerate(lines, 1):
        try:
            results.append(parse(text))
        except ValueError as error:
            raise UserError(f"{path}: line {number} is no result: {error}") from error
    return results


def read_named(path: Path, names: Collection[str]) -> list[Result]:
    """The results in `path` of the runs with these names, each once: equal lines are one result.

    Raises:
        UserError: as `read`, or two different lines are of one run.
    """
    found: dict[str, Result] = {}
    for result in read(path):
        if result.run in names and found.setdefault(result.run, result) != result:
            raise UserError(f"{path}: has two different lines of {result.run}; remove one")
    return list(found.values())
