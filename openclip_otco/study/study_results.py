"""A study and its results, as a page of results quotes them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from openclip_otco.errors import UserError
from openclip_otco.study import results, shards, table
from openclip_otco.study.results import Result
from openclip_otco.study.run import run_names, runs
from openclip_otco.study.spread import Spread
from openclip_otco.study.study import Study
from openclip_otco.study.study_file import load


@dataclass(frozen=True)
class StudyResults:
    """What a template asks of a study.

    `rsum` is the one of all captions where all runs have it, else the one of the last epoch's validation. `data` and
    `loss` are names in the study. The baseline is its first loss, and clean data are its setting without mismatch.
    Each method raises a `UserError` where there are no runs to answer from.

    Args:
        study: the study.
        kept: its results.
        folder: of the page; its pictures lie there.
        figures: whether to draw the pictures anew.
    """

    study: Study
    kept: list[Result]
    folder: Path
    figures: bool = False

    @classmethod
    def read(cls, folder: Path, name: str, figures: bool = False) -> StudyResults:
        """The study of that name, and its runs in `folder/NAME.jsonl`."""
        study = load(name)
        return cls(study, results.read_named(folder / f"{name}.jsonl", run_names(study)), folder, figures)

    @property
    def missing(self) -> int:
        """Number of the study's runs that are not kept."""
        return len(run_names(self.study) - {run.run for run in self.kept})

    @property
    def outdated(self) -> int:
        """Number of kept runs whose flags are not those of the present study; flags of the data are not compared."""
        now = {run.name: _without_data(run.flags) for run in runs(self.study, Path(shards.OUT))}
        return sum(_without_data(run.flags) != now[run.run] for run in self.kept)

    def table(self) -> str:
        """The table of recalls and their sums."""
        return table.recall_table(self.study, self.kept, speed=False)

    def against(self) -> str:
        """The table of each loss against the baseline."""
        return table.against_baseline(self.study, self.kept)

    def rsum(self, data: str, loss: str) -> Spread:
        """The rsum after the last epoch."""
        return Spread.of([self._rsum(run) for run in self._runs(data, loss)])

    def best(self, data: str, loss: str) -> Spread:
        """The rsum of the best epoch, by OpenCLIP's validation."""
        return Spread.of([run.rsum_best for run in self._runs(data, loss)])

    def by_seed(self, data: str, loss: str) -> dict[int, float]:
        """The rsum of each run after the last epoch, by seed."""
        return {run.seed: self._rsum(run) for run in self._runs(data, loss)}

    def seconds(self, data: str, loss: str) -> Spread:
        """Seconds of an optimizer step.

        Raises:
            UserError: a run has no speed.
        """
        return Spread.of([self._seconds_per_step(run) for run in self._runs(data, loss)])

    def step_ratio(self, data: str, loss: str) -> Spread:
        """Seconds of an optimizer step divided by those of the baseline, paired by seed.

        Raises:
            UserError: a run has no speed.
        """
        pairs = self._pairs(data, loss, self._seconds_per_step)
        return Spread.of([own / base for own, base in pairs])

    def seeds(self, data: str, loss: str) -> int:
        """Number of runs of `loss` on `data`."""
        return len(self._runs(data, loss))

    def ratio(self, data: str, loss: str) -> Spread:
        """Mean rsum divided by that of the baseline on the same data, paired by seed."""
        return Spread.of_ratio(self._pairs(data, loss, self._rsum))

    def difference(self, data: str, loss: str, base: str | None = None) -> Spread:
        """Difference of rsum to the baseline, or to the loss `base`, paired by seed."""
        return Spread.of([own - base for own, base in self._pairs(data, loss, self._rsum, base)])

    def best_difference(self, data: str, loss: str) -> Spread:
        """Difference of the best epoch's rsum to that of the baseline's best epoch, paired by seed."""
        return Spread.of([own - base for own, base in self._pairs(data, loss, lambda run: run.rsum_best)])

    def difference_after(self, epoch: int, data: str, loss: str) -> Spread:
        """Difference to the baseline of the rsum after `epoch`, by OpenCLIP's validation, paired by seed.

        Raises:
            UserError: a run has no validation after that epoch.
        """

        def after(run: Result) -> float:
            curve = dict(zip(*run.curve(), strict=True))
            if epoch not in curve:
                raise UserError(
                    f"{self.folder / self.study.name}.jsonl: {run.run} has no validation after epoch {epoch}"
                )
            return curve[epoch]

        return Spread.of([own - base for own, base in self._pairs(data, loss, after)])

    def of_clean(self, data: str, loss: str) -> Spread:
        """Mean rsum divided by that of the baseline on clean data, paired by seed."""
        clean = table.clean_setting(self.study)
        if clean is None:
            raise UserError(f"{self.study.name}: has no setting without mismatch to compare others with")
        return Spread.of_ratio(self._pairs(data, loss, self._rsum, base_data=clean.name))

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
        self,
        data: str,
        loss: str,
        value: Callable[[Result], float],
        base: str | None = None,
        base_data: str | None = None,
    ) -> list[tuple[float, float]]:
        """The values of `loss` on `data` and of `base` on `base_data`, for each seed that both have.

        Without `base` it is the baseline, without `base_data` the same data.
        """
        bases = {run.seed: run for run in self._runs(base_data or data, base or self.study.losses[0].name)}
        pairs = [(value(run), value(bases[run.seed])) for run in self._runs(data, loss) if run.seed in bases]
        if not pairs:
            raise UserError(f"{self.folder / self.study.name}.jsonl: no seed of {loss} on {data} has its baseline")
        return pairs


def _without_data(words: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The values of each flag of a command line, but for the shards: their names are known only where they lie."""
    found: dict[str, list[str]] = {}
    flag = ""
    for word in words:
        if word.startswith("--"):
            flag = word
            found[flag] = []
        else:
            found.setdefault(flag, []).append(word)
    return {flag: tuple(values) for flag, values in found.items() if flag not in ("--train-data", "--val-data")}
