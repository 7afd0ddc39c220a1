"""A run of OpenCLIP's training script and its evaluation: its commands, its folder, and whether it is finished."""

import json
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from openclip_otco.data.samples import several_captions
from openclip_otco.runs import train_log
from openclip_otco.study import results, shards
from openclip_otco.study.child import Launcher
from openclip_otco.study.results import Result
from openclip_otco.study.study import DataSetting, Flags, Loss, Study, arguments

OPEN_CLIP: Sequence[str] = ("-m", "openclip_otco.train")
TAIL_LINES = 15
FROZEN = "--frozen-features"


class RunFailed(RuntimeError):
    """A run that ended without the results of its last epoch; `tail` is the end of its output."""

    def __init__(self, reason: str, tail: Sequence[str]) -> None:
        super().__init__(reason)
        self.tail = tuple(tail)


@dataclass(frozen=True)
class Run:
    """The run of one loss on one data setting with one seed.

    `flags` write `OUT/` for the study's output folder, so that the folder may move.
    """

    data: str
    loss: str
    seed: int
    out: Path
    flags: tuple[str, ...]
    scenes: Flags | None
    epochs: int
    samples_per_epoch: int | None

    @property
    def name(self) -> str:
        """Of the run: its data, its loss and its seed."""
        return run_name(self.data, self.loss, self.seed)

    @property
    def folder(self) -> Path:
        """Where the run's output, checkpoints and finished marker are."""
        return self.out / "runs" / self.name

    def command(self, trainer: Sequence[str] = OPEN_CLIP) -> list[str]:
        """The command line of the run; `trainer` is what Python is told to run."""
        return [sys.executable, *trainer, *(shards.in_folder(flag, self.out) for flag in self.flags)]

    @property
    def checkpoint(self) -> Path:
        """The file that OpenCLIP saves after the last epoch."""
        return self.folder / "checkpoints" / f"epoch_{self.epochs}.pt"

    @property
    def validation(self) -> str | None:
        """The validation shards, if their images have several captions; else None."""
        if "--val-data" not in self.flags:
            return None
        data = shards.in_folder(self.flags[self.flags.index("--val-data") + 1], self.out)
        return data if several_captions(data) else None

    @property
    def _frozen_features(self) -> Sequence[str]:
        """The run's flag `--frozen-features`, with its folder where it names one; empty without the flag."""
        if FROZEN not in self.flags:
            return ()
        start = self.flags.index(FROZEN)
        folder = [flag for flag in self.flags[start + 1 : start + 2] if not flag.startswith("-")]
        return FROZEN, *folder

    def finished(self) -> Result | None:
        """The kept result, if nothing is left to do. Without its checkpoint a trained run cannot be evaluated."""
        result = self.trained()
        if result is None or result.retrieval is not None or not self.checkpoint.is_file():
            return result
        return None if self.validation else result

    def trained(self) -> Result | None:
        """The kept result, if the run was trained with exactly these flags on exactly these scenes."""
        try:
            result = results.parse((self.folder / "finished.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return result if result.flags == list(self.flags) and result.scenes == self.scenes else None

    async def execute(
        self, watch: Callable[[str], None], trainer: Sequence[str] = OPEN_CLIP, launcher: Launcher | None = None
    ) -> Result:
        """Train from the start unless that is done, evaluate where images have several captions, and keep the result.

        Each line of output goes to `watch`, and into `output.log` or `evaluate.log`. A cancellation or an exception of
        `watch` stops the processes, and is raised again.

        Raises:
            RunFailed: the script failed, or left no results of the last epoch, or the evaluation failed.
        """
        launcher = launcher or Launcher()
        result = self.trained()
        if result is None:
            result = await self._train(watch, trainer, launcher)
            # Before the evaluation: if that fails, the training need not be repeated.
            self._keep(result)
        if result.retrieval is None and self.validation:
            result = replace(result, retrieval=await self._evaluate(self.validation, watch, launcher))
            self._keep(result)
        return result

    async def _train(self, watch: Callable[[str], None], trainer: Sequence[str], launcher: Launcher) -> Result:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        started = time.monotonic()
        timer, device, tail = train_log.StepTimer(), None, deque[str](maxlen=TAIL_LINES)

        def follow(line: str) -> None:
            nonlocal device
            tail.append(line.rstrip("\n"))
            if (progress := train_log.train_line(line)) is not None:
                timer.add(progress)
            device = device or train_log.device(line)
            watch(line)

        code = await launcher.run(self.command(trainer), self.folder / "output.log", follow)
        if code:
            raise RunFailed(f"exit code {code}", tail)
        return self._result(tail, timer.seconds_per_step, time.monotonic() - started, device)

    async def _evaluate(self, data: str, watch: Callable[[str], None], launcher: Launcher) -> dict[str, float]:
        tail = deque[str](maxlen=TAIL_LINES)

        def follow(line: str) -> None:
            tail.append(line.rstrip("\n"))
            watch(line)

        out = self.folder / "evaluate.json"
        command = [*evaluate_command(self.checkpoint, data, out), *self._frozen_features]
        code = await launcher.run(command, self.folder / "evaluate.log", follow)
        if code:
            raise RunFailed(f"evaluate: exit code {code}", tail)
        found: dict[str, float] = json.loads(out.read_text(encoding="utf-8"))["retrieval"]
        return found

    def _keep(self, result: Result) -> None:
        results.write_text(self.folder / "finished.json", results.line(result) + "\n")

    def _result(
        self, tail: Sequence[str], seconds_per_step: float | None, seconds: float, device: str | None
    ) -> Result:
        try:
            text = (self.folder / "checkpoints" / "results.jsonl").read_text(encoding="utf-8")
            epochs = [json.loads(line) for line in text.splitlines()]
            sums = {int(metrics["epoch"]): train_log.rsum(metrics) for metrics in epochs}
        except (OSError, ValueError, KeyError) as error:
            raise RunFailed(f"no retrieval results ({error!r}); is there validation data?", tail) from error
        # The script exits with 0 after some errors too, so only results of the last epoch prove that it is complete.
        if self.epochs not in sums:
            raise RunFailed(f"ended after epoch {max(sums, default=0)} of {self.epochs}", tail)
        best = max(sums, key=lambda epoch: sums[epoch])
        return Result(
            run=self.name,
            data=self.data,
            loss=self.loss,
            seed=self.seed,
            flags=list(self.flags),
            scenes=self.scenes,
            epochs=epochs,
            rsum_last=sums[self.epochs],
            rsum_best=sums[best],
            epoch_last=self.epochs,
            epoch_best=best,
            seconds_per_step=seconds_per_step,
            seconds=seconds,
            device=device,
            versions=results.versions(),
        )


def evaluate_command(checkpoint: Path, data: str, out: Path) -> list[str]:
    """The command that writes the metrics of `checkpoint` on the shards `data` to `out`."""
    words = ["evaluate", str(checkpoint), "--data", data, "--out", str(out)]
    return [sys.executable, "-m", "openclip_otco.cli", *words]


def run_name(data: str, loss: str, seed: int) -> str:
    """Name of a run and of its folder."""
    return f"{data}--{loss}--s{seed}"


def run_names(study: Study) -> set[str]:
    """The names of all runs of `study`."""
    return {
        run_name(data.name, loss.name, seed) for data in study.data for loss in study.losses for seed in study.seeds
    }


def runs(study: Study, out: Path) -> list[Run]:
    """The runs of `study`. All losses of a seed come before the next seed, so that early results can be compared."""
    return [
        _run(study, setting, loss, seed, out) for setting in study.data for seed in study.seeds for loss in study.losses
    ]


def _run(study: Study, setting: DataSetting, loss: Loss, seed: int, out: Path) -> Run:
    # Checkpoints of every epoch would fill the disk. OpenCLIP writes that of the last epoch in any case.
    defaults: Flags = {"save-frequency": 0, "val-frequency": 1}
    flags: Flags = {
        **defaults,
        **study.flags,
        **shards.data_flags(setting, out),
        **loss.selection,
        **loss.flags,
        "logs": f"{shards.OUT}/runs",
        "name": run_name(setting.name, loss.name, seed),
        "seed": seed,
    }
    epochs = flags["epochs"]
    assert isinstance(epochs, int)
    return Run(
        data=setting.name,
        loss=loss.name,
        seed=seed,
        out=out,
        flags=tuple(arguments(flags)),
        scenes=setting.scenes,
        epochs=epochs,
        samples_per_epoch=shards.samples_per_epoch(flags, out),
    )
