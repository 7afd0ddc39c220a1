"""A run's history: losses and plan diagnostics over steps, from TensorBoard's events or else from its log."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openclip_otco.runs import train_log

Curve = dict[int, float]

# TensorBoard's reader keeps so many points of a curve, chosen evenly; a page shows fewer.
_MOST_POINTS = 4000
_PLAN = re.compile(r"OTCO Plan: \d+ \(step (\d+), N (\d+)\) (.*)")
_NUMBER = r"-?(?:[\d.]+(?:e[+-]?\d+)?|inf|nan)"
_METRIC = re.compile(rf"([A-Z][A-Za-z ]*?): ({_NUMBER})(?=\s|$)")
_TRAIN = re.compile(r"Train Epoch: (\d+) \[\s*(\d+)/(\d+) \(\d+%\)\]")
_LOSS = re.compile(rf"(\w*[Ll]oss): ({_NUMBER}) \(")


@dataclass
class History:
    """The curves of a run; a curve holds a value for each optimizer step.

    Args:
        plans: plan diagnostics under their names in TensorBoard, without the prefix `train/otco_`.
        losses: the loss and its terms; `loss` is their sum.
        rsum: sum of the six recalls after each epoch, 0 to 600; by epoch instead of step.
        sources: where the curves are from, in words.
    """

    plans: dict[str, Curve] = field(default_factory=dict)
    losses: dict[str, Curve] = field(default_factory=dict)
    rsum: Curve = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)


def read_history(run: Path, params: Mapping[str, Any]) -> History:
    """The history of the run in the folder `run`, as far as its files tell. The run may still be writing them.

    Args:
        run: OpenCLIP's `LOGS/NAME`.
        params: of the run's `params.txt`; without them the steps of the loss in the log are unknown.
    """
    history = History(rsum=_rsum(run / "checkpoints" / "results.jsonl"))
    scalars = _scalars(run / "tensorboard")
    for tag, curve in scalars.items():
        name = tag.removeprefix("train/")
        if name.startswith("otco_"):
            history.plans[name.removeprefix("otco_")] = curve
        elif tag.startswith("train/") and name.endswith("loss"):
            history.losses[name] = curve
    if history.plans or history.losses:
        history.sources.append("TensorBoard's events")
    lines = _whole_lines(run / "out.log")
    for curves, logged in ((history.plans, _plans(lines)), (history.losses, _losses(lines, params))):
        if not curves and logged:
            curves.update(logged)
            if "out.log" not in history.sources:
                history.sources.append("out.log")
    return history


def _scalars(folder: Path) -> dict[str, Curve]:
    """All scalars in TensorBoard's event files, by tag; of broken or unfinished files, those that are complete."""
    if not any(folder.glob("events.out.tfevents.*")):
        return {}
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    # It warns of each restart and of each file that ends early. A reader of the page need not know.
    logger = logging.getLogger("tensorboard")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        # One picture and one histogram, as zero would keep all of them; the page shows neither.
        events = EventAccumulator(
            str(folder), {SCALARS: _MOST_POINTS, "images": 1, "histograms": 1, "tensors": _MOST_POINTS}
        )
        events.Reload()
        return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()[SCALARS]}
    except Exception:  # the reader raises any error of protobuf's; the log takes its place
        return {}
    finally:
        logger.setLevel(level)


def _whole_lines(path: Path) -> list[str]:
    """The lines of a log, without an unfinished last one: a number that is cut short is another number."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [line.rstrip("\n") for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _plans(lines: Iterable[str]) -> dict[str, Curve]:
    """The diagnostics of `OTCO Plan:` lines. The log holds only some of the plans."""
    found: dict[str, Curve] = {}
    for line in lines:
        if plan := _PLAN.search(line):
            for name, value in _METRIC.findall(plan[3]):
                found.setdefault(name.strip().lower().replace(" ", "_"), {})[int(plan[1])] = float(value)
    return found


def _losses(lines: Iterable[str], params: Mapping[str, Any]) -> dict[str, Curve]:
    """The losses of `Train Epoch:` lines. A line is a mean over steps, and counts for the last, as in TensorBoard."""
    sizes = [params.get(name, 1) for name in ("batch_size", "accum_freq", "world_size")]
    if "batch_size" not in params or not all(isinstance(size, int) and size > 0 for size in sizes):
        return {}
    per_step = sizes[0] * sizes[1] * sizes[2]
    found: dict[str, Curve] = {}
    for line in lines:
        if train := _TRAIN.search(line):
            epoch, samples, in_epoch = (int(part) for part in train.groups())
            step = epoch * (in_epoch // per_step) + samples // per_step - 1
            for name, value in _LOSS.findall(line):
                found.setdefault(name.lower(), {})[step] = float(value)
    return found


def _rsum(path: Path) -> Curve:
    """The rsum after each validated epoch, from the results that OpenCLIP keeps beside its checkpoints."""
    found: Curve = {}
    for line in _whole_lines(path):
        try:
            metrics = json.loads(line)
            found[int(metrics["epoch"])] = train_log.rsum(metrics)
        except (ValueError, KeyError, TypeError):
            continue  # no metrics of retrieval, or an unfinished line
    return found
