"""Combinatorial plan: optimal transport to within `δ·max(C)`, by bidding instead of by linear programming.

Lahn, Mulchandani, Raghvendra, *A graph theoretic additive approximation of optimal transport*, NeurIPS 2019, and Lahn,
Raghvendra, Zhang, *A combinatorial algorithm for approximating the optimal transport in the parallel and MPC settings*,
NeurIPS 2023, stop when all but a small share of the mass is placed, and place that rest greedily. So does this, with
Bertsekas' Jacobi auction (*Annals of Operations Research* 14, 1988; 20, 1989 for general marginals) for the bidding:
all rows that are free bid at once, so that every round is a few operations over those rows, on a CPU or a GPU.

What the algorithm promises in the worst case is several times what it does on most inputs. So it does not wait for its
own promise: it stops early, takes a coupling and feasible duals from where it stands, and compares their values. When
these prove the asked error, that is the plan; else the bidding goes on, in smaller steps or with less left to place.

The range `R = max C - min C` stands for `max(C)` everywhere: the bound is no weaker, as costs are non-negative, and the
result does not change when a constant is added to the cost.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openclip_otco.ot.candidates import CandidateLists
from openclip_otco.ot.cost import Cost, CostLike, as_cost, cost_range, full_precision, held
from openclip_otco.ot.defaults import ADDITIVE_ERROR
from openclip_otco.ot.exact import exact_plan
from openclip_otco.ot.ledger import AssignmentLedger, Ledger, TransportLedger
from openclip_otco.ot.marginals import marginals
from openclip_otco.ot.sparse_plan import SparsePlan, certified

# After so many rounds a plan that is not proven good gives way to the exact solver, where the matrix is this small.
MOST_ROUNDS = 5000
EXACT_ENTRIES = 4096 * 4096
# Where the bidding first stops: a step of `δ` and a rest of `6δ`, but never more than a tenth of the mass. On trained
# features that is just about good enough, and each time it is not, the larger cause of the error is halved.
_STEP = 1.0
_REST = 6.0
_LARGEST_REST = 0.1
# A step that has not done after so many rounds grows by a factor.
_PATIENCE = 100
_FACTOR = 4
# Ties are broken by a noise of this share of `δ`.
_NOISE = 0.02


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
    if not 0 < additive_error <= 1:
        raise ValueError(f"additive_error must lie in (0, 1]; got {additive_error}")
    cost = held(as_cost(cost))
    row_mass, col_mass = marginals(cost, a, b)
    low, high = cost_range(cost)
    n, m = cost.shape
    price = torch.zeros(m, dtype=cost.dtype, device=cost.device)
    price[col_mass == 0] = torch.inf  # nothing to sell there
    ledger: Ledger
    if a is None and b is None and n == m:
        ledger = AssignmentLedger(n, cost.device)
    else:
        ledger = TransportLedger(row_mass, col_mass, cost.dtype)
    if high == low:
        # Every coupling costs the same, and bidding would have nothing to measure its steps by.
        return certified(cost, row_mass, col_mass, *ledger.place_free(cost), torch.zeros_like(price), 0.0)

    spread = high - low
    lists = CandidateLists(cost, low, spread, _NOISE * additive_error, price, seed)
    step, rest = _STEP * additive_error, min(_REST * additive_error, _LARGEST_REST)
    rounds, best = 0, None
    # Price wars, where many rows fight for few columns a step at a time, can take 1/δ² rounds. Longer steps end them,
    # and shorter ones, from the prices found, then repair what these have spoiled.
    while ledger.free_share() > rest and step < 1:
        rounds += _bid(lists, ledger, price, step, rest, _PATIENCE)
        if ledger.free_share() > rest:
            step *= _FACTOR
    while True:
        rounds += _bid(lists, ledger, price, step, rest, MOST_ROUNDS - rounds)
        rows, cols, mass = (torch.cat(parts) for parts in zip(ledger.placed(), ledger.place_free(cost), strict=True))
        plan = certified(cost, row_mass, col_mass, rows, cols, mass, -price * spread, spread, rounds)
        if best is None or plan.additive_error < best.additive_error:
            best = plan
        if best.additive_error <= additive_error:
            return best
        if rounds >= MOST_ROUNDS:
            return _last_resort(cost, a, b, best)
        # By how much each entry misses its row's best price, in shares of the range: the error, entry by entry.
        placed_rows, placed_columns, placed_mass = ledger.placed()
        paid = (cost.entries(placed_rows, placed_columns) - plan.f[placed_rows]) / spread
        slack = paid + price[placed_columns]
        if float((placed_mass * slack).sum()) > additive_error / 2:
            step /= _FACTOR if plan.additive_error > _FACTOR * additive_error else 2
            ledger.release(slack > step, price)
        else:
            rest /= 2


def _last_resort(cost: Cost, a: Tensor | None, b: Tensor | None, best: SparsePlan) -> SparsePlan:
    """The exact plan, if the matrix is small enough for it and the simplex ends; else the best that was found."""
    if cost.shape[0] * cost.shape[1] > EXACT_ENTRIES:
        return best
    try:
        return exact_plan(cost, a, b)
    except RuntimeError:
        return best


def _bid(lists: CandidateLists, ledger: Ledger, price: Tensor, step: float, rest: float, most_rounds: int) -> int:
    """Auctions columns until no more than the share `rest` of the mass is free; returns the rounds taken.

    A free row bids for the column that is cheapest for it, as much more as would make the second cheapest as good, and
    one step on top: what it holds is then within a step of its best choice, however the other prices rise.
    """
    rounds = 0
    while ledger.free_share() > rest and rounds < most_rounds:
        rounds += 1
        rows = ledger.free()
        columns, gap = lists.bids(rows, price)
        ledger.sell(rows, columns, price[columns] + gap + step, price)
    return rounds
