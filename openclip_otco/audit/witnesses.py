"""Witnesses: how likely pairs are matched, judged by the features of images and captions alone."""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from openclip_otco.audit.canonical import Moments, canonical_space
from openclip_otco.audit.decoys import Decoys, draw_decoys
from openclip_otco.audit.structure import Structure, centred
from openclip_otco.audit.two_groups import (
    Array,
    WrongShare,
    combined_posterior,
    discriminant_scores,
    posterior,
    posterior_by_reference,
    wrong_share,
)

FOLDS, _DECOYS = 4, 3
# Number of further rounds, in which each pair is weighted by its probability of the round before.
_ROUNDS = 2
# No weight is 0, so that some pairs count even if all seem wrong.
_LEAST_WEIGHT = 1e-3


@dataclass(frozen=True)
class TowerJudgement:
    """What unimodal towers say of `N` pairs.

    Attributes:
        score: `(N,)`; the higher, the likelier the pair is matched.
        probability: `(N,)`, that the pair is matched.
        wrong: the estimated share of wrong pairs.
        decoy_scale: standard deviation of the score of random pairs.
    """

    score: Array
    probability: Array
    wrong: WrongShare
    decoy_scale: float


def judge_by_towers(images: Tensor, texts: Tensor, image: Tensor, caption: Tensor, seed: int = 0) -> TowerJudgement:
    """Judge pairs by the features of two towers that were not trained on pairs.

    A pair has two witnesses: its correlation in the `Structure`, and its cosine in the `CanonicalSpace` of the other
    folds. They are combined into the score that best tells pairs from decoys. This is done again in further rounds, in
    which each pair is weighted by its probability of the round before. The share of wrong pairs is that of the first
    round, where a wrong pair and a decoy have the same distribution. In later rounds the pairs have a small advantage
    over decoys: the pairs of a fold had an influence on the weights of the others.

    Args:
        images, texts: `(N, d)` and `(N, e)` features; row `i` of both is pair `i`.
        image, caption: `(N,)` int64; equal numbers are equal images, or equal captions.
        seed: of folds and decoys.
    """
    images, texts = centred(images), centred(texts)
    image, caption = image.to(images.device), caption.to(images.device)
    structure = Structure(images, texts, image, caption)
    decoys = draw_decoys(image, caption, FOLDS, _DECOYS, seed)
    first, second = (each.to(images.device) for each in decoys.pairs())
    pairs = torch.arange(len(images), device=images.device)
    weights = torch.ones(len(images), device=images.device)
    if not len(first):  # without decoys nothing can be said about the pairs
        nothing = np.zeros(len(images))
        return TowerJudgement(nothing, nothing + 1, WrongShare(0.0, 0.0), 1.0)
    share: WrongShare | None = None
    for _ in range(1 + _ROUNDS):
        cosine, decoy_cosine = canonical_cosines(images, texts, weights, decoys)
        correlation = structure.correlation(pairs, pairs, weights)
        decoy_correlation = structure.correlation(first, second, weights)
        score, decoy_score = discriminant_scores(
            _columns(correlation, cosine), _columns(decoy_correlation, decoy_cosine)
        )
        if share is None:
            share = wrong_share(score, decoy_score, image.cpu().numpy(), image[first].cpu().numpy())
        probability = posterior(score, decoy_score, share.value)
        weights = torch.from_numpy(probability.clip(min=_LEAST_WEIGHT)).to(weights)
    assert share is not None
    return TowerJudgement(score, probability, share, float(decoy_score.std().clip(min=1e-12)))


def combine_with_model(towers: TowerJudgement, score: Array) -> tuple[Array, Array]:
    """Judge pairs by the towers and by a model that was trained on these pairs.

    Args:
        towers: what the towers say.
        score: `(N,)`, of the model, such as a plan's log-density; the higher, the likelier the pair is matched.

    Returns:
        The probability that each pair is matched, `(N,)`, and the order among pairs of equal probability, `(N,)`.
    """
    second = posterior_by_reference(towers.probability, score)
    probability = combined_posterior(towers.probability, second, towers.wrong.value)
    return probability, towers.score / towers.decoy_scale + score / max(float(score.std()), 1e-12)


def canonical_cosines(images: Tensor, texts: Tensor, weights: Tensor, decoys: Decoys) -> tuple[Tensor, Tensor]:
    """Cosines of pairs and of decoys, `(N,)` and `(M,)`, each in the canonical space of the folds that it is not in.

    Where there is only one fold, all cosines are 0.

    Args:
        images, texts: `(N, d)` and `(N, e)`, centred; row `i` of both is pair `i`.
        weights: `(N,)`, at least 0: how much each pair counts for the spaces.
        decoys: of these pairs; `M` of them, in the order of `Decoys.pairs`.
    """
    first, second = (each.to(images.device) for each in decoys.pairs())
    fold = decoys.fold.to(images.device)
    cosine, decoy_cosine = torch.zeros_like(weights), images.new_zeros(len(first))
    members = [fold == number for number in fold.unique()]
    moments = [Moments.of(images[here], texts[here], weights[here]) for here in members]
    for number, here in enumerate(members):
        others = moments[:number] + moments[number + 1 :]
        if not others:
            continue
        space = canonical_space(functools.reduce(operator.add, others))
        image_points, text_points = (images.new_zeros(len(images), space.image_map.shape[1]) for _ in range(2))
        image_points[here], text_points[here] = space.images(images[here]), space.texts(texts[here])
        cosine[here] = (image_points[here] * text_points[here]).sum(dim=1)
        asked = here[first]
        decoy_cosine[asked] = (image_points[first[asked]] * text_points[second[asked]]).sum(dim=1)
    return cosine, decoy_cosine


def _columns(correlation: Tensor, cosine: Tensor) -> Array:
    # Fisher's transformation: without it, correlations near 1 would have a smaller spread than others.
    return torch.stack([correlation.clamp(-0.999, 0.999).atanh(), cosine], dim=1).double().cpu().numpy()
