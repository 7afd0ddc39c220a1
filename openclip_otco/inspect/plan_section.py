"""One plan of a run, shown in detail: hard negatives, a heat map, confidence, and how the cached plans differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from openclip_otco.errors import UserError
from openclip_otco.inspect.negatives import Sample, evenly_by_confidence, hardest_negatives, heat_map_pairs
from openclip_otco.inspect.pairs import Pair, Pairs
from openclip_otco.inspect.saved import SavedRun
from openclip_otco.inspect.views import Views, compare_views
from openclip_otco.method.plan import TransportPlan
from openclip_otco.method.solver import PlanSolver
from openclip_otco.method.support import row_shares, support_confidence
from openclip_otco.pages.chart import Cell, colour, heat
from openclip_otco.train.figures import relative_brightness

# Pairs of the heat map: more would make cells too small to point at.
_HEAT_MAP_PAIRS = 24
# Samples that the views of the cached plans are compared on.
_COMPARED_SAMPLES = 512


@dataclass(frozen=True)
class PlanSection:
    """What the page shows of one plan.

    Args:
        note: why there is no plan, or why it has no pictures; empty where it has.
        source: where the plan is from, in words.
        pairs: of the plan's support, as a reader sees them.
        samples: some of them, with their hardest negatives.
        block, cells: pairs of the heat map, in the order of its rows and columns, and its cells.
        scale: colours of a scale from dark to bright, for both heat maps.
        confidences: quantiles of confidence over the support, name and value.
        views, view_cells, view_range, plan_steps: how much the cached plans' views differ, as cosines and as the cells
            of a heat map, with the values of its darkest and its brightest colour, and the steps of these plans.
        agreement: mean cosine between the plans' views of each of `samples`.
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
        """Whether there is a picture of any of the pairs."""
        return any(pair.thumbnail for pair in self.pairs)


def plan_section(
    saved: SavedRun | None, pairs: Callable[[], Pairs], params: Mapping[str, Any], samples: int, negatives: int
) -> PlanSection:
    """A plan of `pairs`, made with the run's own settings; without pairs, the newest plan in the checkpoint.

    Args:
        saved: the run's checkpoint, if it has one.
        pairs: gives pairs encoded with its weights, or raises `UserError` with what to do about it.
        params: of the run.
        samples: pairs to show.
        negatives: hardest negatives of each, each way.
    """
    note = ""
    chosen: _ChosenPlan | None
    try:
        chosen = _plan_of_pairs(pairs(), params)
    except (UserError, RuntimeError) as error:
        note = f"No pictures: {error}."
        chosen = _newest_cached_plan(saved)
    if chosen is None:
        return PlanSection(note)
    if len(chosen.plan) < 2:
        return PlanSection(note or "No pictures: a plan of one pair has no negatives.")
    section = replace(_described(chosen, samples, negatives), note=note)
    views = _views(saved, chosen.plan, [sample.index for sample in section.samples])
    return section if views is None else _with_views(section, views, saved)


class _ChosenPlan(NamedTuple):
    plan: TransportPlan
    pairs: tuple[Pair, ...]
    """Of the plan's support, as a reader sees them."""
    source: str
    """Where the plan is from, in words."""


def _plan_of_pairs(pairs: Pairs, params: Mapping[str, Any]) -> _ChosenPlan:
    """Couples the pairs with the run's epsilon."""
    plan = PlanSolver(epsilon=_epsilon(params), initial_plan="none").solve(pairs.images, pairs.texts)
    source = f"a plan of {len(plan):,} training pairs, made with the checkpoint's weights and epsilon {plan.epsilon:g}"
    return _ChosenPlan(plan, pairs.shown, source)


def _newest_cached_plan(saved: SavedRun | None) -> _ChosenPlan | None:
    """The newest plan with potentials that the checkpoint holds; its pairs are numbers, as it keeps no captions."""
    plans = [plan for plan in (saved.plans if saved is not None else ()) if plan.coupled]
    if not plans:
        return None
    plan = plans[-1]
    pairs = tuple(Pair(f"pair {i}", f"pair {i} of the plan", None) for i in range(len(plan)))
    return _ChosenPlan(plan, pairs, f"the newest cached plan, of step {plan.step:,}, which couples {len(plan):,} pairs")


def _described(chosen: _ChosenPlan, samples: int, negatives: int) -> PlanSection:
    """The section of a plan of two pairs or more, without the views of the cached plans."""
    plan = chosen.plan
    found = hardest_negatives(plan, evenly_by_confidence(plan, samples), negatives)
    block = heat_map_pairs(found, _HEAT_MAP_PAIRS)
    quantiles = support_confidence(plan).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    return PlanSection(
        source=chosen.source,
        pairs=chosen.pairs,
        samples=tuple(found),
        block=tuple(block),
        cells=tuple(_heat_map(plan, block, chosen.pairs)),
        confidences=dict(zip(("lowest tenth below", "median", "highest tenth above"), quantiles, strict=True)),
    )


def _views(saved: SavedRun | None, plan: TransportPlan, samples: Sequence[int]) -> Views | None:
    """How the checkpoint's plans see the pairs `samples` of `plan`, and after them more of its pairs; None without
    plans of that width."""
    if saved is None or any(cached.image_features.shape[1] != plan.image_features.shape[1] for cached in saved.plans):
        return None
    others = torch.ones(len(plan), dtype=torch.bool)
    others[list(samples)] = False
    compared = torch.cat([torch.tensor(samples, dtype=torch.long), others.nonzero()[:, 0]])
    compared = compared[: max(_COMPARED_SAMPLES, len(samples))]
    return compare_views(saved.plans, plan.image_features[compared], plan.text_features[compared])


def _with_views(section: PlanSection, views: Views, saved: SavedRun | None) -> PlanSection:
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


def _heat_map(plan: TransportPlan, block: Sequence[int], pairs: Sequence[Pair]) -> list[Cell]:
    """The shares of the mass between the images and the texts of the pairs `block`."""
    indices = torch.tensor(block, dtype=torch.long)
    shares = row_shares(plan, indices, indices)
    titles = [
        [
            f"image {i + 1}, caption {j + 1}: {shares[i, j]:.2%} ({pairs[index].caption})"
            for j, index in enumerate(block)
        ]
        for i in range(len(block))
    ]
    return heat(relative_brightness(shares.numpy()).tolist(), titles, 0.0, 1.0)


def _epsilon(params: Mapping[str, Any]) -> float:
    """The run's `--otco-epsilon`; the solver's default where it has none."""
    given = params.get("otco_epsilon")
    return float(given) if isinstance(given, int | float) and given > 0 else PlanSolver.epsilon
