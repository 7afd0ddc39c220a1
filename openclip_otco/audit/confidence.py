"""How far the plan of a window trusts each of the window's own pairs, and what it would pair instead."""

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
class Judgement:
    """What a plan says about the `N` pairs that it couples.

    Attributes:
        log_confidence: `(N,)`, at most 0; equal for pairs of equal image and caption.
        cosine: `(N,)`, in `[-1, 1]`.
        best: `(N,)`, the first pair with the caption to which the plan gives the image most mass, of all captions that
            are not the image's own; -1 where there is no other.
    """

    log_confidence: Tensor
    cosine: Tensor
    best: Tensor


def judge(plan: TransportPlan, images: Sequence[Hashable], captions: Sequence[Hashable]) -> Judgement:
    """The confidence of the pairs in the support of `plan`, each counted once (method, section 3).

    `TransportPlan.confidence` asks how a pair would fare *beside* the support; a pair of the support would there meet
    itself. Here the plan's own entries are used. Copies are one: pairs with the same image are one row, and pairs with
    the same caption one column, whose masses are the sums of theirs. All captions given to an image are its own, and
    none takes anything from another; the same goes for images with the same caption. So with `m` the mass of image and
    caption, `k` the copies of the pair, `n` those of the image, and `o` the mass of the image on captions that are not
    its own, the pair's share of its row is `(m/k) / (m/k + o/n)`: own and foreign mass, each by what could have been
    there. The share of the column is made alike, and confidence is the product of both. Without copies these are the
    entry's shares of its row and its column.

    Args:
        plan: made of the pairs' features; row `i` of both is pair `i`.
        images: what tells the images of the pairs apart, `N` of them.
        captions: what tells the captions apart, `N` of them.
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
    return Judgement(log_confidence[pair], cosine, best[image])


def groups(things: Sequence[Hashable], device: torch.device) -> tuple[Tensor, Tensor]:
    """Which group of equal things each is in, `(N,)`, groups numbered as they come; and where each comes first."""
    numbers: dict[Hashable, int] = {}
    group = [numbers.setdefault(thing, len(numbers)) for thing in things]
    first = {number: index for index, number in reversed(list(enumerate(group)))}
    return torch.tensor(group, device=device), torch.tensor([first[n] for n in range(len(first))], device=device)
