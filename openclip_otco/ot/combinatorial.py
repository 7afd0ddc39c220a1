"""Combinatorial plan: optimal transport to within `δ·max(C)`, by bidding instead of by linear programming.

Lahn, Mulchandani, Raghvendra, *A graph theoretic additive approximation of optimal transport*, NeurIPS 2019, and Lahn,
Raghvendra, Zhang, *A combinatorial algorithm for approximating the optimal transport in the parallel and MPC settings*,
NeurIPS 2023, stop when all but a small share of the mass is placed, and place that rest greedily. So does this, with an
auction for the bidding.

On most inputs the error is several times smaller than the algorithm's worst case. So the bidding stops early, a
coupling and feasible duals are made of its state, and their values are compared. If these prove an error of `δ`, that
is the plan. Else the bidding goes on, in smaller steps or until less mass is free.

The range `R = max C - min C` stands for `max(C)` everywhere: the bound is no weaker, as costs are non-negative, and the
result does not change when a constant is added to the cost.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openclip_otco.ot.auction import Auction
from openclip_otco.ot.cost import Cost, CostLike, as_cost, as_matrix_if_small, cost_range, full_precision
from openclip_otco.ot.defaults import ADDITIVE_ERROR
from openclip_otco.ot.exact import exact_plan
from openclip_otco.ot.ledger import AssignmentLedger, Ledger, TransportLedger
from openclip_otco.ot.marginals import marginals
from openclip_otco.ot.sparse_plan import SparsePlan, certified
from openclip_otco.rules import SHARE_ABOVE_ZERO

# A plan that is not proven good after so many rounds gives way to the exact solver, where the matrix is this small.
MOST_ROUNDS = 5000
EXACT_ENTRIES = 4096 * 4096


@full_precision
def combinatorial_plan(
    cost: CostLike,
    additive_error: float = ADDITIVE_ERROR,
    a: Tensor | None = None,
    b: Tensor | None = None,
    seed: int = 0,
) -> SparsePlan:
    """A coupling with `<σ, C> <= OPT + δ·(max C - min C)` and exact marginals, with feasible duals.

    The plan's `additive_error` is the error that its duals prove. It can exceed `δ` in one case: price wars that have
    not ended after `MOST_ROUNDS` rounds, on more than `EXACT_ENTRIES` entries or where the network simplex gives up.

    Args:
        cost: `(n, m)` matrix or lazy cost. A lazy one of more than `cost.DENSE_ENTRIES` entries is never laid out.
        additive_error: `δ`, in `(0, 1]`.
        a, b: `(n,)` and `(m,)` masses of rows and columns; uniform where `None`.
        seed: breaks ties between equally cheap columns; the same seed gives the same plan.

    Raises:
        ValueError: `δ` outside `(0, 1]`, or a cost or marginals that are no such thing.
    """
    SHARE_ABOVE_ZERO.check(additive_error=additive_error)
    cost = as_matrix_if_small(as_cost(cost))
    row_mass, col_mass = marginals(cost, a, b)
    low, high = cost_range(cost)
    n, m = cost.shape
    ledger: Ledger
    if a is None and b is None and n == m:
        ledger = AssignmentLedger(n, cost.device)
    else:
        ledger = TransportLedger(row_mass, col_mass, cost.dtype)
    if high == low:
        # Every coupling costs the same, and bidding would have nothing to measure its steps by.
        no_prices = torch.zeros(m, dtype=cost.dtype, device=cost.device)
        return certified(cost, row_mass, col_mass, *ledger.place_free(cost), no_prices, 0.0)

    auction = Auction(cost, low, high - low, row_mass, col_mass, ledger, additive_error, seed)
    auction.end_price_wars()
    plan = _best_plan(auction, additive_error)
    return plan if plan.additive_error <= additive_error else _last_resort(cost, a, b, plan)


def _best_plan(auction: Auction, additive_error: float) -> SparsePlan:
    """The first plan of the auction with a proven error of `additive_error`; after `MOST_ROUNDS` the best one."""
    best: SparsePlan | None = None
    while True:
        auction.bid(MOST_ROUNDS - auction.rounds)
        plan = auction.plan()
        if best is None or plan.additive_error < best.additive_error:
            best = plan
        if best.additive_error <= additive_error or auction.rounds >= MOST_ROUNDS:
            return best
        auction.refine(plan)


def _last_resort(cost: Cost, a: Tensor | None, b: Tensor | None, best: SparsePlan) -> SparsePlan:
    """The exact plan, if the matrix is small enough for it and the simplex ends; else the best that was found."""
    if cost.shape[0] * cost.shape[1] > EXACT_ENTRIES:
        return best
    try:
        return exact_plan(cost, a, b)
    except RuntimeError:
        return best
