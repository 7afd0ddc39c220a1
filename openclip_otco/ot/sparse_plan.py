"""A transport plan with few entries, which the combinatorial and the exact solver make."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from openclip_otco.ot.cost import Cost, workspaces


@dataclass(frozen=True)
class SparsePlan:
    """A coupling as its non-zero entries, with duals that prove how good it is.

    Attributes:
        rows, cols: `(k,)` int64, where the mass lies.
        mass: `(k,)` float64, how much; row sums are `a`, column sums are `b`.
        value: `<σ, C>`.
        f, g: `(n,)` and `(m,)` duals, feasible: `f_i + g_j <= C_ij`.
        bound: `<a, f> + <b, g>`; no coupling has a lower value.
        additive_error: the proven gap as a share of the cost's range, `(value - bound) / (max C - min C)`.
        shape: `(n, m)`.
        rounds: of bidding; 0 for other solvers.
    """

    rows: Tensor
    cols: Tensor
    mass: Tensor
    value: float
    f: Tensor
    g: Tensor
    bound: float
    additive_error: float
    shape: tuple[int, int]
    rounds: int = 0

    def dense(self) -> Tensor:
        """The plan as an `(n, m)` float64 matrix."""
        matrix = torch.zeros(self.shape, dtype=torch.float64, device=self.mass.device)
        return matrix.index_put_((self.rows, self.cols), self.mass, accumulate=True)


def feasible_duals(cost: Cost, g: Tensor) -> tuple[Tensor, Tensor]:
    """`f_i = min_j (C_ij - g_j)`, `(n,)`, and then `g_j = min_i (C_ij - f_i)`, `(m,)`, in one pass over the cost.

    The two c-transforms make feasible duals of any `g`: `f_i + g_j <= C_ij`, with equality somewhere in each column.
    """
    rows, columns = [], torch.full_like(g, torch.inf)
    for _, costs, work in workspaces(cost):
        least = torch.sub(costs, g, out=work).amin(dim=1)
        columns = torch.minimum(columns, torch.sub(costs, least[:, None], out=work).amin(dim=0))
        rows.append(least)
    return torch.cat(rows), columns


def certified(
    cost: Cost,
    a: Tensor,
    b: Tensor,
    rows: Tensor,
    cols: Tensor,
    mass: Tensor,
    g: Tensor,
    spread: float,
    rounds: int = 0,
) -> SparsePlan:
    """The plan with feasible duals, made from `g`, `(m,)`, and with the error that they prove.

    The proof does not use the solver's bookkeeping. Both values are summed in float64, so rounding does not spoil it.

    Args:
        cost: `(n, m)`.
        a, b: `(n,)` and `(m,)` float64 marginals.
        rows, cols, mass: `(k,)`, the plan's entries.
        g: `(m,)`, duals that need not be feasible.
        spread: the cost's range; 0 for a constant cost.
        rounds: of bidding.
    """
    f, g = feasible_duals(cost, g.to(cost.dtype))
    value = float(mass @ cost.entries(rows, cols).double())
    bound = float(a @ f.double() + b @ g.double())
    error = max(0.0, value - bound) / spread if spread else 0.0
    return SparsePlan(rows, cols, mass, value, f, g, bound, error, cost.shape, rounds)
