"""A transport plan with few entries: the result of the combinatorial and of the exact solver."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from openclip_otco.ot.cost import Cost, cost_range, rows_per_tile, tiles


@dataclass(frozen=True)
class SparsePlan:
    """A coupling as its non-zero entries, with duals that prove how good it is.

    Attributes:
        rows, cols: `(k,)` int64, where the mass lies.
        mass: `(k,)` float64, how much; row sums are `a`, column sums are `b`.
        value: `<σ, C>`.
        f, g: `(n,)` and `(m,)` duals, feasible: `f_i + g_j <= C_ij`.
        bound: `<a, f> + <b, g>`, which no coupling can go below.
        additive_error: the proven gap as a share of the cost's range, `(value - bound) / (max C - min C)`.
        shape: `(n, m)`.
        rounds: passes of the solver over its free rows; 0 where that has no meaning.
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


def hard_ctransform(cost: Cost, g: Tensor) -> Tensor:
    """`f_i = min_j (C_ij - g_j)`, `(n,)`: the greatest `f` that is feasible beside `g`, `(m,)`."""
    return torch.cat([cost.rows(tile).sub_(g).amin(dim=1) for tile in tiles(cost)])


def entries_of(cost: Cost, rows: Tensor, cols: Tensor) -> Tensor:
    """`C[rows, cols]`, `(k,)`, a tile of rows at a time."""
    step = rows_per_tile(cost)
    parts = [
        cost.rows(chunk).gather(1, cols[start : start + step, None]).squeeze(1)
        for start, chunk in ((s, rows[s : s + step]) for s in range(0, len(rows), step))
    ]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=cost.dtype, device=cost.device)


def certified(
    cost: Cost, a: Tensor, b: Tensor, rows: Tensor, cols: Tensor, mass: Tensor, g: Tensor, rounds: int = 0
) -> SparsePlan:
    """The plan together with feasible duals grown from `g`, `(m,)`, and the gap that they prove.

    Two c-transforms make any `g` feasible and as great as it can be, so the proof does not rest on the solver's own
    bookkeeping, and neither does it on rounding: both sides are summed in float64.
    """
    f = hard_ctransform(cost, g.to(cost.dtype))
    g = hard_ctransform(cost.transposed(), f)
    value = float(mass @ entries_of(cost, rows, cols).double())
    bound = float(a @ f.double() + b @ g.double())
    low, high = cost_range(cost)
    error = max(0.0, value - bound) / (high - low) if high > low else 0.0
    return SparsePlan(rows, cols, mass, value, f, g, bound, error, cost.shape, rounds)
