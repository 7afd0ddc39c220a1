"""LEMoN, to compare with: label errors by multimodal neighbours (Zhang et al., *LEMoN*, ICML 2025).

`score = d(v, t) + β s_n + γ s_m` is higher for pairs that are likelier wrong; `d` is the cosine distance:
`s_n = 1/k Σ_j d(t, t_j) exp(-τ1 d(v, v_j)) exp(-τ2 d(v_j, t_j))` over the `k` nearest images `v_j` of `v`, and `s_m`
the same with images and captions exchanged. The constants are the paper's fixed setting, as tuning them would need a
list of wrong pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBOURS, BETA, GAMMA, TAU_1, TAU_2 = 30, 5.0, 5.0, 0.1, 5.0


def lemon(v: Tensor, t: Tensor, image: Tensor, caption: Tensor) -> Tensor:
    """How likely each of `N` pairs is wrong, `(N,)`, in no unit.

    Args:
        v, t: `(N, d)` unit-norm features; row `i` of both is pair `i`.
        image, caption: `(N,)` int64; pairs of the same image or the same caption are no neighbours.
    """
    own = 1 - (v * t).sum(dim=1)
    return own + BETA * _neighbours(v, t, own, image, caption) + GAMMA * _neighbours(t, v, own, image, caption)


def _neighbours(near: Tensor, compared: Tensor, own: Tensor, image: Tensor, caption: Tensor) -> Tensor:
    found = []
    for rows in torch.arange(len(near)).split(1024):
        distance = 1 - near[rows] @ near.T
        same = (image[rows, None] == image) | (caption[rows, None] == caption)
        to_near, index = distance.masked_fill(same, torch.inf).topk(min(NEIGHBOURS, len(near)), largest=False)
        between = 1 - (compared[rows, None] * compared[index]).sum(dim=2)
        found.append((between * (-TAU_1 * to_near).exp() * (-TAU_2 * own[index]).exp()).mean(dim=1))
    return torch.cat(found)
