"""`openclip-otco results`: a page of results whose tables, figures and numbers come from kept runs.

The page is a Jinja template. It names studies, and what it says of them is computed from their results each time, so
that the text and the runs cannot part.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openclip_otco.errors import UserError
from openclip_otco.files import write_text
from openclip_otco.study import results, table
from openclip_otco.study.reliability import reliability_picture
from openclip_otco.study.results import Result
from openclip_otco.study.spread import Spread
from openclip_otco.study.study import Study, arguments, load

TEMPLATE = "page.md.jinja"
_NOTE = "<!-- Made by `openclip-otco results` from {template}: edit that, and run it again. -->\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `results` to `parser`."""
    parser.add_argument(
        "folder",
        type=Path,
        metavar="DIR",
        help="holds the template, and NAME.jsonl for each list that it names",
    )
    parser.add_argument(
        "--template", default=TEMPLATE, metavar="NAME", help="file of DIR, a page in Jinja's language (%(default)s)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (default: DIR.md)")
    parser.add_argument("--figures", action="store_true", help="draw the pictures anew as well")


def run(args: argparse.Namespace) -> int:
    """`openclip-otco results`: writes the page; 2 where it cannot be made."""
    try:
        out = args.out or args.folder.with_suffix(".md")
        write_text(out, page(args.folder, args.figures, args.template))
    except (UserError, OSError) as error:
        print(f"openclip-otco results: {error}", file=sys.stderr)
        return 2
    return 0


def page(folder: Path, figures: bool = False, template: str = TEMPLATE) -> str:
    """The page that `folder` holds the template and the results for.

    A template has `study(NAME)`, the `StudyResults` of a study, and `lines(NAME)`, the `Lines` of any other list. The
    others give the path of a picture: `reliability(LINES)`, see `reliability_picture`; `noise(STUDY, ORACLE)`,
    `waterfall(STUDY, ABLATIONS, SETTINGS)` and `cost(STUDY, SETTING)`, see `page_figures`.

    Args:
        figures: also draw the pictures that it shows, into the folder.
        template: its file in `folder`.

    Raises:
        UserError: no template, a mistake in it, or a study or run that is not there.
    """
    import jinja2

    path = folder / template
    if not path.is_file():
        raise UserError(f"{path} is missing; a page of results is a Jinja template")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    known: dict[str, StudyResults] = {}

    def study(name: str) -> StudyResults:
        if name not in known:
            known[name] = StudyResults.read(folder, name, figures)
        return known[name]

    try:
        text = environment.from_string(path.read_text(encoding="utf-8")).render(
            study=study,
            lines=lambda name: Lines.read(folder / f"{name}.jsonl"),
            reliability=lambda found: reliability_picture(found.path, found.all, figures),
            **_pictures(folder, figures),
        )
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", None)
        raise UserError(f"{path}{f', line {line}' if line else ''}: {error}") from error
    return _NOTE.format(template=f"{folder.name}/{template}") + text


def _pictures(folder: Path, draw: bool) -> dict[str, Callable[..., str]]:
    """What a template calls for the pictures of several studies: each is `STUDY-KIND.png`, after its first study."""

    def template_function(kind: str) -> Callable[..., str]:
        def path_of_picture(first: StudyResults, *others: Any) -> str:
            # Not at the top: they load matplotlib, which a page without --figures does without.
            from openclip_otco.study import page_figures, style

            make = getattr(page_figures, f"{kind}_figure")
            return style.picture(folder / f"{first.study.name}-{kind}.png", draw, lambda: make(first, *others))

        return path_of_picture

    return {kind: template_function(kind) for kind in ("noise", "waterfall", "cost")}


