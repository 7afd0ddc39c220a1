"""Hard negatives: the other pairs to which a plan moves most of a sample's mass."""

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
        texts: other pairs' texts, to which the image's mass goes.
        images: other pairs' images, from which the text's mass comes.
    """

    index: int
    share: float
    confidence: float
    cosine: float
    texts: tuple[Negative, ...]
    images: tuple[Negative, ...]


def evenly_by_confidence(plan: TransportPlan, count: int) -> list[int]:
    """Indices of `count` pairs of the support of `plan`, from the least to the most confident, evenly by rank."""
    order = support_confidence(plan).argsort()
    places = torch.linspace(0, len(plan) - 1, min(count, len(plan))).round().long()
    return order[places].tolist()


def hardest_negatives(plan: TransportPlan, chosen: Sequence[int], count: int) -> list[Sample]:
    """The pairs `chosen`, each with its `count` hardest negatives each way, or with all where there are fewer.

    `chosen` are indices into the support of `plan`. Hardest are the others that get most of the pair's mass.
    """
    indices, everyone = torch.tensor(chosen, dtype=torch.long), torch.arange(len(plan))
    cosines = plan.image_features @ plan.text_features.T
    confidence = support_confidence(plan)
    texts = _hardest(row_shares(plan, indices, everyone), cosines[indices], indices, count)
    images = _hardest(row_shares(plan, everyone, indices).T, cosines[:, indices].T, indices, count)
    own_share = row_shares(plan, indices, indices).diagonal().clamp(max=1)
    return [
        Sample(index, float(own_share[k]), float(confidence[index]), float(cosines[index, index]), texts[k], images[k])
        for k, index in enumerate(chosen)
    ]


def heat_map_pairs(samples: Sequence[Sample], most: int) -> list[int]:
    """Indices of the pairs of a heat map: each sample, followed by its hardest negatives, `most` in all."""
    per_sample = max(1, most // max(1, len(samples)))
    indices: dict[int, None] = {}
    for sample in samples:
        negatives = [negative.index for both in zip(sample.texts, sample.images, strict=True) for negative in both]
        candidates = dict.fromkeys([sample.index, *negatives])
        indices |= dict.fromkeys([index for index in candidates if index not in indices][:per_sample])
    return list(indices)[:most]


def _hardest(shares: Tensor, cosines: Tensor, own: Tensor, count: int) -> list[tuple[Negative, ...]]:
    """For each row of `shares` and `cosines`, `(k, N)`, the columns with the greatest shares, but for the own one."""
    others = shares.clone()
    others[torch.arange(len(own)), own] = -torch.inf
    best = others.topk(min(count, shares.shape[1] - 1), dim=1).indices
    return [
        tuple(Negative(int(j), float(shares[k, j]), float(cosines[k, j])) for j in line) for k, line in enumerate(best)
    ]
