"""A pytest plugin: POT's tests call this package where they call `ot.sinkhorn`, `ot.emd` and their kin.

Only arguments and results are translated: arrays to tensors and back, potentials to the logarithms of scalings, a
solution that has not converged to a warning, our `ValueError` of bad masses to POT's `AssertionError`. `method` names
one of POT's algorithms; here each name means the one that this package has. `peer_tests.py` runs it.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import ot as pot
import pytest
import torch
from peer_turns import Turns
from torch import Tensor

from openclip_otco.ot import (
    CosineCost,
    Cost,
    DenseCost,
    SinkhornResult,
    SparsePlan,
    combinatorial_plan,
    exact_plan,
    sinkhorn,
)
from openclip_otco.ot import combinatorial as combinatorial_module
from openclip_otco.ot import cost as cost_module

# The additive error that is asked of the combinatorial plan, as a share of the cost's range. POT's tests ask for the
# optimum to seven digits: that is what `exact_plan` is for, and the auction takes thousands of rounds on the way there.
ADDITIVE_ERROR = 1e-3
# POT takes a tolerance of zero for "run all iterations"; ours must be positive.
LEAST_TOLERANCE = 1e-300


def tensor(array: Any) -> Tensor:
    """The array of either backend as a tensor without history."""
    return array.detach() if isinstance(array, Tensor) else torch.as_tensor(np.asarray(array))


def masses(array: Any) -> Tensor | None:
    """The masses; POT writes the uniform ones as an empty list."""
    return None if array is None or len(array) == 0 else tensor(array)


def like(value: Tensor, array: Any) -> Any:
    """The value in the backend and dtype of `array`."""
    if isinstance(array, Tensor):
        return value.to(array.dtype)
    return value.numpy().astype(np.asarray(array).dtype)[()]


def squared_distances(x: Tensor, y: Tensor) -> CosineCost:
    """`|x_i - y_j|^2` as `1 - x'_i . y'_j`, so that it need not be laid out."""
    one = torch.ones(len(x), 1, dtype=x.dtype), torch.ones(len(y), 1, dtype=y.dtype)
    square = [(points**2).sum(dim=1, keepdim=True) for points in (x, y)]
    root = math.sqrt(2.0)
    return CosineCost(
        torch.cat([root * x, -square[0], one[0]], dim=1), torch.cat([root * y, one[1], one[1] - square[1]], dim=1)
    )


def log_scalings(found: SinkhornResult, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """`(log u, log v)`, of which the plan is `u_i exp(-C_ij/ε) v_j`: POT's potentials hold the masses, ours do not."""
    pairs = []
    for potential, mass in ((found.f, a), (found.g, b)):
        share = torch.full_like(potential, 1 / len(potential)) if mass is None else mass / mass.sum()
        pairs.append(potential.double() / found.epsilon + share.double().log())
    return pairs[0], pairs[1]


def solved(
    cost: Cost, reg: float, a: Any, b: Any, iterations: int, tolerance: float, warn: bool, start: Any
) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    """The logarithms of the scalings, and POT's `log`."""
    row_mass, col_mass = masses(a), masses(b)
    # A start is a start: that POT's holds the masses only moves it.
    init = None if start is None else (reg * tensor(start[0]), reg * tensor(start[1]))
    found = sinkhorn(cost, reg, row_mass, col_mass, init, max(tolerance, LEAST_TOLERANCE), iterations)
    if warn and not found.converged:
        warnings.warn(f"Sinkhorn did not converge: error {found.marginal_error}", UserWarning, stacklevel=3)
    return log_scalings(found, row_mass, col_mass), {"err": [found.marginal_error], "niter": found.iterations}


def matrix_plan(
    a: Any, b: Any, M: Any, reg: float, numItermax: int, stopThr: float, warn: bool, warmstart: Any
) -> tuple[Tensor, dict[str, Any]]:
    matrix = tensor(M)
    (u, v), log = solved(DenseCost(matrix), reg, a, b, numItermax, stopThr, warn, warmstart)
    plan = (u[:, None] + v - matrix.double() / reg).exp()
    return plan, log | {"u": like(u.exp(), M), "v": like(v.exp(), M), "log_u": like(u, M), "log_v": like(v, M)}


