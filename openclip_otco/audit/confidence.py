"""Confidence: how much a transport plan trusts the pairs of its window, and which captions it would choose instead."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from openclip_otco.method.plan import TransportPlan
from openclip_otco.ot.cost import CosineCost, tiles


@dataclass(frozen=True)
class PlanJudgement:
    """What a plan says of the `N` pairs that it was made of.

    Attributes:
        log_confidence: `(N,)`, at most 0; equal pairs have equal ones.
        cosine: `(N,)`, in `[-1, 1]`.
        best: `(N,)` int64. Of all captions that are not the image's own, one gets most mass from the image; this is the
            number of the first pair that has it, or -1 if there is no other caption.
    """

    log_confidence: Tensor
    cosine: Tensor
    best: Tensor


def judge_by_plan(plan: TransportPlan, images: Sequence[Hashable], captions: Sequence[Hashable]) -> PlanJudgement:
    """The confidence of the pairs that `plan` was made of (method, section 3).

    `TransportPlan.confidence` is for other pairs, beside those of the plan. Here the plan's own entries are used: the
    confidence of a pair is its share of its row times its share of its column.

    Copies count once. Pairs with the same image are one row, and pairs with the same caption are one column; their
    masses are added. All captions of an image are its own: they take no mass from each other. The same goes for all
    images of a caption. Let `m` be the mass of the image on the caption, `k` the number of copies of the pair, `n` the
    number of pairs with the image, and `o` the mass of the image on captions that are not its own. Then the pair's
    share of its row is `(m/k) / (m/k + o/n)`. Its share of the column is made in the same way. Without copies, both are
    the shares of the entry.

    Args:
        plan: made of the pairs' features; row `i` of both is pair `i`.
        images: a value for the image of each pair, `N` of them; equal values are equal images.
        captions: a value for the caption of each pair, `N` of them.
    """
    device = plan.f.device
    image, first_image = groups(images, device)
    caption, first_caption = groups(captions, device)
    width = len(first_caption)
    pairs, pair = torch.unique(image * width + caption, return_inverse=True)
    row, column = pairs // width, pairs % width
    copies = torch.bincount(pair).log()
    rows, columns = torch.bincount(image).float(), torch.bincount(caption).float()

    log_n = math.log(len(plan))
    f, g = plan.f[first_image], plan.g[first_caption]
    cost = CosineCost(plan.image_features[first_image], plan.text_features[first_caption], check_finite=False)
    foreign_row, foreign_column = torch.zeros_like(f), torch.zeros_like(g)
    best = torch.empty_like(first_image)
    for tile in tiles(cost):
        # N times the mass of one copy of each image and caption. It is about 1 at most, so that nothing overflows.
        log_mass = ((f[tile, None] + g - cost.rows(tile)) / plan.epsilon).sub_(log_n)
        here = (row >= tile.start) & (row < tile.stop)
        log_mass[row[here] - tile.start, column[here]] = -torch.inf
        highest, best[tile] = log_mass.max(dim=1)
        best[tile] = torch.where(highest > -torch.inf, first_caption[best[tile]], -1)
        mass = log_mass.exp_()
        foreign_row[tile] = mass @ columns
        foreign_column += rows[tile] @ mass

    own = (f[row] + g[column] - cost.entries(row, column)) / plan.epsilon - log_n
    own += rows[row].log() + columns[column].log() - copies
    log_confidence = F.logsigmoid(own - foreign_row[row].log()) + F.logsigmoid(own - foreign_column[column].log())
    cosine = (plan.image_features * plan.text_features).sum(dim=1).clamp(-1, 1)
    return PlanJudgement(log_confidence[pair], cosine, best[image])


def groups(things: Sequence[Hashable], device: torch.device) -> tuple[Tensor, Tensor]:
    """Groups equal things: the number of each thing's group, `(N,)`, and the place of each group's first thing."""
    numbers: dict[Hashable, int] = {}
    group = [numbers.setdefault(thing, len(numbers)) for thing in things]
    first = {number: index for index, number in reversed(list(enumerate(group)))}
    return torch.tensor(group, device=device), torch.tensor([first[n] for n in range(len(first))], device=device)
