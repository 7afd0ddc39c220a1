"""The pictures of a study, each as PNG and SVG: learning curves, recalls, noise against rsum, cost against quality."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from openclip_otco.study.mismatch import mismatch
from openclip_otco.study.results import Result, have_standard_retrieval
from openclip_otco.study.spread import interval
from openclip_otco.study.study import Study
from openclip_otco.study.style import COLOURS, DASHES, line_style, pyplot
from openclip_otco.study.table import cell, final_recalls

# With more losses than this the legend stands beside the panels.
_LOSSES_IN_A_PANEL = 6
_IN_TRAINING = "validation rsum (sum of six recalls, %)"


def draw(study: Study, results: Sequence[Result], folder: Path) -> list[Path]:
    """Draw the pictures that `results` have numbers for into `folder`, and return their paths.

    `rsum`: validation rsum over epochs. `recalls`: the six recalls after the last epoch. `noise`: rsum over the share
    of mismatched captions, where settings differ in it. `cost`: rsum over the seconds per step, where two losses or
    more have them. Shown are means over seeds; whiskers and bands are 95 % intervals.
    """
    figures = {
        "rsum": _learning_curves(study, results),
        "recalls": _recalls(study, results),
        "noise": _noise(study, results),
        "cost": _cost(study, results),
    }
    paths = []
    # Without date and random ids the same results give the same SVG.
    with pyplot.rc_context({"svg.hashsalt": study.name}):
        for name, figure in figures.items():
            for ending in ("png", "svg"):
                path = folder / f"{name}.{ending}"
                if figure is None:
                    path.unlink(missing_ok=True)  # it may be left from an earlier state of the study
                    continue
                figure.savefig(path, dpi=150, metadata={"Date": None} if ending == "svg" else None)
                paths.append(path)
            if figure is not None:
                pyplot.close(figure)
    return paths


def _learning_curves(study: Study, results: Sequence[Result]) -> Any:
    figure, axes = _panels(study)
    for axis, data in zip(axes, study.data, strict=True):
        for index, loss in enumerate(study.losses):
            _curve(axis, cell(results, data.name, loss.name), index, loss.name)
        axis.set_title(data.name)
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    axes[0].set_ylim(bottom=max(0, axes[0].get_ylim()[0]))  # An interval may reach below 0, an rsum cannot.
    _legend(figure, axes, study)
    figure.supylabel(_IN_TRAINING, fontsize="medium")
    figure.suptitle(f"Retrieval during training: study {study.name}, {_seeds(study)}")
    return figure


def _curve(axis: Any, runs: Sequence[Result], index: int, label: str) -> None:
    """Draws the mean of `runs` and a band for its interval, over the epochs that all runs have."""
    if not runs:
        return
    curves = [dict(zip(*run.curve(), strict=True)) for run in runs]
    epochs = sorted(set.intersection(*map(set, curves)))
    spreads = [interval([curve[epoch] for curve in curves]) for epoch in epochs]
    means = [mean for mean, _ in spreads]
    style = {**line_style(index), "linestyle": DASHES[index % len(DASHES)]}
    axis.plot(epochs, means, markersize=4, linewidth=1.8, label=label, **style)
    if len(runs) > 1:
        low = [mean - (half or 0) for mean, half in spreads]
        high = [mean + (half or 0) for mean, half in spreads]
        axis.fill_between(epochs, low, high, color=style["color"], alpha=0.2, linewidth=0)


def _recalls(study: Study, results: Sequence[Result]) -> Any:
    recalls = final_recalls(results)
    figure, axes = _panels(study, width=5.5)
    heads = [f"{way}\nR@{k}" for way in ("I→T", "T→I") for k in (1, 5, 10)]
    width = 0.8 / len(study.losses)
    for axis, data in zip(axes, study.data, strict=True):
        for index, loss in enumerate(study.losses):
            runs = cell(results, data.name, loss.name)
            if not runs:
                continue
            spreads = [interval(values) for values in zip(*map(recalls, runs), strict=True)]
            places = [group + (index - (len(study.losses) - 1) / 2) * width for group in range(len(heads))]
            axis.bar(
                places,
                [mean for mean, _ in spreads],
                width,
                yerr=None if len(runs) == 1 else [half for _, half in spreads],
                color=COLOURS[index % len(COLOURS)],
                hatch=("", "//", "..", "xx")[index % 4],
                edgecolor="white",
                error_kw={"elinewidth": 1, "capsize": 2},
                label=loss.name,
            )
        axis.set_xticks(range(len(heads)), heads)
        axis.set_title(data.name)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3, axis="y")
        axis.set_axisbelow(True)
    _legend(figure, axes, study)
    figure.supylabel("recall, %", fontsize="medium")
    captions = "all captions" if have_standard_retrieval(results) else "one caption an image"
    figure.suptitle(f"Retrieval after the last epoch, {captions}: study {study.name}, {_seeds(study)}")
    return figure


def _noise(study: Study, results: Sequence[Result]) -> Any:
    """None unless settings differ in their share of mismatched captions."""
    shares = {data.name: share for data in study.data if (share := mismatch(data)) is not None}
    if len({shares[result.data] for result in results if result.data in shares}) < 2:
        return None
    figure, (axis,) = _panels(study, panels=1, width=5.5)
    for index, loss in enumerate(study.losses):
        cells = [(100 * share, cell(results, name, loss.name)) for name, share in shares.items()]
        cells = sorted(((share, runs) for share, runs in cells if runs), key=lambda each: each[0])
        style = line_style(index)
        for dash, rsum in (("-", "rsum_last"), ("--", "rsum_best")):
            spreads = [interval([getattr(run, rsum) for run in runs]) for _, runs in cells]
            axis.errorbar(
                [share for share, _ in cells],
                [mean for mean, _ in spreads],
                [half or 0 for _, half in spreads],
                linestyle=dash,
                markersize=5,
                capsize=3,
                **style,
            )
    handles = [Line2D([], [], label=loss.name, **line_style(index)) for index, loss in enumerate(study.losses)]
    kinds = [
        Line2D([], [], color="grey", linestyle=dash, label=epoch)
        for dash, epoch in (("-", "last epoch"), ("--", "best epoch"))
    ]
    axis.legend(handles=[*handles, *kinds])
    axis.set_xlabel("training captions of another image, %")
    axis.set_ylabel(_IN_TRAINING)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    figure.suptitle(f"Noise: study {study.name}, {_seeds(study)}")
    return figure


def _cost(study: Study, results: Sequence[Result]) -> Any:
    """None unless two losses or more have a speed."""
    timed = [result for result in results if result.seconds_per_step is not None]
    if len({result.loss for result in timed}) < 2:
        return None
    recalls = final_recalls(timed)
    figure, axes = _panels(study)
    for axis, data in zip(axes, study.data, strict=True):
        for index, loss in enumerate(study.losses):
            runs = cell(timed, data.name, loss.name)
            if not runs:
                continue
            seconds, seconds_half = interval([run.seconds_per_step for run in runs if run.seconds_per_step is not None])
            rsum, rsum_half = interval([sum(recalls(run)) for run in runs])
            axis.errorbar(
                seconds,
                rsum,
                rsum_half,
                seconds_half,
                linestyle="none",
                capsize=3,
                label=loss.name,
                **line_style(index),
            )
        axis.set_title(data.name)
        axis.set_xlabel("seconds per optimizer step")
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    _legend(figure, axes, study)
    figure.supylabel("rsum, all captions" if have_standard_retrieval(timed) else _IN_TRAINING, fontsize="medium")
    figure.suptitle(f"Cost and quality after the last epoch: study {study.name}, {_seeds(study)}")
    return figure


def _panels(study: Study, panels: int | None = None, width: float = 4.5) -> tuple[Any, Any]:
    """A figure with `panels` panels, or one for each data setting. More than three panels stand two in a row."""
    panels = panels or len(study.data)
    columns = panels if panels <= 3 else 2
    rows = math.ceil(panels / columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(1 + width * columns, 1 + 3 * rows), sharey=True, squeeze=False, layout="constrained"
    )
    for axis in axes.flat[panels:]:
        axis.remove()
    return figure, axes.flat[:panels]


def _legend(figure: Any, axes: Any, study: Study) -> None:
    """Adds a legend to each panel. Of many losses it would hide the curves, so one stands beside all panels."""
    if len(study.losses) <= _LOSSES_IN_A_PANEL:
        for axis in axes:
            if axis.has_data():
                axis.legend(title="loss")
        return
    entries = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), title="loss", loc="outside right center", fontsize="small")
    width, height = figure.get_size_inches()
    figure.set_size_inches(width + 2, max(height, 1.4 + 0.2 * len(entries)))


def _seeds(study: Study) -> str:
    return "one seed" if len(study.seeds) == 1 else f"mean of {len(study.seeds)} seeds with 95 % intervals"
