"""Entropic optimal transport by Sinkhorn's iteration, in a form that does not overflow.

Cuturi, *Sinkhorn distances*, NeurIPS 2013. The plan is `σ_ij = a_i b_j exp((f_i + g_j - C_ij)/ε)`, the minimiser of
`<σ, C> + ε KL(σ | a ⊗ b)` over the couplings of `a` and `b`. An iteration is a pair of half-steps: the first makes the
columns exact, the second the rows. They use a stored kernel where it fits in memory, and stream over the cost where it
does not. Either way Anderson acceleration takes the place of most iterations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from openclip_otco.ot.anderson import Anderson
from openclip_otco.ot.cost import Cost, CostLike, DenseCost, as_cost, as_matrix_if_small, full_precision
from openclip_otco.ot.defaults import EPSILON
from openclip_otco.ot.group import ALONE, Group
from openclip_otco.ot.half_steps import KernelHalfSteps, StreamedHalfSteps, soft_ctransform
from openclip_otco.ot.marginals import marginals
from openclip_otco.ot.sparse_plan import SparsePlan
from openclip_otco.rules import AT_LEAST_ONE, POSITIVE

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
    POSITIVE.check(epsilon=epsilon, tol=tol)
    AT_LEAST_ONE.check(max_iterations=max_iterations)
    cost = as_cost(cost)
    row_mass, col_mass = (mass.to(cost.dtype) for mass in marginals(cost, a, b))
    g = _start(cost, init)
    rows, cols = (torch.nonzero(mass).squeeze(1) for mass in (row_mass, col_mass))
    if (len(rows), len(cols)) == cost.shape:
        f, g, error, iterations = _solve(cost, g, epsilon, row_mass, col_mass, tol, max_iterations, group)
    else:
        # Rows and columns without mass take no part. Their potentials follow from those of the others.
        part, part_mass = cost.restricted(rows, cols), (row_mass[rows], col_mass[cols])
        part_f, part_g, error, iterations = _solve(part, g[cols], epsilon, *part_mass, tol, max_iterations, group)
        f = soft_ctransform(cost, torch.zeros_like(g).index_copy_(0, cols, part_g), epsilon, col_mass.log())
        f.index_copy_(0, rows, part_f)
        g = soft_ctransform(cost.transposed(), f, epsilon, row_mass.log()).index_copy_(0, cols, part_g)
    # The last half-step made the columns exact, so the plan's mass is one and the dual has no third term.
    value = float(row_mass.double() @ f.double() + col_mass.double() @ g.double())
    return SinkhornResult(f, g, iterations, error, error <= tol, value, epsilon)


@full_precision
def nearest_potentials(
    cost: CostLike,
    candidates: Sequence[Tensor],
    epsilon: float,
    a: Tensor | None = None,
    b: Tensor | None = None,
    group: Group = ALONE,
) -> int:
    """The index of the candidate `g`, each `(m,)`, that is nearest to the solution.

    That is the one whose plan has the smallest L1 error of its column marginal after one half-step.

    Args:
        cost: `(n, m)` matrix or lazy cost.
        candidates: at least one.
        epsilon: `ε > 0`, in units of the cost.
        a, b: `(n,)` and `(m,)` masses; uniform where `None`.
        group: the processes that ask this together, as in `sinkhorn`.

    Raises:
        ValueError: no candidate, one of another length, or bad marginals or cost.
    """
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
    own_rows = group.part(cost.shape[0])
    part = cost.restricted(own_rows, slice(None))
    half_steps = StreamedHalfSteps(part, epsilon, row_mass[own_rows], col_mass, group)
    errors = []
    for g in candidates:
        _, next_g = half_steps.step(g)
        error = _marginal_error(col_mass, g, next_g, epsilon)
        errors.append(math.inf if math.isnan(error) else error)
    return min(range(len(errors)), key=errors.__getitem__)


def _start(cost: Cost, init: SparsePlan | SinkhornResult | Potentials | None) -> Tensor:
    """The `g`, `(m,)`, to start from."""
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
    """Potentials `f`, `g` with exact columns, their row error, and the number of iterations.

    Args:
        g: `(m,)`, where to start.
        a, b: all above zero.
    """
    if group.count > min(cost.shape):
        group = ALONE  # too few rows or columns to give each process one
    half_steps, f = _first_half_step(cost, g, epsilon, a, b, group)
    acceleration = Anderson(a)
    best = _Iterate(f, g[group.part(cost.shape[1])], math.inf)
    iterations = 0
    while True:
        own_g, next_f = half_steps.step(f)
        iterations += 1
        error = _marginal_error(a, f, next_f, epsilon)
        if error < best.error or iterations == 1:
            best = _Iterate(f, own_g, error)
        if not best.error > tol or iterations == max_iterations:  # an error that is NaN ends it, too
            break
        f = acceleration.next(f, next_f, error)
    return best.f, group.joined(best.own_g, cost.shape[1]), best.error, iterations


class _Iterate(NamedTuple):
    """Potentials that an iteration has reached, with exact columns."""

    f: Tensor
    own_g: Tensor
    """Of the columns of this process."""
    error: float
    """L1 error of the row marginal."""


def _first_half_step(
    cost: Cost, g: Tensor, epsilon: float, a: Tensor, b: Tensor, group: Group
) -> tuple[KernelHalfSteps | StreamedHalfSteps, Tensor]:
    """How to make half-steps for this cost, and the `f`, `(n,)`, that makes the rows exact under `g`, `(m,)`."""
    own_columns, own_rows = group.part(cost.shape[1]), group.part(cost.shape[0])
    part = cost.restricted(slice(None), own_columns) if group.count > 1 else cost
    # The largest part decides for all: processes that made half-steps of different kinds would wait for each other.
    part = as_matrix_if_small(part, cost.shape[0] * math.ceil(cost.shape[1] / group.count))
    if isinstance(part, DenseCost):
        kernel = KernelHalfSteps(part, g[own_columns], epsilon, a, b[own_columns], group)
        return kernel, kernel.exact_rows(g[own_columns])
    # Transposed, as each process holds columns here.
    streamed = StreamedHalfSteps(part.transposed(), epsilon, b[own_columns], a, group)
    own_f = soft_ctransform(cost.restricted(own_rows, slice(None)), g, epsilon, b.log())
    return streamed, group.joined(own_f, cost.shape[0])


def _marginal_error(mass: Tensor, potential: Tensor, exact: Tensor, epsilon: float) -> float:
    """L1 error of the marginal under `potential`; under the potential `exact` the marginal is `mass`."""
    excess = torch.expm1((potential - exact) / epsilon).abs()
    return float(torch.where(mass > 0, mass * excess, 0.0).sum())