def pot_sinkhorn(
    a: Any, b: Any, M: Any, reg: float, method: str = "sinkhorn", numItermax: int = 1000, stopThr: float = 1e-9,
    verbose: bool = False, log: bool = False, warn: bool = True, warmstart: Any = None, **_: Any,
) -> Any:  # fmt: skip
    """`ot.sinkhorn`: the plan; for several `b`, one a column, the costs of their plans."""
    if np.ndim(b) == 2:
        plans = [matrix_plan(a, b[:, k], M, reg, numItermax, stopThr, warn, warmstart)[0] for k in range(b.shape[1])]
        answer = like(torch.stack([(plan * tensor(M)).sum() for plan in plans]), M)
        return (answer, {}) if log else answer
    plan, notes = matrix_plan(a, b, M, reg, numItermax, stopThr, warn, warmstart)
    return (like(plan, M), notes) if log else like(plan, M)


def pot_sinkhorn2(
    a: Any, b: Any, M: Any, reg: float, method: str = "sinkhorn", numItermax: int = 1000, stopThr: float = 1e-9,
    verbose: bool = False, log: bool = False, warn: bool = False, warmstart: Any = None, **_: Any,
) -> Any:  # fmt: skip
    """`ot.sinkhorn2`: the cost of the plan, without its entropy."""
    if np.ndim(b) == 2:
        return pot_sinkhorn(a, b, M, reg, method, numItermax, stopThr, verbose, log, warn, warmstart)
    plan, notes = matrix_plan(a, b, M, reg, numItermax, stopThr, warn, warmstart)
    value = like((plan * tensor(M)).sum(), M)
    return (value, notes) if log else value


def pot_sinkhorn_log(a: Any, b: Any, M: Any, reg: float, *args: Any, **kwargs: Any) -> Any:
    """`ot.bregman.sinkhorn_log`."""
    return pot_sinkhorn(a, b, M, reg, "sinkhorn_log", *args, **kwargs)


def pot_empirical_sinkhorn(
    X_s: Any, X_t: Any, reg: float, a: Any = None, b: Any = None, metric: str = "sqeuclidean",
    numIterMax: int = 10000, stopThr: float = 1e-9, isLazy: bool = False, batchSize: Any = 100,
    verbose: bool = False, log: bool = False, warn: bool = True, warmstart: Any = None, **_: Any,
) -> Any:  # fmt: skip
    """`ot.bregman.empirical_sinkhorn`: the plan, or the logarithms of its scalings where it is lazy."""
    x, y = tensor(X_s), tensor(X_t)
    if metric == "sqeuclidean":
        cost: Cost = squared_distances(x, y)
        matrix = cost_module.all_rows(cost)
    else:
        matrix = torch.cdist(x, y)
        cost = DenseCost(matrix)
    with pytest.MonkeyPatch.context() as patch:
        if isLazy:
            patch.setattr(cost_module, "DENSE_ENTRIES", 0)
            patch.setattr(cost_module, "TILE_ELEMENTS", len(y))
        (u, v), notes = solved(cost, reg, a, b, numIterMax, stopThr, warn, warmstart)
    plan = like((u[:, None] + v - matrix.double() / reg).exp(), X_s)
    notes |= {"u": like(u, X_s), "v": like(v, X_s), "lazy_plan": plan}
    parts = (like(u, X_s), like(v, X_s)) if isLazy else (plan,)
    if log:
        return (*parts, notes)
    return parts if isLazy else plan


def pot_empirical_sinkhorn2(
    X_s: Any, X_t: Any, reg: float, a: Any = None, b: Any = None, metric: str = "sqeuclidean", *args: Any,
    isLazy: bool = False, log: bool = False, **kwargs: Any,
) -> Any:  # fmt: skip
    """`ot.bregman.empirical_sinkhorn2`: the cost of the plan, without its entropy."""
    notes = pot_empirical_sinkhorn(X_s, X_t, reg, a, b, metric, *args, isLazy=isLazy, log=True, **kwargs)[-1]
    x, y = tensor(X_s), tensor(X_t)
    matrix = torch.cdist(x, y) ** (2 if metric == "sqeuclidean" else 1)
    value = like((tensor(notes["lazy_plan"]) * matrix).sum(), X_s)
    return (value, notes) if log else value


