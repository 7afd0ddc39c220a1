"""The verdict on a window: what all witnesses say of its pairs, and which other caption fits each image best."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openclip_otco.audit.canonical import Moments, canonical_space
from openclip_otco.audit.confidence import PlanJudgement, groups, judge_by_plan
from openclip_otco.audit.structure import centred
from openclip_otco.audit.two_groups import Array, WrongShare
from openclip_otco.audit.witnesses import TowerJudgement, combine_with_model, judge_by_towers
from openclip_otco.errors import UserError
from openclip_otco.method.plan import TransportPlan
from openclip_otco.method.solver import PlanSolver

Sides = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Verdict:
    """What all witnesses say of `N` pairs.

    Attributes:
        probability: `(N,)`, that the pair is matched.
        evidence: `(N,)`, the order among pairs of equal probability; the higher, the likelier matched.
        structure: `(N,)`, score of the unimodal towers, in standard deviations of random pairs.
        log_density: `(N,)`, how much likelier than chance the plan of the trained model makes the pair, see
            `log_density`; None without a trained model.
        cosine: `(N,)`, in `[-1, 1]`, of the trained model; None without one.
        best: `N` numbers of pairs, see `PlanJudgement`.
        wrong: the estimated share of wrong pairs.
    """

    probability: Array
    evidence: Array
    structure: Array
    log_density: Array | None
    cosine: Array | None
    best: list[int]
    wrong: WrongShare


def judge_window(
    solver: PlanSolver,
    towers: Sides,
    trained: Sides | None,
    images: Sequence[Hashable],
    captions: Sequence[Hashable],
) -> Verdict:
    """Judge `N` pairs by all witnesses.

    Args:
        solver: solves the plan.
        towers: features of images and captions by unimodal towers, `(N, d)` and `(N, e)`.
        trained: features by a trained model, `(N, k)` each, of unit norm. Without it, the plan is made of points in the
            canonical space of the towers, and only tells which other caption fits an image best.
        images, captions: a value for the image and for the caption of each pair, `N` each; equal values are equal
            images, or equal captions.

    Raises:
        UserError: the plan cannot be solved.
    """
    image, _ = groups(images, towers[0].device)
    caption, _ = groups(captions, towers[0].device)
    by_towers = judge_by_towers(*towers, image, caption)
    structure = by_towers.score / by_towers.decoy_scale
    if trained is None:
        by_plan = judge_by_plan(_plan(solver, *_points_of_towers(towers, by_towers)), images, captions)
        return Verdict(by_towers.probability, structure, structure, None, None, by_plan.best.tolist(), by_towers.wrong)
    by_plan = judge_by_plan(_plan(solver, *trained), images, captions)
    density = log_density(by_plan)
    probability, evidence = combine_with_model(by_towers, density)
    cosine = by_plan.cosine.double().cpu().numpy()
    return Verdict(probability, evidence, structure, density, cosine, by_plan.best.tolist(), by_towers.wrong)


def _plan(solver: PlanSolver, images: Tensor, texts: Tensor) -> TransportPlan:
    try:
        return solver.solve(images, texts)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise UserError(f"--epsilon {solver.epsilon}: {error}") from error


def log_density(by_plan: PlanJudgement) -> Array:
    """How much likelier than chance the plan makes each pair of its window: a logarithm, `(N,)`.

    The square root of the confidence is the pair's share `s` of its row and its column (their geometric mean). A random
    pair has a share of about `1/N`. So the pair is `N s/(1 - s)` times as likely as a random one.
    """
    log_share = by_plan.log_confidence.double() / 2
    density: Array = (
        (log_share - torch.log(-torch.expm1(log_share).clamp(max=-1e-12)) + math.log(len(log_share))).cpu().numpy()
    )
    return density


def _points_of_towers(towers: Sides, by_towers: TowerJudgement) -> Sides:
    """Points of images and captions in one space, made of the pairs, each weighted by its probability."""
    images, texts = (centred(side) for side in towers)
    weights = torch.from_numpy(by_towers.probability.clip(min=1e-3)).to(images)
    space = canonical_space(Moments.of(images, texts, weights))
    return space.images(images), space.texts(texts)
