"""Weights: how much each pair counts in the loss, and how much each negative counts against a pair."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# What the weights of negatives are made of: the newest plan's density, or the similarity alone, to compare with.
NEGATIVES = ("plan", "similarity", "none")
# Steps of the grid of powers that tempering chooses from.
_POWERS = 64


def log_negative_weights(similarity: Tensor, own: Tensor, power: float, potential: Tensor | None = None) -> Tensor:
    """`log w_ij` of the negatives of each row, mean of `w` over them 1; 0 at the own pair. `(R, C)`, without gradient.

    `w_ij ∝ r_ij^β`, where `r = dσ/d(a⊗b)` is a plan's density (method, section 4). In the rows of images
    `r_ij = exp((f_i + g_j - C_ij)/ε)`; whatever a row has in common cancels, so that `g` alone is asked for, and in the
    rows of texts `f` alone. Without potentials this is the weight of hard negatives by similarity (Robinson, Chuang,
    Sra, Jegelka, *Contrastive Learning with Hard Negative Samples*, ICLR 2021, equation 4; for image and text:
    Radenovic et al., *Filtering, Distillation, and Hard Negatives for Vision-Language Pre-Training*, CVPR 2023).

    Added to the logits of InfoNCE, it makes the denominator `e^(s_ii) + Σ_j w_ij e^(s_ij)`.

    Args:
        similarity: `(R, C)` cosines of the rows with what they are compared with.
        own: `(R,)` column of each row's own pair.
        power: `β/ε >= 0`, per unit of the cosine.
        potential: `(C,)` potentials of the columns in a plan, in units of the cost; none counts as zero.
    """
    rows, columns = similarity.shape
    if columns < 2:
        return similarity.new_zeros(rows, columns)
    with torch.no_grad():
        # Not in half precision, of which a power of 20 would magnify the rounding.
        weights = power * similarity.float()
        if potential is not None:
            weights += power * potential
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
    return weights[best], shares[best]
