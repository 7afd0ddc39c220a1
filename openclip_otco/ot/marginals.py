"""The marginals of a coupling: how much mass each row and each column holds."""

from __future__ import annotations

import torch
from torch import Tensor

from openclip_otco.ot.cost import Cost


def marginals(cost: Cost, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """Row and column masses `(n,)`, `(m,)` in float64, each summing to one; uniform where `None`.

    Args:
        cost: `(n, m)`; says how many masses there must be.
        a, b: what was given of rows, `(n,)`, and of columns, `(m,)`. Both must hold the same mass, of any size.

    Raises:
        ValueError: a wrong length, a negative or non-finite mass, no mass at all, or sums that differ by more than
            one part in a million.
    """
    checked = []
    for name, given, size in (("a", a, cost.shape[0]), ("b", b, cost.shape[1])):
        if given is None:
            checked.append(torch.full((size,), 1.0 / size, dtype=torch.float64, device=cost.device))
            continue
        mass = given.detach().to(device=cost.device, dtype=torch.float64)
        if mass.shape != (size,):
            raise ValueError(f"marginal {name} must have shape ({size},); got {tuple(mass.shape)}")
        if not bool(torch.isfinite(mass).all()) or bool((mass < 0).any()) or float(mass.sum()) <= 0:
            raise ValueError(f"marginal {name} must be finite, non-negative and not all zero")
        checked.append(mass)
    row_mass, col_mass = checked
    total_a, total_b = float(row_mass.sum()), float(col_mass.sum())
    if abs(total_a - total_b) > 1e-6 * max(total_a, total_b):
        raise ValueError(
            f"marginals a and b must hold the same mass; they sum to {total_a:.7g} and {total_b:.7g} "
            f"(divide each by its sum, in float32 or better)"
        )
    return row_mass / total_a, col_mass / total_b
