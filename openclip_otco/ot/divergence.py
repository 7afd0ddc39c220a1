"""Sinkhorn divergence: the distance between two clouds of features, without the bias of the entropic term.

Feydy, Séjourné, Vialard, Amari, Trouvé, Peyré, *Interpolating between optimal transport and MMD using Sinkhorn
divergences*, AISTATS 2019.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openclip_otco.ot.cost import CosineCost, Cost, full_precision, tiles
from openclip_otco.ot.defaults import EPSILON
from openclip_otco.ot.marginals import marginals
from openclip_otco.ot.sinkhorn import sinkhorn


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    epsilon: float = EPSILON,
    a: Tensor | None = None,
    b: Tensor | None = None,
    tol: float = 1e-4,
    max_iterations: int = 2000,
) -> Tensor:
    """`S_ε(x, y) = OT_ε(x, y) - OT_ε(x, x)/2 - OT_ε(y, y)/2` under the cosine cost; a scalar, differentiable once.

    Args:
        x, y: `(n, d)` and `(m, d)` unit-norm features.
        epsilon: `ε > 0`, in units of the cost.
        a, b: `(n,)` and `(m,)` masses; uniform where `None`.
        tol: L1 marginal error of each of the three plans.
        max_iterations: of Sinkhorn, for each of them; after these the value is that of the best potentials so far.

    Raises:
        ValueError: as `sinkhorn`.

    Gradients with respect to `x` and `y` are exact for exact potentials (envelope theorem: the potentials are at an
    optimum, so they count as constants); autograd records none of the iterations.
    """
    terms = (
        entropic_value(x, y, epsilon, a, b, tol, max_iterations),
        entropic_value(x, x, epsilon, a, a, tol, max_iterations),
        entropic_value(y, y, epsilon, b, b, tol, max_iterations),
    )
    return terms[0] - (terms[1] + terms[2]) / 2


@full_precision
def entropic_value(
    x: Tensor,
    y: Tensor,
    epsilon: float,
    a: Tensor | None = None,
    b: Tensor | None = None,
    tol: float = 1e-4,
    max_iterations: int = 2000,
) -> Tensor:
    """`OT_ε(x, y)` under the cosine cost, a scalar whose gradient is `dOT = Σ_ij σ_ij dC_ij`.

    Arguments and errors are those of `sinkhorn_divergence`, here of one plan.
    """
    cost = CosineCost(x, y)
    result = sinkhorn(cost, epsilon, a, b, tol=tol, max_iterations=max_iterations)
    value = torch.tensor(result.value, dtype=cost.dtype, device=cost.device)
    if not torch.is_grad_enabled() or not (x.requires_grad or y.requires_grad):
        return value
    row_mass, col_mass = (mass.to(cost.dtype) for mass in marginals(cost, a, b))
    plan_y, plan_x = _plan_products(cost, result.f, result.g, epsilon, row_mass, col_mass)
    # dC_ij = -dx_i·y_j - x_i·dy_j: a linear function of the features with this slope, and the value of OT_ε.
    surrogate = -(x * plan_y).sum() - (y * plan_x).sum()
    return value + surrogate - surrogate.detach()


def _plan_products(
    cost: CosineCost, f: Tensor, g: Tensor, epsilon: float, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    """The products of the plan with the features, `σ y`, `(n, d)`, and `σᵀ x`, `(m, d)`, over tiles of the plan."""
    plan_y, plan_x = torch.zeros_like(cost.x), torch.zeros_like(cost.y)
    for tile in tiles(cost):
        plan = plan_rows(cost, tile, f, g, epsilon, a[tile], b)
        plan_y[tile] = plan @ cost.y
        plan_x += plan.T @ cost.x[tile]
    return plan_y, plan_x


def plan_rows(cost: Cost, tile: slice, f: Tensor, g: Tensor, epsilon: float, a: Tensor, b: Tensor) -> Tensor:
    """Rows `tile` of the entropic plan, `(len(tile), m)`.

    Args:
        cost: `(n, m)`.
        tile: the rows.
        f, g: `(n,)` and `(m,)` potentials.
        epsilon: `ε`.
        a, b: masses of these rows only, `(len(tile),)`, and of all columns, `(m,)`.
    """
    return cost.rows(tile).sub(g).sub_(f[tile, None]).div_(-epsilon).exp_().mul_(a[:, None]).mul_(b)
