"""The half-steps of Sinkhorn's iteration: on a stored kernel, or streamed over the cost.

A half-step makes one side of the plan `σ_ij = a_i b_j exp((f_i + g_j - C_ij)/ε)` exact: it chooses `f` so that the rows
sum to `a`, or `g` so that the columns sum to `b`. Where the kernel fits in memory, it is a matrix-vector product with
`exp((f_i + g_j - C_ij)/ε)`. Its potentials are absorbed whenever the scalings grow (Schmitzer, *Stabilized sparse
scaling algorithms for entropy regularized transport problems*, SISC 2019). Where the kernel does not fit, half-steps
stream over tiles (as in FlashSinkhorn, arXiv:2602.03067), and no `(n, m)` matrix exists.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from openclip_otco.ot.cost import Cost, tiles, workspaces
from openclip_otco.ot.group import Group
from openclip_otco.ot.sparse_plan import feasible_duals

# Scalings beyond exp(30), or sums below exp(-60), are absorbed into the potentials: float32 ends at exp(±87).
_ABSORB = 30.0
_VANISHED = math.exp(-60.0)


def soft_ctransform(cost: Cost, g: Tensor, epsilon: float, log_b: Tensor) -> Tensor:
    """`f_i = -ε log Σ_j b_j exp((g_j - C_ij)/ε)`, `(n,)`, streamed in tiles of rows.

    Args:
        cost: `(n, m)`.
        g: `(m,)` potential of the columns.
        epsilon: `ε`.
        log_b: `(m,)`, logarithms of the columns' masses; minus infinity where there is none.
    """
    bias = g / epsilon + log_b
    parts = [
        torch.logsumexp(torch.div(costs, -epsilon, out=work).add_(bias), dim=1) for _, costs, work in workspaces(cost)
    ]
    return torch.cat(parts).mul_(-epsilon)


class StreamedHalfSteps:
    """A pair of half-steps in one pass over the cost.

    Once a tile's rows are exact, its part of the plan is at hand, `σ_ij = a_i softmax_j(...)`. The column sums of the
    plan say by how much `g` has to move.

    Args:
        cost: `(n, m)`, the rows that this process holds, and all columns.
        epsilon: `ε`.
        a, b: `(n,)` and `(m,)` masses of these rows and of the columns.
        group: the processes that hold the other rows.
    """

    def __init__(self, cost: Cost, epsilon: float, a: Tensor, b: Tensor, group: Group) -> None:
        self.cost, self.epsilon, self.a, self.b, self.group = cost, epsilon, a, b, group

    def step(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """The `f`, `(n,)`, that makes these rows exact under `g`, `(m,)`, and the next `g`, from all rows."""
        f, column_sums = self._exact_rows(g)
        sums = self.group.total(column_sums)
        if bool((sums < _VANISHED * self.b).any()):
            # A column is too dear for every row, and its sum has underflowed. Its logarithm has to be summed.
            return f, self._exact_columns(f)
        return f, torch.where(self.b > 0, g - self.epsilon * (sums / self.b).log(), g)

    def _exact_rows(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """The `f`, `(n,)`, that makes these rows exact, and what these rows add to the column sums, `(m,)`."""
        parts: list[Tensor] = []
        bias = g / self.epsilon + self.b.log()
        column_sums = torch.zeros_like(g)
        for tile, costs, work in workspaces(self.cost):
            logits = torch.div(costs, -self.epsilon, out=work).add_(bias)
            top = logits.amax(dim=1)
            total = logits.sub_(top[:, None]).exp_().sum(dim=1)
            parts.append(top.add_(total.log()))
            column_sums.addmv_(logits.T, self.a[tile] / total)
        return torch.cat(parts).mul_(-self.epsilon), column_sums

    def _exact_columns(self, f: Tensor) -> Tensor:
        """The `g`, `(m,)`, that makes the columns exact, from all rows, by a sum of logarithms."""
        own_g = soft_ctransform(self.cost.transposed(), f, self.epsilon, self.a.log())
        # The processes' exp(-g/ε) are added. Divided by the greatest of them, none overflows.
        least = self.group.least(own_g)
        return least - self.epsilon * self.group.total(((least - own_g) / self.epsilon).exp()).log()


class KernelHalfSteps:
    """A pair of half-steps as two products with a stored kernel, `K_ij = exp((f_i + g_j - C_ij)/ε)`.

    The duals `f`, `g` of the kernel are feasible: no entry is above one, and every row and column has a one. Products
    with it neither overflow nor vanish, as long as the potentials stay near these duals.

    Args:
        cost: `(n, m)`, the columns that this process holds, and all rows.
        g: `(m,)`, potentials to make the first kernel's duals from.
        epsilon: `ε`.
        a, b: `(n,)` and `(m,)` masses of the rows and of these columns.
        group: the processes that hold the other columns.
    """

    def __init__(self, cost: Cost, g: Tensor, epsilon: float, a: Tensor, b: Tensor, group: Group) -> None:
        self.cost, self.epsilon, self.a, self.b, self.group = cost, epsilon, a, b, group
        self._absorb(g)

    def _absorb(self, g: Tensor, f: Tensor | None = None) -> None:
        """Makes the kernel anew, with duals made from `g`, `(m,)`; from `f`, `(n,)`, where `g` is not finite."""
        start = g if f is None or bool(g.isfinite().all()) else feasible_duals(self.cost.transposed(), f)[0]
        own_f, own_g = feasible_duals(self.cost, start)
        self.f = self.group.least(own_f)
        # The rows' duals of all processes may be lower than this one's, and its columns may then be higher.
        self.g = own_g if self.group.count == 1 else feasible_duals(self.cost.transposed(), self.f)[0]
        self.kernel = self._make_kernel()

    def _make_kernel(self) -> Tensor:
        kernel = torch.empty(self.cost.shape, dtype=self.cost.dtype, device=self.cost.device)
        # Denormal numbers are as good as zero, and would make both this and the products several times slower.
        tiny = torch.finfo(kernel.dtype).tiny
        for tile in tiles(self.cost):
            rows = torch.sub(self.cost.rows(tile), self.g, out=kernel[tile]).sub_(self.f[tile, None])
            rows.div_(-self.epsilon).clamp_(min=math.log(tiny) + 1).exp_()
            torch.threshold_(rows, 4 * tiny, 0.0)
        return kernel

    def exact_rows(self, g: Tensor) -> Tensor:
        """The `f`, `(n,)`, that makes the rows exact under `g`, `(m,)`, from which the kernel was made."""
        scaling = ((g - self.g) / self.epsilon).exp()
        sums = self.group.total(torch.mv(self.kernel, self.b * scaling))
        return self.f - self.epsilon * sums.log()

    def step(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """The `g`, `(m,)`, that makes these columns exact under `f`, `(n,)`, and the next `f`, from all columns."""
        g, next_f, safe = self._try_step(f)
        if not safe:
            # With duals made from the `g` that belongs to `f` no product is greater than `n`, and none vanishes.
            self._absorb(g, f)
            g, next_f, _ = self._try_step(f)
        return g, next_f

    def _try_step(self, f: Tensor) -> tuple[Tensor, Tensor, bool]:
        """The step, and whether its products stayed far enough from overflow and underflow in all processes."""
        weight = self.a * ((f - self.f) / self.epsilon).exp()
        column_sums = torch.mv(self.kernel.T, weight)
        unsafe = (weight.amax() > math.exp(_ABSORB)) | ~(column_sums.amin() >= _VANISHED)
        own_row_sums = torch.mv(self.kernel, self.b / column_sums)
        # The number of processes that need a new kernel is summed too: all of them have to make it together.
        sums = self.group.total(torch.cat([own_row_sums, unsafe[None].to(own_row_sums.dtype)]))
        row_sums, unsafe_count = sums[:-1], sums[-1]
        safe = bool((unsafe_count == 0) & (row_sums.amin() >= _VANISHED))
        return self.g - self.epsilon * column_sums.log(), self.f - self.epsilon * row_sums.log(), safe
