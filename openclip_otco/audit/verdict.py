"""The verdict on a window: what all witnesses say of its pairs, and which caption each image should have."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openclip_otco.audit.canonical import Moments, canonical_space
from openclip_otco.audit.confidence import Judgement, groups, judge
from openclip_otco.audit.structure import centred
from openclip_otco.audit.two_groups import Array, WrongShare
from openclip_otco.audit.witnesses import Testimony, ask_towers, with_second
from openclip_otco.errors import UserError
from openclip_otco.method.plan import TransportPlan
from openclip_otco.method.solver import PlanSolver

Sides = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Verdict:
    """Of `N` pairs.

    Attributes:
        probability: `(N,)` that the pair is matched.
        evidence: `(N,)`, the order among pairs of equal probability; the higher, the likelier matched.
        structure: `(N,)`, what the towers say for themselves, in standard deviations of pairs put together at random.
        log_density: `(N,)`, how much likelier than chance the trained model's plan makes the pair; None without one.
        cosine: `(N,)`, in `[-1, 1]`, of the trained model; None without one.
        best: `(N,)` int, as `Judgement` has it.
        wrong: the share of wrong pairs.
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
    """What can be said of `N` pairs.

    Args:
        solver: couples images and captions.
        towers: features of images and captions, `(N, d)` and `(N, e)`, by two towers for themselves.
        trained: features by a trained model, `(N, k)` each, unit norm; without it the plan is one of the points in the
            canonical space of the towers, and only says which caption an image should have.
        images, captions: what tells images apart, and captions, `N` each.

    Raises:
        UserError: the plan cannot be solved.
    """
    image, _ = groups(images, towers[0].device)
    caption, _ = groups(captions, towers[0].device)
    testimony = ask_towers(*towers, image, caption)
    structure = testimony.score / testimony.decoy_scale
    if trained is None:
        judged = judge(_coupled(solver, *_shared_points(towers, testimony)), images, captions)
        return Verdict(testimony.probability, structure, structure, None, None, judged.best.tolist(), testimony.wrong)
    judged = judge(_coupled(solver, *trained), images, captions)
    density = log_density(judged)
    probability, evidence = with_second(testimony, density)
    cosine = judged.cosine.double().cpu().numpy()
    return Verdict(probability, evidence, structure, density, cosine, judged.best.tolist(), testimony.wrong)


def _coupled(solver: PlanSolver, images: Tensor, texts: Tensor) -> TransportPlan:
    try:
        return solver.solve(images, texts)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise UserError(f"--epsilon {solver.epsilon}: {error}") from error


def log_density(judged: Judgement) -> Array:
    """How much likelier than chance the plan makes each pair of its window, `(N,)`, as a logarithm.

    The root of the confidence is a pair's share `s` of its row and column among `N`, of which a pair put together at
    random has about `1/N`: so the density beside all others is `N s/(1 - s)`.
    """
    log_share = judged.log_confidence.double() / 2
    density: Array = (
        (log_share - torch.log(-torch.expm1(log_share).clamp(max=-1e-12)) + math.log(len(log_share))).cpu().numpy()
    )
    return density


def _shared_points(towers: Sides, testimony: Testimony) -> Sides:
    """Images and captions in one space, made of the pairs as far as they are believed."""
    images, texts = (centred(side) for side in towers)
    weights = torch.from_numpy(testimony.probability.clip(min=1e-3)).to(images)
    space = canonical_space(Moments.of(images, texts, weights))
    return space.images(images), space.texts(texts)
