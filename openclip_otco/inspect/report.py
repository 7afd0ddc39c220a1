"""What the page of a run shows of its past: its facts and its curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from openclip_otco.inspect.history import Curve, History
from openclip_otco.inspect.saved import SavedRun
from openclip_otco.pages.chart import Chart

# Title, the diagnostics with their names in the chart, and what they mean; as in the table in docs/log.md.
_PLAN_CHARTS: Sequence[tuple[str, Mapping[str, str], str]] = (
    ("Plan objective", {"objective": "objective"}, "The mean cosine distance that the plan moves mass over."),
    ("Entropy", {"entropy": "entropy"}, "Of the plan, in nats; it falls towards log N, that of a matching."),
    ("Own-pair mass", {"own_pair_mass": "own pairs"}, "Share of the mass on own pairs; wrong captions keep it low."),
    ("Drift", {"drift_image": "images", "drift_text": "texts"},
     "Sinkhorn divergence from the window before: how fast the features move."),
    ("Cache age", {"cache_age": "oldest plan"}, "Steps since the oldest plan in the cache was made."),
    ("Solver time", {"seconds": "seconds"}, "Seconds that a plan took."),
    ("Solver iterations", {"iterations": "iterations"}, "Of Sinkhorn, from the start that it was given."),
    ("Effective share", {"effective_share": "share", "matched_share": "matched pairs"},
     "Part of the batch that confidence leaves to carry the loss, and of matched pairs with --otco-trust posterior."),
)  # fmt: skip


def facts(params: Mapping[str, Any], history: History, saved: SavedRun | None) -> dict[str, str | int | float]:
    """The table at the top of the page: what was trained, how far the run is, and its last results."""
    found: dict[str, Any] = {
        "model": params.get("model"),
        "loss": params.get("loss"),
        "precision": params.get("precision"),
        "batch size": params.get("batch_size"),
        "epochs saved": _progress(saved.epoch, params.get("epochs"))
        if saved is not None and saved.epoch is not None
        else None,
        "steps seen": max((max(curve) + 1 for curve in history.losses.values() if curve), default=None),
        "last loss": _last_value(history.losses.get("loss", {})),
        "last rsum": _last_value(history.rsum),
        "plans made": saved.made if saved is not None and saved.plans else None,
        "plans skipped": saved.skipped if saved is not None and saved.plans else None,
        "checkpoint": saved.checkpoint.name if saved is not None else "none yet",
    }
    return {name: value for name, value in found.items() if value is not None}


def curves(history: History) -> tuple[list[Chart], list[str]]:
    """The charts that have values, and the titles of those that have none."""
    losses = {name.replace("_", " "): curve for name, curve in sorted(history.losses.items())}
    if len(losses) == 2 and "loss" in losses:  # a sum of one term, which equals that term
        losses = {"loss": losses["loss"]}
    losses = dict(list(losses.items())[:4])
    rsum = {"rsum": history.rsum}
    charts = {
        "Loss": Chart.of("Loss", "Training loss and its terms, weighted as they are summed.", losses),
        "Validation rsum": Chart.of("Validation rsum", "Recall at 1, 5 and 10 both ways, 0 to 600.", rsum, "epoch"),
    }
    for title, names, about in _PLAN_CHARTS:
        found: dict[str, Curve] = {label: history.plans.get(name, {}) for name, label in names.items()}
        charts[title] = Chart.of(title, about, found)
    return [chart for chart in charts.values() if chart], [title for title, chart in charts.items() if chart is None]


def _progress(done: int, planned: Any) -> str:
    return f"{done} of {planned}" if isinstance(planned, int) else str(done)


def _last_value(curve: Curve) -> float | None:
    return float(curve[max(curve)]) if curve else None
