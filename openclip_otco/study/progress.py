"""The progress of a study's runs and the time left: a bar on a terminal, plain lines elsewhere."""

import os
import sys
import time
from collections.abc import Sequence
from typing import TextIO

from tqdm import tqdm

from openclip_otco.runs import train_log
from openclip_otco.study.run import Run

_PLAIN_SECONDS = 15
_PLAIN = "{percentage:3.0f}% of {total_fmt} samples, {elapsed} gone, {remaining} left, {desc}{postfix}"


class Progress:
    """Counts the training samples of all `runs`, and shows the name of the run that wrote the last line.

    Several runs may be at work at once.
    """

    def __init__(self, runs: Sequence[Run], stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._samples = {run.name: _samples_left(run) for run in runs}
        self._done = dict.fromkeys(self._samples, 0)
        self._usual_samples = max((samples for samples in self._samples.values() if samples), default=1)
        self._running: dict[str, float | None] = {}  # the last rsum of each run at work
        self._began = time.monotonic()
        self._printed = self._began
        self._bar: tqdm | None = None
        if _is_terminal(self._stream):
            # No smoothing, as lines come in bursts, and the time left includes validation between epochs.
            self._bar = tqdm(
                total=1, unit="sample", unit_scale=True, smoothing=0, dynamic_ncols=True, file=self._stream
            )

    def start(self, run: Run) -> None:
        """`run` starts."""
        self._running[run.name] = None
        self._show(run.name)

    def watch(self, run: Run, line: str) -> None:
        """Take in a line of output of `run`."""
        if (progress := train_log.train_line(line)) is not None:
            # OpenCLIP's own count is exact, as it drops or repeats a part of a batch; and sometimes it is the only one.
            self._samples[run.name] = self._usual_samples = progress.samples_per_epoch * run.epochs
            self._done[run.name] = progress.epoch * progress.samples_per_epoch + progress.samples
        elif (rsum := train_log.eval_rsum(line)) is not None:
            self._running[run.name] = rsum
        else:
            return
        self._show(run.name)

    def end(self, run: Run, say: str) -> None:
        """`run` has finished or failed; none of its samples are left. Prints `say`."""
        self._samples[run.name] = self._done[run.name]
        self._show(run.name)
        del self._running[run.name]
        self.say(say)

    def say(self, text: str) -> None:
        """Print `text` without breaking the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Stop; the bar stays as it is."""
        if self._bar is not None:
            self._bar.close()

    def _show(self, name: str) -> None:
        total = sum(self._usual_samples if samples is None else samples for samples in self._samples.values())
        done = sum(self._done.values())
        rsum, others = self._running[name], len(self._running) - 1
        postfix = "" if rsum is None else f"rsum {rsum:.1f}"
        if others:
            name = f"{name} and {others} more"
        if self._bar is not None:
            self._bar.n, self._bar.total = done, total
            self._bar.set_description_str(name, refresh=False)
            self._bar.set_postfix_str(postfix, refresh=False)
            self._bar.refresh()
            return
        now = time.monotonic()
        if done and now - self._printed >= _PLAIN_SECONDS:
            self._printed = now
            meter = tqdm.format_meter(
                done, total, now - self._began, prefix=name, postfix=postfix, unit_scale=True, bar_format=_PLAIN
            )
            print(meter, file=self._stream, flush=True)


def _samples_left(run: Run) -> int | None:
    """Training samples of `run` that are left: 0 if only its evaluation is; None if their number is not known."""
    if run.trained():
        return 0
    return run.samples_per_epoch and run.samples_per_epoch * run.epochs


def _is_terminal(stream: TextIO) -> bool:
    if not stream.isatty():
        return False
    try:
        # Containers and recorders often have a terminal of size zero, where a bar would be invisible.
        return min(os.get_terminal_size(stream.fileno())) > 0
    except OSError:
        return True
