"""Witnesses: what speaks for a pair and what against it, without a look at anything but features."""

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
    posterior,
    posterior_of_second,
    separate,
    together,
    wrong_share,
)

FOLDS, _DECOYS = 4, 3
# Rounds after the first one, in which pairs are heard as far as the round before believes them.
_ROUNDS = 2
# What nobody believes is heard a little, so that something is left to be heard.
_LEAST_WEIGHT = 1e-3


@dataclass(frozen=True)
class Testimony:
    """What the towers' own features say of `N` pairs.

    Attributes:
        score: `(N,)`; the higher, the likelier the pair is matched.
        probability: `(N,)` that it is matched.
        wrong: the share of wrong pairs.
        decoy_scale: standard deviation of the score among pairs put together at random.
    """

    score: Array
    probability: Array
    wrong: WrongShare
    decoy_scale: float


def ask_towers(images: Tensor, texts: Tensor, image: Tensor, caption: Tensor, seed: int = 0) -> Testimony:
    """Which pairs are matched, by features of two towers that were never trained on the pairs.

    Two things are asked of a pair: its place in the `Structure`, and its cosine in the `CanonicalSpace` of the other
    folds. Both are made one score by how they tell pairs from decoys; then they are asked again, with each pair heard
    as far as it is believed. The share of wrong pairs is that of the first round: there a wrong pair and a decoy are
    the same thing, while later ones are a little kinder to the pairs, whose own fold had a say in what the others
    believe.

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
    if not len(first):  # of one image, nothing can be said
        nothing = np.zeros(len(images))
        return Testimony(nothing, nothing + 1, WrongShare(0.0, 0.0), 1.0)
    share: WrongShare | None = None
    for _ in range(1 + _ROUNDS):
        cosine, decoy_cosine = canonical_cosines(images, texts, weights, decoys)
        correlation = structure.correlation(pairs, pairs, weights)
        decoy_correlation = structure.correlation(first, second, weights)
        score, decoy_score = separate(_columns(correlation, cosine), _columns(decoy_correlation, decoy_cosine))
        if share is None:
            share = wrong_share(score, decoy_score, image.cpu().numpy(), image[first].cpu().numpy())
        probability = posterior(score, decoy_score, share.value)
        weights = torch.from_numpy(probability.clip(min=_LEAST_WEIGHT)).to(weights)
    assert share is not None
    return Testimony(score, probability, share, float(decoy_score.std().clip(min=1e-12)))


def with_second(testimony: Testimony, score: Array) -> tuple[Array, Array]:
    """The probability that each pair is matched, `(N,)`, and the order within equal ones, `(N,)`, by both witnesses.

    Args:
        testimony: of the towers.
        score: `(N,)`, of a model that was trained on the pairs, such as a plan's log-density.
    """
    second = posterior_of_second(testimony.probability, score)
    probability = together(testimony.probability, second, testimony.wrong.value)
    return probability, testimony.score / testimony.decoy_scale + score / max(float(score.std()), 1e-12)


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
    # Fisher's transformation: without it the spread of a correlation shrinks towards 1.
    return torch.stack([correlation.clamp(-0.999, 0.999).atanh(), cosine], dim=1).double().cpu().numpy()
