"""Hard negatives: the other pairs that most of a sample's mass goes to in a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openclip_otco.method.plan import TransportPlan
from openclip_otco.method.support import row_shares, support_confidence


@dataclass(frozen=True)
class Negative:
    """Another pair's text for an image, or image for a text: its index, its share of the mass, its cosine."""

    index: int
    share: float
    cosine: float


@dataclass(frozen=True)
class Sample:
    """A pair and its hardest negatives, the hardest first.

    Args:
        index: of the pair in the plan's support.
        share: of the image's mass that stays with its own text, in `[0, 1]`.
        confidence: the plan's, in `[0, 1]`.
        cosine: of the pair.
        texts, images: other pairs' texts that the image's mass goes to, and other images that the text's comes from.
    """

    index: int
    share: float
    confidence: float
    cosine: float
    texts: tuple[Negative, ...]
    images: tuple[Negative, ...]


def spread(plan: TransportPlan, count: int) -> list[int]:
    """`count` pairs of the support, from the least to the most confident, evenly by rank."""
    order = support_confidence(plan).argsort()
    places = torch.linspace(0, len(plan) - 1, min(count, len(plan))).round().long()
    return order[places].tolist()


def hardest_negatives(plan: TransportPlan, chosen: Sequence[int], count: int) -> list[Sample]:
    """The pairs `chosen` with `count` negatives each way; a plan has one less than it has pairs at most."""
    rows, everyone = torch.tensor(chosen, dtype=torch.long), torch.arange(len(plan))
    cosines = plan.image_features @ plan.text_features.T
    confidence = support_confidence(plan)
    ways = []
    for shares, similarity in (
        (row_shares(plan, rows, everyone), cosines[rows]),
        (row_shares(plan, everyone, rows).T, cosines[:, rows].T),
    ):
        ways.append(_hardest(shares, similarity, rows, count))
    own = row_shares(plan, rows, rows).diagonal().clamp(max=1)
    return [
        Sample(index, float(own[k]), float(confidence[index]), float(cosines[index, index]), ways[0][k], ways[1][k])
        for k, index in enumerate(chosen)
    ]


def block_of(found: Sequence[Sample], most: int) -> list[int]:
    """The pairs of a heat map around the samples: each followed by its hardest negatives, `most` in all."""
    per_sample = max(1, most // max(1, len(found)))
    indices: dict[int, None] = {}
    for sample in found:
        near = [negative.index for pair in zip(sample.texts, sample.images, strict=True) for negative in pair]
        mine = dict.fromkeys([sample.index, *near])
        indices |= dict.fromkeys([index for index in mine if index not in indices][:per_sample])
    return list(indices)[:most]


def _hardest(shares: Tensor, cosines: Tensor, own: Tensor, count: int) -> list[tuple[Negative, ...]]:
    others = shares.clone()
    others[torch.arange(len(own)), own] = -torch.inf
    best = others.topk(min(count, shares.shape[1] - 1), dim=1).indices
    return [
        tuple(Negative(int(j), float(shares[k, j]), float(cosines[k, j])) for j in line) for k, line in enumerate(best)
    ]