@dataclass(frozen=True)
class Lines:
    """A list of measurements, one JSON object a line, as a script of `benchmarks/` wrote it.

    Attributes:
        path: of the list.
        all: the objects, in their order.
    """

    path: Path
    all: list[dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Lines:
        """The list at `path`.

        Raises:
            UserError: the file is missing, or a line is no JSON object.
        """
        try:
            found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from error
        if not all(isinstance(each, dict) for each in found):
            raise UserError(f"{path}: has a line that is no JSON object")
        return cls(path, found)

    def where(self, **values: Any) -> Lines:
        """Those that have these values."""
        missing = object()
        found = [each for each in self.all if all(each.get(name, missing) == value for name, value in values.items())]
        return Lines(self.path, found)

    def of(self, name: str) -> list[Any]:
        """The values that they have under `name`.

        Raises:
            UserError: there is none.
        """
        found = [each[name] for each in self.all if name in each]
        if not found:
            raise UserError(f"{self.path}: none of the lines asked for has {name}")
        return found

    def one(self, name: str) -> Any:
        """The only value under `name`.

        Raises:
            UserError: there is none, or more than one.
        """
        found = self.of(name)
        if len(found) > 1:
            raise UserError(f"{self.path}: {len(found)} of the lines asked for have {name}, and not one")
        return found[0]

    def spread(self, name: str) -> Spread:
        """Mean and interval of the values under `name`."""
        return Spread.of([float(value) for value in self.of(name)])

    def ahead(self, other: Lines, name: str, by: str = "seed") -> Spread:
        """The difference to `other`, paired by what they have under `by`."""
        bases = {each[by]: each[name] for each in other.all if name in each}
        found = [each[name] - bases[each[by]] for each in self.all if name in each and each[by] in bases]
        if not found:
            raise UserError(f"{self.path}: no two of the lines asked for have one {by}, and {name}")
        return Spread.of(found)


@dataclass(frozen=True)
class StudyResults:
    """What a template asks of a study. An rsum is that of all captions where all runs have it, else of the last epoch.

    `data` and `loss` are the study's names; the baseline is its first loss, clean data its setting without mismatch.
    """

    study: Study
    kept: list[Result]
    folder: Path
    figures: bool = False

    @classmethod
    def read(cls, folder: Path, name: str, figures: bool = False) -> StudyResults:
        """The study of that name, and its runs in `folder/NAME.jsonl`."""
        return cls(load(name), results.read(folder / f"{name}.jsonl"), folder, figures)

    @property
    def missing(self) -> int:
        """Runs of the study that are not there."""
        return len(self.study.data) * len(self.study.losses) * len(self.study.seeds) - len(self.kept)

    @property
    def outdated(self) -> int:
        """Kept runs whose flags are not those that the study has now, its data apart."""
        flags = {loss.name: {**self.study.flags, **loss.selection, **loss.flags} for loss in self.study.losses}
        wanted = {name: _by_flag(arguments(each)) for name, each in flags.items()}
        return sum(not wanted.get(run.loss, {}).items() <= _by_flag(run.flags).items() for run in self.kept)

    def table(self) -> str:
        """Recalls and their sums."""
        return table.recall_table(self.study, self.kept, speed=False)

    def against(self) -> str:
        """Each loss against the baseline."""
        return table.against_baseline(self.study, self.kept)

    def rsum(self, data: str, loss: str) -> Spread:
        """After the last epoch."""
        return Spread.of([self._rsum(run) for run in self._runs(data, loss)])

    def best(self, data: str, loss: str) -> Spread:
        """The rsum of the best epoch, by OpenCLIP's validation."""
        return Spread.of([run.rsum_best for run in self._runs(data, loss)])

    def by_seed(self, data: str, loss: str) -> dict[int, float]:
        """The rsum of each run."""
        return {run.seed: self._rsum(run) for run in self._runs(data, loss)}

    def seconds(self, data: str, loss: str) -> Spread:
        """Of an optimizer step.

        Raises:
            UserError: a run has no speed.
        """
        return Spread.of([self._seconds_per_step(run) for run in self._runs(data, loss)])

    def step_ratio(self, data: str, loss: str) -> Spread:
        """Seconds of an optimizer step, times those of the baseline, paired by seed.

        Raises:
            UserError: a run has no speed.
        """
        pairs = self._pairs(data, loss, self._seconds_per_step)
        return Spread.of([own / base for own, base in pairs])

    def seeds(self, data: str, loss: str) -> int:
        """How many runs there are."""
        return len(self._runs(data, loss))

    def ratio(self, data: str, loss: str) -> float:
        """Mean rsum by the baseline's on the same data, over the seeds that both have."""
        pairs = self._pairs(data, loss, self._rsum)
        return sum(own for own, _ in pairs) / sum(base for _, base in pairs)

    def difference(self, data: str, loss: str, base: str | None = None) -> Spread:
        """Of rsum to the baseline, or to the loss `base`, paired by seed."""
        return Spread.of([own - base for own, base in self._pairs(data, loss, self._rsum, base)])

    def best_difference(self, data: str, loss: str) -> Spread:
        """Of the best epoch's rsum to that of the baseline's best epoch, paired by seed."""
        return Spread.of([own - base for own, base in self._pairs(data, loss, lambda run: run.rsum_best)])

    def of_clean(self, data: str, loss: str) -> float:
        """Mean rsum in percent of the baseline's on clean data."""
        clean = table.clean_setting(self.study)
        if clean is None:
            raise UserError(f"{self.study.name}: no setting without mismatch beside others")
        return 100 * self.rsum(data, loss).mean / self.rsum(clean.name, self.study.losses[0].name).mean

    def figure(self, kind: str) -> str:
        """The path, from the page, of the picture `rsum`, `recalls`, `noise` or `cost`."""
        path = self.folder / f"{self.study.name}-{kind}.png"
        if self.figures:
            from openclip_otco.study.figure import draw

            with tempfile.TemporaryDirectory() as drawn:
                draw(self.study, self.kept, Path(drawn))
                if (made := Path(drawn, f"{kind}.png")).is_file():
                    shutil.copyfile(made, path)
        if not path.is_file():
            raise UserError(f"{path} is missing; give --figures, or show another picture")
        return f"{self.folder.name}/{path.name}"

    def _rsum(self, run: Result) -> float:
        return sum(table.final_recalls(self.kept)(run))

    def _seconds_per_step(self, run: Result) -> float:
        if run.seconds_per_step is None:
            raise UserError(f"{self.folder / self.study.name}.jsonl: {run.run} has no seconds_per_step")
        return run.seconds_per_step

    def _runs(self, data: str, loss: str) -> list[Result]:
        found = table.cell(self.kept, data, loss)
        if not found:
            raise UserError(f"{self.folder / self.study.name}.jsonl has no run of {loss} on {data}")
        return found

    def _pairs(
        self, data: str, loss: str, of: Callable[[Result], float], base: str | None = None
    ) -> list[tuple[float, float]]:
        bases: dict[int, Any] = {run.seed: run for run in self._runs(data, base or self.study.losses[0].name)}
        pairs = [(of(run), of(bases[run.seed])) for run in self._runs(data, loss) if run.seed in bases]
        if not pairs:
            raise UserError(f"{self.folder / self.study.name}.jsonl: no seed of {loss} on {data} has its baseline")
        return pairs


def _by_flag(words: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The values of each flag of a command line."""
    found: dict[str, list[str]] = {}
    flag = ""
    for word in words:
        if word.startswith("--"):
            flag = word
            found[flag] = []
        else:
            found.setdefault(flag, []).append(word)
    return {flag: tuple(values) for flag, values in found.items()}