def pot_empirical_sinkhorn_divergence(
    X_s: Any, X_t: Any, reg: float, a: Any = None, b: Any = None, *args: Any, log: bool = False, warmstart: Any = None,
    **kwargs: Any,
) -> Any:  # fmt: skip
    """`ot.bregman.empirical_sinkhorn_divergence`: of our three plans; POT leaves their entropies out."""
    starts = (warmstart, *((None, None) if warmstart is None else ((w, w) for w in warmstart)))
    pairs = ((X_s, X_t, a, b), (X_s, X_s, a, a), (X_t, X_t, b, b))
    ab, aa, bb = (
        pot_empirical_sinkhorn2(x, y, reg, p, q, *args, warmstart=start, **kwargs)
        for (x, y, p, q), start in zip(pairs, starts, strict=True)
    )
    value = ab - (aa + bb) / 2
    value = value.clamp(min=0) if isinstance(value, Tensor) else max(value, 0 * value)
    return (value, {"sinkhorn_loss_ab": ab, "sinkhorn_loss_a": aa, "sinkhorn_loss_b": bb}) if log else value


def exact(matrix: Tensor, a: Tensor | None, b: Tensor | None) -> SparsePlan:
    return exact_plan(matrix, a, b)


def combinatorial(matrix: Tensor, a: Tensor | None, b: Tensor | None) -> SparsePlan:
    """The auction's own plan: its last resort, POT's simplex, would be judged by its own tests."""

    def no_simplex(*_: Any) -> SparsePlan:
        raise RuntimeError("no last resort here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(combinatorial_module, "exact_plan", no_simplex)
        return combinatorial_plan(matrix, ADDITIVE_ERROR, a, b)


PLANS: dict[str, Callable[[Tensor, Tensor | None, Tensor | None], SparsePlan]] = {
    "exact_plan": exact,
    "combinatorial_plan": combinatorial,
}


def emd_of(planner: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`ot.emd` and `ot.emd2` by that planner."""

    def plan_of(a: Any, b: Any, M: Any) -> tuple[SparsePlan, dict[str, Any]]:
        try:
            plan = PLANS[planner](tensor(M), masses(a), masses(b))
        except ValueError as error:
            raise AssertionError(str(error)) from error
        return plan, {"cost": plan.value, "u": like(plan.f, M), "v": like(plan.g, M), "warning": None, "result_code": 1}

    def emd(a: Any, b: Any, M: Any, *_: Any, log: bool = False, **__: Any) -> Any:
        plan, notes = plan_of(a, b, M)
        return (like(plan.dense(), M), notes) if log else like(plan.dense(), M)

    def emd2(a: Any, b: Any, M: Any, *_: Any, log: bool = False, return_matrix: bool = False, **__: Any) -> Any:
        if np.ndim(b) == 2:
            return [emd2(a, b[:, k], M, log=log, return_matrix=return_matrix) for k in range(b.shape[1])]
        plan, notes = plan_of(a, b, M)
        value = like(torch.tensor(plan.value, dtype=torch.float64), M)
        if return_matrix:
            notes["G"] = like(plan.dense(), M)
        return (value, notes) if log or return_matrix else value

    return emd, emd2


def replaced(planner: str) -> list[tuple[Any, str, Callable[..., Any]]]:
    """The names that POT's tests call, and what answers there."""
    emd, emd2 = emd_of(planner)
    return [
        (pot, "emd", emd),
        (pot, "emd2", emd2),
        (pot.lp, "emd", emd),
        (pot.lp, "emd2", emd2),
        (pot, "sinkhorn", pot_sinkhorn),
        (pot, "sinkhorn2", pot_sinkhorn2),
        (pot.bregman, "sinkhorn", pot_sinkhorn),
        (pot.bregman, "sinkhorn2", pot_sinkhorn2),
        (pot.bregman, "sinkhorn_log", pot_sinkhorn_log),
        (pot.bregman, "empirical_sinkhorn", pot_empirical_sinkhorn),
        (pot.bregman, "empirical_sinkhorn2", pot_empirical_sinkhorn2),
        (pot.bregman, "empirical_sinkhorn_divergence", pot_empirical_sinkhorn_divergence),
    ]


@pytest.fixture(autouse=True)
def ours_answer(monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]) -> Iterator[None]:
    """Puts this package in the place of POT's functions for one test, and notes how often it was asked."""
    turns = Turns(int(os.environ["PEER_EVERY"]))
    for module, name, ours in replaced(os.environ["PEER_PLANNER"]):
        monkeypatch.setattr(module, name, turns.between(getattr(module, name), ours))
    yield
    record_property("calls", turns.ours)
