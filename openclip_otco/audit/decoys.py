"""Decoys: pairs put together at random, which show what scores wrong pairs have."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Decoys:
    """Wrong pairs made of the pairs of a window, and folds: a pair is judged by what was learned from other folds.

    Attributes:
        fold: `(N,)` int64, the fold of each pair. All pairs of one image are in one fold.
        partner: `(D, N)` int64. Decoy `(r, i)` is the image of pair `i` with the caption of pair `partner[r, i]` of the
            same fold. It is -1, for no decoy, where the caption is the same, and in a fold where one image has more
            than half of the pairs.
    """

    fold: Tensor
    partner: Tensor

    def pairs(self) -> tuple[Tensor, Tensor]:
        """The pair whose image each decoy has, and the pair whose caption it has, `(M,)` int64 each."""
        row, image = (self.partner >= 0).nonzero(as_tuple=True)
        return image, self.partner[row, image]


def draw_decoys(image: Tensor, caption: Tensor, folds: int, count: int, seed: int = 0) -> Decoys:
    """Folds of a window, and at most `count` decoys for each of its pairs.

    The image and the caption of a decoy are from the same fold. So a model of the other folds has seen neither of the
    two pairs, just as it has not seen the pair that it judges.

    Args:
        image, caption: `(N,)` int64; equal numbers are equal images, or equal captions.
        folds: number of folds.
        count: number of decoys of each pair.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    image, caption = image.cpu(), caption.cpu()
    place = torch.randperm(int(image.max()) + 1, generator=generator)[image]
    fold = place % folds
    partner = torch.full((count, len(image)), -1)
    for number in range(folds):
        # The pairs of an image lie side by side. So a shift by at least their number leads to another image.
        members = (fold == number).nonzero().flatten()
        members = members[place[members].sort(stable=True).indices]
        largest = int(torch.bincount(image[members]).max()) if len(members) else 0
        if len(members) < 2 * largest or not largest:
            continue
        shifts = torch.randint(largest, len(members) - largest + 1, (count,), generator=generator)
        for row, shift in enumerate(shifts.tolist()):
            others = members.roll(shift)
            different = caption[others] != caption[members]
            partner[row, members[different]] = others[different]
    return Decoys(fold, partner)
