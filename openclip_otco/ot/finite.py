"""Which features are finite: a NaN or an infinity in one of them would spread over a whole plan."""

from __future__ import annotations

import torch
from torch import Tensor


def finite_rows(features: Tensor) -> Tensor:
    """Which rows of `(n, d)` features hold no NaN and no infinity: `(n,)` booleans, on the same device.

    The extremes of a row show both. On a CPU they take much less time than `torch.isfinite` of every entry.
    """
    return torch.isfinite(features.amax(dim=1)) & torch.isfinite(features.amin(dim=1))
