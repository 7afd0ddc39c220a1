"""What the page of a run shows: its facts, its curves, and one plan seen from close by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from openclip_otco.errors import UserError
from openclip_otco.inspect.history import Curve, History
from openclip_otco.inspect.negatives import Sample, block_of, hardest_negatives, spread
from openclip_otco.inspect.pairs import Pair, Pairs
from openclip_otco.inspect.saved import Saved
from openclip_otco.inspect.views import Views, compare_views
from openclip_otco.method.plan import TransportPlan
from openclip_otco.method.solver import PlanSolver
from openclip_otco.method.support import row_shares, support_confidence
from openclip_otco.pages.chart import Cell, Chart, colour, heat
from openclip_otco.train.figures import relative_brightness

# Pairs of the heat map: more would make cells too small to point at.
_BLOCK = 24
# Samples that the views of the cached plans are compared on.
_VIEWED = 512

# Title, names of the diagnostics and how the chart calls them, and what they mean; as in the README's table.
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


@dataclass(frozen=True)
class PlanSection:
    """One plan from close by; `note` says why there is none, or why it has no pictures.

    Args:
        pairs: of the plan's support, as a reader sees them.
        samples: some of them, with their hardest negatives.
        block, cells: pairs of the heat map, in the order of its rows and columns, and its cells.
        confidences: quantiles of confidence over the support, name and value.
        views, view_cells, plan_steps: how the cached plans' views differ, and which plans they are.
        agreement: mean cosine between the plans' views of each of `samples`.
        source: where the plan is from, in words.
    """

    note: str = ""
    source: str = ""
    pairs: tuple[Pair, ...] = ()
    samples: tuple[Sample, ...] = ()
    block: tuple[int, ...] = ()
    cells: tuple[Cell, ...] = ()
    scale: tuple[str, ...] = tuple(colour(step / 8) for step in range(9))
    confidences: Mapping[str, float] | None = None
    views: Views | None = None
    view_cells: tuple[Cell, ...] = ()
    view_range: tuple[float, float] = (0.0, 1.0)
    plan_steps: tuple[int, ...] = ()
    agreement: tuple[float, ...] = ()

    @property
    def pictures(self) -> bool:
        return any(pair.thumbnail for pair in self.pairs)


def facts(params: Mapping[str, Any], history: History, saved: Saved | None) -> dict[str, str | int | float]:
    """What heads the page: what was trained, how far it is, and what it came to."""
    found: dict[str, Any] = {
        "model": params.get("model"),
        "loss": params.get("loss"),
        "precision": params.get("precision"),
        "batch size": params.get("batch_size"),
        "epochs saved": _of(saved.epoch, params.get("epochs"))
        if saved is not None and saved.epoch is not None
        else None,
        "steps seen": max((max(curve) + 1 for curve in history.losses.values() if curve), default=None),
        "last loss": _last(history.losses.get("loss", {})),
        "last rsum": _last(history.rsum),
        "plans made": saved.made if saved is not None and saved.plans else None,
        "plans skipped": saved.skipped if saved is not None and saved.plans else None,
        "checkpoint": saved.checkpoint.name if saved is not None else "none yet",
    }
    return {name: value for name, value in found.items() if value is not None}


def curves(history: History) -> tuple[list[Chart], list[str]]:
    """The charts that there are values for, and the titles of those that there are none for."""
    losses = {name.replace("_", " "): curve for name, curve in sorted(history.losses.items())}
    if len(losses) == 2 and "loss" in losses:  # the sum of one term is that term
        losses = {"loss": losses["loss"]}
    losses = dict(list(losses.items())[:4])
    rsum = {"rsum": history.rsum}
    made = {
        "Loss": Chart.of("Loss", "Training loss and its terms, weighted as they are summed.", losses),
        "Validation rsum": Chart.of("Validation rsum", "Recall at 1, 5 and 10 both ways, 0 to 600.", rsum, "epoch"),
    }
    for title, names, about in _PLAN_CHARTS:
        found: dict[str, Curve] = {shown: history.plans.get(name, {}) for name, shown in names.items()}
        made[title] = Chart.of(title, about, found)
    return [chart for chart in made.values() if chart], [title for title, chart in made.items() if chart is None]


def plan_section(
    saved: Saved | None, pairs: Callable[[], Pairs], params: Mapping[str, Any], samples: int, negatives: int
) -> PlanSection:
    """One plan from close by: of `pairs`, by the run's own settings; without them, the newest one in the checkpoint.

    Args:
        saved: the run's checkpoint, if it has one.
        pairs: gives pairs encoded with its weights, or raises `UserError` with what to do about it.
        params: of the run.
        samples: pairs to show.
        negatives: hardest negatives of each, each way.
    """
    note = ""
    try:
        given = pairs()
        plan = PlanSolver(epsilon=_epsilon(params), initial_plan="none").solve(given.images, given.texts)
        shown = given.shown
        source = (
            f"a plan of {len(plan):,} training pairs, made with the checkpoint's weights and epsilon {plan.epsilon:g}"
        )
    except (UserError, RuntimeError) as error:
        note = f"No pictures: {error}."
        plans = [plan for plan in (saved.plans if saved is not None else ()) if plan.coupled]
        if not plans:
            return PlanSection(note)
        plan = plans[-1]
        shown = tuple(Pair(f"pair {i}", f"pair {i} of the plan", None) for i in range(len(plan)))
        source = f"the newest cached plan, of step {plan.step:,}, which couples {len(plan):,} pairs"
    if len(plan) < 2:
        return PlanSection(note or "No pictures: a plan of one pair has no negatives.")
    found = hardest_negatives(plan, spread(plan, samples), negatives)
    block = block_of(found, _BLOCK)
    views = _views(saved, plan, [sample.index for sample in found])
    trust = support_confidence(plan).quantile(torch.tensor([0.1, 0.5, 0.9]))
    section = PlanSection(
        note=note,
        source=source,
        pairs=shown,
        samples=tuple(found),
        block=tuple(block),
        cells=tuple(_block_cells(plan, block, shown)),
        confidences=dict(zip(("lowest tenth below", "median", "highest tenth above"), trust.tolist(), strict=True)),
    )
    return section if views is None else _with_views(section, views, saved)


def _views(saved: Saved | None, plan: TransportPlan, first: Sequence[int]) -> Views | None:
    """The views of the samples `first`, and of more of the plan's pairs behind them, by the checkpoint's plans."""
    if saved is None or any(cached.image_features.shape[1] != plan.image_features.shape[1] for cached in saved.plans):
        return None
    others = torch.ones(len(plan), dtype=torch.bool)
    others[list(first)] = False
    some = torch.cat([torch.tensor(first, dtype=torch.long), others.nonzero()[:, 0]])[: max(_VIEWED, len(first))]
    return compare_views(saved.plans, plan.image_features[some], plan.text_features[some])


def _with_views(section: PlanSection, views: Views, saved: Saved | None) -> PlanSection:
    assert saved is not None
    between = views.between_plans.tolist()
    steps = tuple(plan.step for plan in saved.plans)
    low = min(map(min, between))
    titles = [[f"steps {a} and {b}: {between[i][j]:.4f}" for j, b in enumerate(steps)] for i, a in enumerate(steps)]
    return replace(
        section,
        views=views,
        view_cells=tuple(heat(between, titles, low, 1.0)),
        view_range=(low, 1.0),
        plan_steps=steps,
        agreement=tuple(views.per_sample[: len(section.samples)].tolist()),
    )


def _block_cells(plan: TransportPlan, block: Sequence[int], shown: Sequence[Pair]) -> list[Cell]:
    indices = torch.tensor(block, dtype=torch.long)
    shares = row_shares(plan, indices, indices)
    titles = [
        [f"image {i + 1}, caption {j + 1}: {shares[i, j]:.2%} ({shown[b].caption})" for j, b in enumerate(block)]
        for i in range(len(block))
    ]
    return heat(relative_brightness(shares.numpy()).tolist(), titles, 0.0, 1.0)


def _epsilon(params: Mapping[str, Any]) -> float:
    given = params.get("otco_epsilon")
    return float(given) if isinstance(given, int | float) and given > 0 else PlanSolver.epsilon


def _of(done: int, planned: Any) -> str:
    return f"{done} of {planned}" if isinstance(planned, int) else str(done)


def _last(curve: Curve) -> float | None:
    return float(curve[max(curve)]) if curve else None
