"""Exact plan: the optimum itself, by POT's network simplex. It needs the whole matrix, and much time for large ones."""

from __future__ import annotations

import torch
from torch import Tensor

from openclip_otco.ot.cost import CostLike, all_rows, as_cost, as_matrix_if_small, cost_range, full_precision
from openclip_otco.ot.marginals import marginals
from openclip_otco.ot.sparse_plan import SparsePlan, certified


@full_precision
def exact_plan(
    cost: CostLike, a: Tensor | None = None, b: Tensor | None = None, max_iterations: int = 1_000_000
) -> SparsePlan:
    """The optimal coupling, with its duals (`ot.emd`, Bonneel et al., SIGGRAPH Asia 2011).

    Args:
        cost: `(n, m)` matrix or lazy cost; it is laid out as a float64 matrix on the CPU.
        a, b: `(n,)` and `(m,)` masses; uniform where `None`.
        max_iterations: of the simplex.

    Raises:
        RuntimeError: the simplex did not finish.
    """
    # Not at the top: POT looks for JAX, TensorFlow and CuPy when it is imported, and only this function needs it.
    import ot as pot

    cost = as_matrix_if_small(as_cost(cost))
    row_mass, col_mass = marginals(cost, a, b)
    matrix = all_rows(cost).to("cpu", torch.float64, copy=True)
    # Into [0, 1]: POT takes negative costs for infeasible ones, and its tolerance is absolute.
    low, high = cost_range(cost)
    spread = high - low
    scale = spread if spread else 1.0
    matrix.sub_(low).div_(scale)
    plan, log = pot.emd(
        row_mass.cpu().numpy(), col_mass.cpu().numpy(), matrix.numpy(), numItermax=max_iterations, log=True
    )
    if log["warning"]:
        raise RuntimeError(f"exact plan: {log['warning']} Raise max_iterations, or ask for the combinatorial plan.")
    dense = torch.from_numpy(plan)
    rows, cols = torch.nonzero(dense, as_tuple=True)
    device = cost.device
    return certified(
        cost, row_mass, col_mass, rows.to(device), cols.to(device), dense[rows, cols].to(device),
        torch.as_tensor(log["v"] * scale, device=device), spread,
    )  # fmt: skip
