"""Entropic optimal transport by Sinkhorn's iteration, in a form that does not overflow.

Cuturi, *Sinkhorn distances*, NeurIPS 2013. The plan is `σ_ij = a_i b_j exp((f_i + g_j - C_ij)/ε)`, the minimiser of
`<σ, C> + ε KL(σ | a ⊗ b)` over the couplings of `a` and `b`. Where the kernel fits in memory the iterations are matrix-
vector products with `exp((f_i + g_j - C_ij)/ε)`, whose potentials are absorbed whenever the scalings grow (Schmitzer,
*Stabilized sparse scaling algorithms for entropy regularized transport problems*, SISC 2019); where it does not, they
are row-wise log-sum-exps over tiles (as in FlashSinkhorn, arXiv:2602.03067), and no `(n, m)` matrix exists.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openclip_otco.ot.cost import Cost, CostLike, as_cost, tiles
from openclip_otco.ot.marginals import marginals
from openclip_otco.ot.sparse_plan import SparsePlan

# Above this many entries the kernel is not kept: 256 MiB of float32.
DENSE_ENTRIES = 8192 * 8192
# Scalings beyond exp(±30) are absorbed into the potentials: well inside float32, whose largest is exp(88).
_ABSORB = 30.0

Potentials = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class SinkhornResult:
    """Potentials of the entropic plan, and how well they solve it.

    Attributes:
        f, g: `(n,)` and `(m,)`, in units of the cost.
        iterations: pairs of half-steps taken, the first one included.
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


def sinkhorn(
    cost: CostLike,
    epsilon: float = 0.05,
    a: Tensor | None = None,
    b: Tensor | None = None,
    init: SparsePlan | SinkhornResult | Potentials | None = None,
    tol: float = 1e-3,
    max_iterations: int = 2000,
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

    Raises:
        ValueError: `ε`, `tol` or `max_iterations` not positive; potentials of the wrong length or not finite; bad
            marginals or cost.
    """
    if not 0 < epsilon < math.inf or not tol > 0 or max_iterations < 1:
        raise ValueError(
            f"epsilon (finite) and tol must be positive and max_iterations at least 1; "
            f"got {epsilon}, {tol} and {max_iterations}"
        )
    cost = as_cost(cost)
    row_mass, col_mass = (mass.to(cost.dtype) for mass in marginals(cost, a, b))
    log_a, log_b = row_mass.log(), col_mass.log()
    g = _start(cost, init)

    f = soft_ctransform(cost, g, epsilon, log_b)
    g = soft_ctransform(cost.transposed(), f, epsilon, log_a)
    iterations = 1
    if cost.shape[0] * cost.shape[1] <= DENSE_ENTRIES:
        f, g, error, iterations = _scale(cost, f, g, epsilon, row_mass, col_mass, tol, max_iterations)
    else:
        while True:
            next_f = soft_ctransform(cost, g, epsilon, log_b)
            error = _marginal_error(row_mass, f, next_f, epsilon)
            if error <= tol or iterations >= max_iterations:
                break
            f = next_f
            g = soft_ctransform(cost.transposed(), f, epsilon, log_a)
            iterations += 1
    # The last half-step made the columns exact, so the plan's mass is one and the dual has no third term.
    value = float(row_mass.double() @ f.double() + col_mass.double() @ g.double())
    return SinkhornResult(f, g, iterations, error, error <= tol, value, epsilon)


def soft_ctransform(cost: Cost, g: Tensor, epsilon: float, log_b: Tensor) -> Tensor:
    """`f_i = -ε log Σ_j b_j exp((g_j - C_ij)/ε)`, `(n,)`, streamed in tiles of rows."""
    bias = g / epsilon + log_b
    parts = [torch.logsumexp(cost.rows(tile).div_(-epsilon).add_(bias), dim=1) for tile in tiles(cost)]
    return torch.cat(parts).mul_(-epsilon)


def nearest_potentials(
    cost: CostLike,
    candidates: Sequence[Tensor],
    epsilon: float,
    a: Tensor | None = None,
    b: Tensor | None = None,
) -> int:
    """Which of the candidate `g`, each `(m,)`, is nearest to the solution: the index of the one whose plan, after one
    half-step, has the smallest L1 error of its column marginal."""
    cost = as_cost(cost)
    if not candidates or any(g.shape != (cost.shape[1],) for g in candidates):
        raise ValueError(
            f"candidates must be at least one potential of shape ({cost.shape[1]},); "
            f"got {[tuple(g.shape) for g in candidates]}"
        )
    row_mass, col_mass = (mass.to(cost.dtype) for mass in marginals(cost, a, b))
    errors = []
    for g in candidates:
        f = soft_ctransform(cost, g, epsilon, col_mass.log())
        next_g = soft_ctransform(cost.transposed(), f, epsilon, row_mass.log())
        error = _marginal_error(col_mass, g, next_g, epsilon)
        errors.append(math.inf if math.isnan(error) else error)
    return min(range(len(errors)), key=errors.__getitem__)


def _marginal_error(mass: Tensor, held: Tensor, exact: Tensor, epsilon: float) -> float:
    """L1 distance from `mass` of the marginal under potentials `held`, where `exact` would meet it."""
    excess = torch.expm1((held - exact) / epsilon).abs()
    return float(torch.where(mass > 0, mass * excess, 0.0).sum())


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


def _scale(
    cost: Cost, f: Tensor, g: Tensor, epsilon: float, a: Tensor, b: Tensor, tol: float, max_iterations: int
) -> tuple[Tensor, Tensor, float, int]:
    """Potentials, row error and iterations, by scaling the stored kernel; starts from columns that are exact."""
    iterations = 1
    while True:
        kernel = torch.cat([_kernel(cost, tile, f, g, epsilon) for tile in tiles(cost)])
        u, v = torch.ones_like(f), torch.ones_like(g)
        while True:
            row_sums = torch.mv(kernel, b * v)
            error = float((a * (u * row_sums - 1).abs()).sum())
            if error <= tol or iterations >= max_iterations:
                return f + epsilon * u.log(), g + epsilon * v.log(), error, iterations
            next_u = row_sums.reciprocal()
            next_v = torch.mv(kernel.T, a * next_u).reciprocal()
            iterations += 1
            spread = float(torch.stack([next_u.log().abs().amax(), next_v.log().abs().amax()]).amax())
            if not math.isfinite(spread):
                # A row of the kernel underflowed: go on from the last finite scalings, with one step in the log domain.
                f, g = f + epsilon * u.log(), g + epsilon * v.log()
                f = soft_ctransform(cost, g, epsilon, b.log())
                g = soft_ctransform(cost.transposed(), f, epsilon, a.log())
                break
            u, v = next_u, next_v
            if spread > _ABSORB:
                f, g = f + epsilon * u.log(), g + epsilon * v.log()
                break


def _kernel(cost: Cost, tile: slice, f: Tensor, g: Tensor, epsilon: float) -> Tensor:
    return cost.rows(tile).sub_(g).sub_(f[tile, None]).div_(-epsilon).exp_()
