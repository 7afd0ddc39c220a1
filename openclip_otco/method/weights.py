"""Weights: how much each pair counts in the loss, and how much each negative counts against a pair."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# What decides the weights of negatives. `price`: their similarity and the newest plan's prices. For comparison only:
# `plan`, the plan's density, and `similarity`, the similarity alone. `none`: all weights are 1.
NEGATIVES = ("price", "plan", "similarity", "none")
# Steps of the grid of powers that tempering chooses from.
_POWERS = 64


def log_negative_weights(similarity: Tensor, own: Tensor, power: float, bonus: Tensor | None = None) -> Tensor:
    """`log w_ij`, `(R, C)`, without gradient. Over a row's negatives, `w` has mean 1; at the own pair, `log w` is 0.

    `w_ij ∝ exp(β/ε · (v_i·t_j + p_j))` in the rows of images, and the same with images and texts exchanged in those of
    texts. `p` is one of:

    - prices of a plan, `p_j = η q_j (mean(g) - g_j)`; `q_j` is the probability that the pair of text `j` is matched. A
      text that is near to many images is a hub: a search for the right text often finds the hub instead. In a plan each
      text takes the same mass, so a hub must have a high price. Hubs get greater weights (as in Liu, Ye, Wang, Li,
      *HAL: Improved Text-Image Matching by Mitigating Visual Semantic Hubs*, AAAI 2020, which finds hubs by their
      similarities).
    - the plan's potentials, `p = g`. Then `w_ij ∝ r_ij^β`, where `r = dσ/d(a⊗b)` is the plan's density: a factor that
      a whole row shares cancels. Hubs get smaller weights.
    - nothing: hard negatives by similarity (Robinson, Chuang, Sra, Jegelka, *Contrastive Learning with Hard Negative
      Samples*, ICLR 2021, equation 4; for image and text: Radenovic et al., *Filtering, Distillation, and Hard
      Negatives for Vision-Language Pre-Training*, CVPR 2023).

    If `log w` is added to the logits of InfoNCE, the denominator is `e^(s_ii) + Σ_{j≠i} w_ij e^(s_ij)`.

    Args:
        similarity: `(R, C)` cosines of the rows with what they are compared with.
        own: `(R,)` column of each row's own pair.
        power: `β/ε >= 0`, per unit of the cosine.
        bonus: `p`, `(C,)`, of the columns, in units of the cost; `None` counts as zero.
    """
    rows, columns = similarity.shape
    if columns < 2:
        return similarity.new_zeros(rows, columns)
    with torch.no_grad():
        # In float32: in half precision a power of 20 would be rounded once more.
        weights = power * similarity.float()
        if bonus is not None:
            weights += power * bonus
        log_weights = weights.scatter_(1, own[:, None], -torch.inf).log_softmax(dim=1).add_(math.log(columns - 1))
        return log_weights.scatter_(1, own[:, None], 0.0)


def tempered(log_trust: Tensor, power: float, least_share: float) -> tuple[Tensor, Tensor]:
    """Weights `c ∝ exp(γ' · log_trust)`, `(n,)`, mean 1, and their effective share `(Σc)²/(n Σc²)`.

    `γ'` is the largest power up to `power` whose effective share is at least `least_share`: the choice of a tempering
    exponent by effective sample size (Jasra, Stephens, Doucet, Tsagaris, *Inference for Lévy-driven stochastic
    volatility models via adaptive sequential Monte Carlo*, Scandinavian Journal of Statistics 38, 2011), on a grid.
    """
    if not least_share:
        weights = torch.softmax(power * log_trust, dim=0) * len(log_trust)
        return weights, weights.square().mean().reciprocal()
    powers = power * torch.linspace(0, 1, _POWERS + 1, device=log_trust.device, dtype=log_trust.dtype)
    weights = torch.softmax(powers[:, None] * log_trust, dim=1) * len(log_trust)
    shares = weights.square().mean(dim=1).reciprocal()
    # At power 0 the share is 1, so that one of them always qualifies.
    best = torch.arange(len(powers), device=shares.device).where(shares >= least_share, 0).amax()
    # An index that is a tensor of no dimension would make a GPU wait.
    best = best[None]
    return weights.index_select(0, best)[0], shares.index_select(0, best)[0]
