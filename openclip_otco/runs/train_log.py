"""What the lines that OpenCLIP's training script logs say about progress, speed and retrieval."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

RECALLS = tuple(f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10))

_TRAIN = re.compile(r"Train Epoch: (\d+) \[\s*(\d+)/(\d+) \(\d+%\)\].*? Batch \(t\): ([\d.]+),")
_RECALL = re.compile(r"\b((?:image_to_text|text_to_image)_R@(?:1|5|10)): ([\d.]+)")
_DEVICE = re.compile(r"Running .*\bDevice:? ([\w:]+)")


@dataclass(frozen=True)
class TrainLine:
    """A `Train Epoch` line: number of the epoch, from 0; samples seen in it; samples per epoch; mean seconds per step.

    The mean is over the optimizer steps since the line before, accumulated micro-batches included.
    """

    epoch: int
    samples: int
    samples_per_epoch: int
    seconds_per_step: float


def train_line(line: str) -> TrainLine | None:
    """The training progress that `line` reports, or None if it is another line."""
    found = _TRAIN.search(line)
    if not found:
        return None
    return TrainLine(int(found[1]), int(found[2]), int(found[3]), float(found[4]))


def rsum(metrics: Mapping[str, float]) -> float:
    """Sum of R@1, R@5 and R@10 in percent, image to text and text to image: 0 to 600.

    Raises:
        KeyError: a recall is missing.
    """
    return 100 * sum(metrics[recall] for recall in RECALLS)


def eval_rsum(line: str) -> float | None:
    """The rsum of a line with validation metrics, or None if it is another line."""
    metrics = {name: float(value) for name, value in _RECALL.findall(line)}
    return rsum(metrics) if len(metrics) == len(RECALLS) else None


def device(line: str) -> str | None:
    """The device that OpenCLIP says it runs on, or None if `line` is another line."""
    found = _DEVICE.search(line)
    return found[1].rstrip(".") if found else None


class StepTimer:
    """Mean seconds per optimizer step of a run, without its first line, which is the warm-up step."""

    def __init__(self) -> None:
        self._previous: TrainLine | None = None
        self._seconds = 0.0
        self._samples = 0

    def add(self, line: TrainLine) -> None:
        """Add the steps since the line before. All steps have equal numbers of samples, so samples are the weight."""
        previous, self._previous = self._previous, line
        if previous is None:
            return
        samples = line.samples - previous.samples if line.epoch == previous.epoch else line.samples
        self._seconds += samples * line.seconds_per_step
        self._samples += samples

    @property
    def seconds_per_step(self) -> float | None:
        """Seconds per step, or None if there was no line after the first."""
        return self._seconds / self._samples if self._samples else None
