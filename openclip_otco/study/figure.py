"""The picture of a study: validation rsum over epochs, a panel per data setting, a line per loss."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # No display is needed, and none may be there.

from matplotlib import pyplot
from matplotlib.ticker import MaxNLocator

from openclip_otco.study.results import Result
from openclip_otco.study.study import Study
from openclip_otco.study.table import cell

# Okabe and Ito's colours, told apart under colour blindness; dashes and markers tell them apart in grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_DASHES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def draw(study: Study, results: Sequence[Result], stem: Path) -> list[Path]:
    """Write `stem.png` and `stem.svg`, and return their paths; thin lines are single seeds, thick ones their mean."""
    panels = len(study.data)
    figure, axes = pyplot.subplots(
        1, panels, figsize=(1 + 4.5 * panels, 4), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, data in zip(axes[0], study.data, strict=True):
        for index, loss in enumerate(study.losses):
            _curves(axis, cell(results, data.name, loss.name), index, f"{loss.name}")
        axis.set_title(data.name)
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend(title="loss")
    axes[0][0].set_ylabel("validation rsum (sum of six recalls, %)")
    seeds = "one seed" if len(study.seeds) == 1 else f"mean of {len(study.seeds)} seeds"
    figure.suptitle(f"Retrieval during training: study {study.name}, {seeds}")
    paths = [stem.with_name(f"{stem.name}.{ending}") for ending in ("png", "svg")]
    # Without date and random ids the same results give the same SVG.
    with matplotlib.rc_context({"svg.hashsalt": study.name}):
        for path in paths:
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
    return paths


def _curves(axis: Any, runs: Sequence[Result], index: int, label: str) -> None:
    if not runs:
        return
    colour = _COLOURS[index % len(_COLOURS)]
    dash = _DASHES[index % len(_DASHES)]
    curves = [dict(zip(*run.curve(), strict=True)) for run in runs]
    if len(curves) > 1:
        for curve in curves:
            axis.plot(list(curve), list(curve.values()), color=colour, linestyle=dash, linewidth=0.7, alpha=0.45)
    epochs = sorted(set.intersection(*map(set, curves)))
    means = [statistics.fmean(curve[epoch] for curve in curves) for epoch in epochs]
    marker = _MARKERS[index % len(_MARKERS)]
    axis.plot(epochs, means, color=colour, linestyle=dash, marker=marker, markersize=4, linewidth=1.8, label=label)
