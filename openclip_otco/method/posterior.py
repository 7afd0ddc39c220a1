"""Which pairs of a batch are matched: a mixture of the plan and of the product of its marginals."""

from __future__ import annotations

import torch
from torch import Tensor

# The interval that holds the share is cut into 32 parts, 6 times: as fine as 30 halvings, in a third of the operations.
_PARTS = 32
_CUTS = 6
# A greater ratio of densities would hardly change the result, and its exponential could overflow.
_LARGEST_LOG_RATIO = 60.0


def matched_share(log_ratio: Tensor) -> Tensor:
    """Share `π` of matched pairs, a scalar in `[0, 1]`, by maximum likelihood.

    Two groups (Efron, *Microarrays, empirical Bayes and the two-groups model*, Statistical Science 23, 2008): a share
    `π` of the pairs comes from a density that is `r = exp(log_ratio)` times that of pairs put together at random; the
    rest was put together at random. The likelihood `Π_i (π r_i + 1 - π)` is log-concave in `π`.

    Args:
        log_ratio: `(n,)`, such as a plan's `log dσ/d(a⊗b)` at each pair.
    """
    # In float64: near the ends the derivative is a difference of large sums.
    ratio = log_ratio.double().clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO).exp()
    parts = torch.arange(_PARTS, device=ratio.device, dtype=ratio.dtype) / _PARTS
    low, width = torch.zeros_like(ratio[0]), 1.0
    for _ in range(_CUTS):
        shares = low + width * parts
        slopes = ((ratio - 1) / (1 + shares[:, None] * (ratio - 1))).sum(dim=1)
        # The slope falls: the share lies in the last part that begins with a positive one. Indexing makes a GPU wait.
        width /= _PARTS
        low = low + width * (slopes > 0).sum().sub(1).clamp(min=0)
    share = low + width / 2
    # At the ends the derivative need not vanish.
    share = torch.where((1 - 1 / ratio).sum() >= 0, torch.ones_like(share), share)
    share = torch.where((ratio - 1).sum() <= 0, torch.zeros_like(share), share)
    return share.to(log_ratio.dtype)


def log_posterior(log_ratio: Tensor, share: Tensor) -> Tensor:
    """`log( r_i / (π r_i + 1 - π) )`, `(n,)`: the log-probability that a pair is matched, less the constant `log π`.

    Without this constant the value is also finite for `π = 0`, and then gives only the order of the pairs. With
    `π = 1` all values are 0.

    Args:
        log_ratio: `(n,)`, as in `matched_share`.
        share: `π`, a scalar.
    """
    return log_ratio - torch.logaddexp(share.log() + log_ratio, torch.log1p(-share))
