"""Entropic optimal transport by Sinkhorn's iteration, in a form that does not overflow.

Cuturi, *Sinkhorn distances*, NeurIPS 2013. The plan is `σ_ij = a_i b_j exp((f_i + g_j - C_ij)/ε)`, the minimiser of
`<σ, C> + ε KL(σ | a ⊗ b)` over the couplings of `a` and `b`. Where the kernel fits in memory the iterations are matrix-
vector products with `exp((f_i + g_j - C_ij)/ε)`, whose potentials are absorbed whenever the scalings grow (Schmitzer,
*Stabilized sparse scaling algorithms for entropy regularized transport problems*, SISC 2019); where it does not, they
stream over tiles (as in FlashSinkhorn, arXiv:2602.03067), and no `(n, m)` matrix exists. Either way Anderson
acceleration takes the place of most iterations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openclip_otco.ot.anderson import Anderson
from openclip_otco.ot.cost import Cost, CostLike, DenseCost, as_cost, full_precision, held, tiles, workspaces
from openclip_otco.ot.defaults import EPSILON
from openclip_otco.ot.group import ALONE, Group
from openclip_otco.ot.marginals import marginals
from openclip_otco.ot.sparse_plan import SparsePlan, feasible_duals

# Scalings beyond exp(30), or sums below exp(-60), are absorbed into the potentials: float32 ends at exp(±87).
_ABSORB = 30.0
_VANISHED = math.exp(-60.0)

Potentials = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class SinkhornResult:
    """Potentials of the entropic plan, and how well they solve it.

    Attributes:
        f, g: `(n,)` and `(m,)`, in units of the cost.
        iterations: pairs of half-steps taken.
        marginal_error: L1 distance of the row sums from `a`, as measured; the column sums are `b` to rounding.
        converged: whether `marginal_error <= tol`.
        value: `<σ, C> + ε KL(σ | a ⊗ b)`, by the dual.
        epsilon: `ε`, in units of the cost.
    """

    f: Tensor
    g: Tensor
    iterations: int
    marginal_error: float
    converged: bool
    value: float
    epsilon: float


@full_precision
def sinkhorn(
    cost: CostLike,
    epsilon: float = EPSILON,
    a: Tensor | None = None,
    b: Tensor | None = None,
    init: SparsePlan | SinkhornResult | Potentials | None = None,
    tol: float = 1e-3,
    max_iterations: int = 2000,
    group: Group = ALONE,
) -> SinkhornResult:
    """The entropic plan's potentials.

    Args:
        cost: `(n, m)` matrix or lazy cost.
        epsilon: `ε > 0`, in units of the cost.
        a, b: `(n,)` and `(m,)` masses; uniform where `None`.
        init: where to start: a plan, an earlier result, or potentials `(f, g)`; zero where `None`. Only `g` is used,
            as the first half-step makes `f` from it.
        tol: L1 error of the row marginal at which to stop.
        max_iterations: at most this many pairs of half-steps; the result says whether it converged.
        group: the processes that solve this together. Each calls with the same arguments, takes its share of the
            columns, and gets the same result.

    Raises:
        ValueError: `ε`, `tol` or `max_iterations` not positive; potentials of the wrong length or not finite; bad
            marginals or cost.
    """
    return group.attempt(lambda: _sinkhorn(cost, epsilon, a, b, init, tol, max_iterations, group))


def _sinkhorn(
    cost: CostLike,
    epsilon: float,
    a: Tensor | None,
    b: Tensor | None,
    init: SparsePlan | SinkhornResult | Potentials | None,
    tol: float,
    max_iterations: int,
    group: Group,
) -> SinkhornResult:
    if not 0 < epsilon < math.inf or not tol > 0 or max_iterations < 1:
        raise ValueError(
            f"epsilon (finite) and tol must be positive and max_iterations at least 1; "
            f"got {epsilon}, {tol} and {max_iterations}"
        )
    cost = as_cost(cost)
    row_mass, col_mass = (mass.to(cost.dtype) for mass in marginals(cost, a, b))
    g = _start(cost, init)
    held_rows, held_cols = (torch.nonzero(mass).squeeze(1) for mass in (row_mass, col_mass))
    if (len(held_rows), len(held_cols)) == cost.shape:
        f, g, error, iterations = _solve(cost, g, epsilon, row_mass, col_mass, tol, max_iterations, group)
    else:
        # What holds no mass takes no part. Its potentials follow from the others'.
        part, part_mass = cost.restricted(held_rows, held_cols), (row_mass[held_rows], col_mass[held_cols])
        f_held, g_held, error, iterations = _solve(part, g[held_cols], epsilon, *part_mass, tol, max_iterations, group)
        f = soft_ctransform(cost, torch.zeros_like(g).index_copy_(0, held_cols, g_held), epsilon, col_mass.log())
        f.index_copy_(0, held_rows, f_held)
        g = soft_ctransform(cost.transposed(), f, epsilon, row_mass.log()).index_copy_(0, held_cols, g_held)
    # The last half-step made the columns exact, so the plan's mass is one and the dual has no third term.
    value = float(row_mass.double() @ f.double() + col_mass.double() @ g.double())
    return SinkhornResult(f, g, iterations, error, error <= tol, value, epsilon)


def soft_ctransform(cost: Cost, g: Tensor, epsilon: float, log_b: Tensor) -> Tensor:
    """`f_i = -ε log Σ_j b_j exp((g_j - C_ij)/ε)`, `(n,)`, streamed in tiles of rows."""
    bias = g / epsilon + log_b
    parts = [
        torch.logsumexp(torch.div(costs, -epsilon, out=work).add_(bias), dim=1) for _, costs, work in workspaces(cost)
    ]
    return torch.cat(parts).mul_(-epsilon)


@full_precision
def nearest_potentials(
    cost: CostLike,
    candidates: Sequence[Tensor],
    epsilon: float,
    a: Tensor | None = None,
    b: Tensor | None = None,
    group: Group = ALONE,
) -> int:
    """Which of the candidate `g`, each `(m,)`, is nearest to the solution: the index of the one whose plan, after one
    half-step, has the smallest L1 error of its column marginal."""
    return group.attempt(lambda: _nearest_potentials(as_cost(cost), candidates, epsilon, a, b, group))


def _nearest_potentials(
    cost: Cost, candidates: Sequence[Tensor], epsilon: float, a: Tensor | None, b: Tensor | None, group: Group
) -> int:
    if not candidates or any(g.shape != (cost.shape[1],) for g in candidates):
        raise ValueError(
            f"candidates must be at least one potential of shape ({cost.shape[1]},); "
            f"got {[tuple(g.shape) for g in candidates]}"
        )
    row_mass, col_mass = (mass.to(cost.dtype) for mass in marginals(cost, a, b))
    mine = group.part(cost.shape[0])
    part = _Stream(cost.restricted(mine, slice(None)), epsilon, row_mass[mine], col_mass, group)
    errors = []
    for g in candidates:
        _, next_g = part.step(g)
        error = _marginal_error(col_mass, g, next_g, epsilon)
        errors.append(math.inf if math.isnan(error) else error)
    return min(range(len(errors)), key=errors.__getitem__)


def _start(cost: Cost, init: SparsePlan | SinkhornResult | Potentials | None) -> Tensor:
    n, m = cost.shape
    if init is None:
        return torch.zeros(m, dtype=cost.dtype, device=cost.device)
    f, g = init if isinstance(init, tuple) else (init.f, init.g)
    if f.shape != (n,) or g.shape != (m,) or not bool(torch.isfinite(g).all()):
        raise ValueError(
            f"init must hold finite potentials of shapes ({n},) and ({m},); got {tuple(f.shape)} and {tuple(g.shape)}"
        )
    return g.detach().to(device=cost.device, dtype=cost.dtype)


def _solve(
    cost: Cost, g: Tensor, epsilon: float, a: Tensor, b: Tensor, tol: float, max_iterations: int, group: Group
) -> tuple[Tensor, Tensor, float, int]:
    """Potentials with exact columns, their row error and the iterations taken, from `g`; all masses are positive."""
    if group.count > min(cost.shape):
        group = ALONE  # there is not a row and a column for each of them
    mine = group.part(cost.shape[1])
    part = held(cost.restricted(slice(None), mine) if group.count > 1 else cost)
    half_steps: _Kernel | _Stream
    if isinstance(part, DenseCost):
        half_steps = _Kernel(part, g[mine], epsilon, a, b[mine], group)
        f = half_steps.rows(g[mine])
    else:
        half_steps = _Stream(part.transposed(), epsilon, b[mine], a, group)
        some = cost.restricted(group.part(cost.shape[0]), slice(None))
        f = group.joined(soft_ctransform(some, g, epsilon, b.log()), cost.shape[0])
    acceleration = Anderson(a)
    best = f, g[mine], math.inf
    iterations = 0
    while best[2] > tol and iterations < max_iterations:
        g_mine, next_f = half_steps.step(f)
        iterations += 1
        error = _marginal_error(a, f, next_f, epsilon)
        if error < best[2] or iterations == 1:
            best = f, g_mine, error
        f = acceleration.next(f, next_f, error)
    return best[0], group.joined(best[1], cost.shape[1]), best[2], iterations


def _marginal_error(mass: Tensor, potential: Tensor, exact: Tensor, epsilon: float) -> float:
    """L1 distance from `mass` of the marginal under `potential`, where `exact` would meet it."""
    excess = torch.expm1((potential - exact) / epsilon).abs()
    return float(torch.where(mass > 0, mass * excess, 0.0).sum())


class _Stream:
    """Half-steps in one pass over the cost, of which this process holds some rows, `(n, m)`, and their masses `a`.

    Once a tile's rows are exact its plan is at hand, `σ_ij = a_i softmax_j(...)`, and the column sums of the plan say
    by how much `g` has to move.
    """

    def __init__(self, cost: Cost, epsilon: float, a: Tensor, b: Tensor, group: Group) -> None:
        self.cost, self.epsilon, self.a, self.b, self.group = cost, epsilon, a, b, group

    def step(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """The `f`, `(n,)`, that makes these rows exact beside `g`, `(m,)`, and the next `g` from all rows."""
        f, column_sums = self._half_step(g)
        sums = self.group.total(column_sums)
        if bool((sums < _VANISHED * self.b).any()):
            # A column too dear for every row: its sum has underflowed, and only a logarithm of its own can tell.
            return f, self._log_domain(f, g)
        return f, torch.where(self.b > 0, g - self.epsilon * (sums / self.b).log(), g)

    def _half_step(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """The `f`, `(n,)`, that makes these rows exact, and what these rows add to the column sums, `(m,)`."""
        parts: list[Tensor] = []
        bias = g / self.epsilon + self.b.log()
        column = torch.zeros_like(g)
        for tile, costs, work in workspaces(self.cost):
            logits = torch.div(costs, -self.epsilon, out=work).add_(bias)
            top = logits.amax(dim=1)
            total = logits.sub_(top[:, None]).exp_().sum(dim=1)
            parts.append(top.add_(total.log()))
            column.addmv_(logits.T, self.a[tile] / total)
        return torch.cat(parts).mul_(-self.epsilon), column

    def _log_domain(self, f: Tensor, g: Tensor) -> Tensor:
        mine = soft_ctransform(self.cost.transposed(), f, self.epsilon, self.a.log())
        # exp(-g/ε) adds up over the processes; about the least of them nothing overflows.
        least = self.group.least(mine)
        return least - self.epsilon * self.group.total(((least - mine) / self.epsilon).exp()).log()


class _Kernel:
    """`K_ij = exp((f_i + g_j - C_ij)/ε)` about feasible duals `f`, `g`: none of it above one, no row or column without
    a one, so that products with it neither overflow nor vanish as long as potentials stay near. This process holds some
    columns, `(n, m)`, and their masses `b`."""

    def __init__(self, cost: Cost, g: Tensor, epsilon: float, a: Tensor, b: Tensor, group: Group) -> None:
        self.cost, self.epsilon, self.a, self.b, self.group = cost, epsilon, a, b, group
        self._centre(g)

    def _centre(self, g: Tensor, f: Tensor | None = None) -> None:
        """Makes the kernel about duals that are grown from `g`; where that is not finite, from `f`."""
        start = g if f is None or bool(g.isfinite().all()) else feasible_duals(self.cost.transposed(), f)[0]
        own_f, own_g = feasible_duals(self.cost, start)
        self.f = self.group.least(own_f)
        # Beside the duals of all processes' rows this one's columns may have to be lower.
        self.g = own_g if self.group.count == 1 else feasible_duals(self.cost.transposed(), self.f)[0]
        self.kernel = self._filled()

    def _filled(self) -> Tensor:
        matrix = torch.empty(self.cost.shape, dtype=self.cost.dtype, device=self.cost.device)
        # Denormal numbers are as good as zero, and would make both this and the products several times slower.
        tiny = torch.finfo(matrix.dtype).tiny
        for tile in tiles(self.cost):
            kernel = torch.sub(self.cost.rows(tile), self.g, out=matrix[tile]).sub_(self.f[tile, None])
            kernel.div_(-self.epsilon).clamp_(min=math.log(tiny) + 1).exp_()
            torch.threshold_(kernel, 4 * tiny, 0.0)
        return matrix

    def rows(self, g: Tensor) -> Tensor:
        """The `f`, `(n,)`, that makes the rows exact beside `g`, `(m,)`, about which the kernel was made."""
        scaling = ((g - self.g) / self.epsilon).exp()
        sums = self.group.total(torch.mv(self.kernel, self.b * scaling))
        return self.f - self.epsilon * sums.log()

    def step(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """The `g`, `(m,)`, that makes the columns exact beside `f`, `(n,)`, and the next `f` from that."""
        g, next_f, safe = self._step(f)
        if not safe:
            # About duals grown from the `g` that belongs to `f` no product is greater than `n`, or vanishes.
            self._centre(g, f)
            g, next_f, _ = self._step(f)
        return g, next_f

    def _step(self, f: Tensor) -> tuple[Tensor, Tensor, bool]:
        weight = self.a * ((f - self.f) / self.epsilon).exp()
        columns = torch.mv(self.kernel.T, weight)
        unsafe = (weight.amax() > math.exp(_ABSORB)) | ~(columns.amin() >= _VANISHED)
        rows = torch.mv(self.kernel, self.b / columns)
        # With the sums goes word of whether a process has to make its kernel anew, which all have to do together.
        sums = self.group.total(torch.cat([rows, unsafe[None].to(rows.dtype)]))
        rows_, unsafe = sums[:-1], sums[-1]
        safe = bool((unsafe == 0) & (rows_.amin() >= _VANISHED))
        return self.g - self.epsilon * columns.log(), self.f - self.epsilon * rows_.log(), safe
