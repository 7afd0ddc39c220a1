"""Combinatorial plan: optimal transport to within `δ·max(C)`, by bidding instead of by linear programming.

Lahn, Mulchandani, Raghvendra, *A graph theoretic additive approximation of optimal transport*, NeurIPS 2019, and Lahn,
Raghvendra, Zhang, *A combinatorial algorithm for approximating the optimal transport in the parallel and MPC settings*,
NeurIPS 2023. With uniform marginals and `n = m` the same idea is Bertsekas' Jacobi auction (*Annals of Operations
Research* 14, 1988). Every round is a few row operations over the rows that are still free, so it runs on a GPU; it
stops when a share of less than `δ` of the mass is free, and places that rest.

The range `R = max C - min C` stands for `max(C)` everywhere: the bound is no weaker, as costs are non-negative, and the
result does not change when a constant is added to the cost.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from openclip_otco.ot.cost import Cost, CostLike, as_cost, cost_range, rows_per_tile
from openclip_otco.ot.exact import exact_plan
from openclip_otco.ot.marginals import marginals
from openclip_otco.ot.sparse_plan import SparsePlan, certified

# Above this many entries a quantised matrix is not kept: rows are made again from the features when they bid.
DENSE_ENTRIES = 8192 * 8192
# After so many rounds a plan that is not proven good gives way to the exact solver, where the matrix is this small.
MOST_ROUNDS = 1000
EXACT_ENTRIES = 4096 * 4096
# Shares of δ. Auction: (1 + noise) steps + rest <= δ. Push-relabel: rounding + step + rest <= δ.
_AUCTION_STEP, _AUCTION_NOISE, _AUCTION_REST = 0.5, 0.1, 0.45
_PUSH_STEP, _PUSH_REST = 0.35, 0.3


def combinatorial_plan(
    cost: CostLike,
    additive_error: float = 0.005,
    a: Tensor | None = None,
    b: Tensor | None = None,
    seed: int = 0,
) -> SparsePlan:
    """A coupling with `<σ, C> <= OPT + δ·(max C - min C)` and exact marginals, with feasible duals.

    The plan's `additive_error` is the error that its duals prove. It can exceed `δ` in one case: price wars on more
    than `EXACT_ENTRIES` entries that have not ended after 20,000 rounds.

    Args:
        cost: `(n, m)` matrix or lazy cost.
        additive_error: `δ`, in `(0, 1]`.
        a, b: `(n,)` and `(m,)` masses of rows and columns; uniform where `None`.
        seed: breaks ties between equally cheap columns; the same seed gives the same plan.

    Raises:
        ValueError: `δ` outside `(0, 1]`, or a cost or marginals that are no such thing.
    """
    if not 0 < additive_error <= 1:
        raise ValueError(f"additive_error must lie in (0, 1]; got {additive_error}")
    cost = as_cost(cost)
    row_mass, col_mass = marginals(cost, a, b)
    low, high = cost_range(cost)
    uniform = a is None and b is None and cost.shape[0] == cost.shape[1]
    if high == low:
        # Every coupling costs the same, and bidding would have nothing to measure its steps by.
        rows, cols, mass = _northwest_corner(row_mass, col_mass)
        return certified(cost, row_mass, col_mass, rows, cols, mass, torch.zeros_like(col_mass))
    slack = additive_error * (high - low)

    def solve(most_rounds: int) -> SparsePlan:
        if uniform:
            owner, price, rounds = _auction(cost, low, slack, additive_error, seed, most_rounds)
            rows, cols, mass = owner, torch.arange(len(owner), device=owner.device), col_mass.clone()
        else:
            rows, cols, mass, price, rounds = _push_relabel(
                cost, low, slack, additive_error, row_mass, col_mass, seed, most_rounds
            )
        return certified(cost, row_mass, col_mass, rows, cols, mass, -price, rounds)

    # Price wars, where many rows fight for few columns a step at a time, can take 1/δ² rounds. What is free when the
    # rounds run out is placed all the same; the certificate then tells whether that was good enough.
    exact_is_at_hand = cost.shape[0] * cost.shape[1] <= EXACT_ENTRIES
    plan = solve(MOST_ROUNDS if exact_is_at_hand else 20 * MOST_ROUNDS)
    if exact_is_at_hand and plan.additive_error > additive_error:
        return exact_plan(cost, a, b)
    return plan


class _Bids:
    """Rows of the cost in units of the step, with a tie-breaking noise in `[0, noise)` of a unit added.

    Without noise, equal costs make all rows bid for the same column and the rounds as many as columns.
    """

    def __init__(self, cost: Cost, low: float, step: float, noise: float, floor: bool, seed: int) -> None:
        self.cost, self.low, self.step, self.noise, self.floor = cost, low, step, noise, floor
        n, m = cost.shape
        generator = torch.Generator().manual_seed(seed)
        self._row_key = torch.rand(n, generator=generator).to(cost.device, cost.dtype)
        self._col_key = torch.rand(m, generator=generator).to(cost.device, cost.dtype)
        self._matrix = self._make(slice(0, n)) if n * m <= DENSE_ENTRIES else None

    def _make(self, index: slice | Tensor) -> Tensor:
        bids = self.cost.rows(index).sub_(self.low).div_(self.step)
        if self.floor:
            bids.floor_()
        # A cheap hash of (i, j): the same entry gets the same noise whichever rows are asked for together.
        noise = self._row_key[index, None].mul(7919.0).add(self._col_key.mul(104729.0)[None, :])
        return bids.add_(noise.frac_(), alpha=self.noise)

    def chunks(self, index: Tensor) -> Iterator[Tensor]:
        """The rows `index`: together where the matrix is kept, else no more at a time than a tile holds."""
        if self._matrix is not None:
            yield self._matrix[index]
        else:
            for part in index.split(rows_per_tile(self.cost)):
                yield self._make(part)

    def cheapest(self, index: Tensor, price: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For each of the rows `index`: its cheapest column, what that costs, and what the second cheapest costs."""
        column, best, second = [], [], []
        for chunk in self.chunks(index):
            reduced = chunk.add_(price)
            least, where = reduced.min(dim=1)
            column.append(where)
            best.append(least)
            second.append(reduced.scatter_(1, where[:, None], torch.inf).amin(dim=1))
        return torch.cat(column), torch.cat(best), torch.cat(second)


def _auction(
    cost: Cost, low: float, slack: float, delta: float, seed: int, most_rounds: int
) -> tuple[Tensor, Tensor, int]:
    """The row that owns each column `(n,)`, the columns' prices `(n,)` in units of the cost, and the rounds taken.

    Jacobi auction: all free rows bid at once for the column that is cheapest for them, raising its price to where the
    second cheapest becomes as good, plus one step (epsilon-complementary slackness).
    """
    n = cost.shape[0]
    step = slack * _AUCTION_STEP
    bids = _Bids(cost, low, step, _AUCTION_NOISE, floor=False, seed=seed)
    device = cost.device
    price = torch.zeros(n, dtype=cost.dtype, device=device)
    owner = torch.full((n,), -1, device=device)
    free = torch.arange(n, device=device)
    allowed = int(delta * _AUCTION_REST * n)
    rounds = 0
    while len(free) > allowed and rounds < most_rounds:
        rounds += 1
        column, best, second = bids.cheapest(free, price)
        offer = price[column] + (second - best) + 1.0
        top = torch.full((n,), -torch.inf, dtype=cost.dtype, device=device)
        top.scatter_reduce_(0, column, offer, "amax")
        wins = offer == top[column]
        # Of equal offers the first free row gets the column: one winner a column, and no dependence on timing.
        winner = torch.full((n,), n, device=device)
        winner.scatter_reduce_(0, column[wins], torch.nonzero(wins).squeeze(1), "amin")
        sold = torch.nonzero(winner < n).squeeze(1)
        won = winner[sold]
        evicted = owner[sold]
        owner[sold] = free[won]
        price[sold] = top[sold]
        lost = torch.ones(len(free), dtype=torch.bool, device=device)
        lost[won] = False
        free = torch.cat([free[lost], evicted[evicted >= 0]])
    if len(free):
        _place_rest(cost, owner, free)
    return owner, price * step, rounds


def _place_rest(cost: Cost, owner: Tensor, free: Tensor) -> None:
    """Gives the columns that nobody owns to the free rows, exactly: unless the rounds ran out, they are few."""
    columns = torch.nonzero(owner < 0).squeeze(1)
    block = cost.rows(free)[:, columns]
    row, col = linear_sum_assignment(block.cpu().numpy())
    owner[columns[torch.as_tensor(col, device=owner.device)]] = free[torch.as_tensor(row, device=owner.device)]


def _push_relabel(
    cost: Cost, low: float, slack: float, delta: float, a: Tensor, b: Tensor, seed: int, most_rounds: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Entries `(rows, cols, mass)`, the columns' prices `(m,)` in units of the cost, and the rounds taken.

    Costs are rounded down to whole steps. The mass of a column is sold at its price `p` or, once sold at `p`, costs
    `p + 1`; when nothing is left at `p` the price rises (the two dual values a vertex may have in Lahn et al. 2023,
    section 4). Free rows offer all their mass to the column that is cheapest for them; whoever held that mass at `p`
    is pushed out and becomes free.
    """
    m = cost.shape[1]
    step = slack * _PUSH_STEP
    bids = _Bids(cost, low, step, 1.0, floor=True, seed=seed)
    device = cost.device
    price = torch.zeros(m, dtype=cost.dtype, device=device)
    price[b == 0] = torch.inf  # nothing to sell there
    unsold = b.clone()  # at price 0, which is the price of a column until all of it is sold
    supply = a.clone()
    # What has been sold: at the price of the column (settled, may be pushed out) or one above (fresh).
    rows = torch.zeros(0, dtype=torch.long, device=device)
    cols, mass, fresh = rows.clone(), torch.zeros(0, dtype=a.dtype, device=device), rows.bool()
    rounds = 0
    while float(supply.sum()) > delta * _PUSH_REST and rounds < most_rounds:
        rounds += 1
        free = torch.nonzero(supply > 0).squeeze(1)
        column = torch.cat([chunk.add_(price).argmin(dim=1) for chunk in bids.chunks(free)])
        settled = torch.where(fresh, 0.0, mass)
        on_sale = unsold + torch.zeros_like(b).index_add_(0, cols, settled)
        taken = _shares(column, supply[free], on_sale)
        sold = torch.zeros_like(b).index_add_(0, column, taken)
        emptied = sold >= on_sale
        from_unsold = torch.minimum(unsold, sold)
        unsold = unsold - from_unsold
        pushed = _shares(cols, settled, sold - from_unsold)
        supply.index_add_(0, rows, pushed).index_add_(0, free, -taken).clamp_(min=0)
        rows, cols = torch.cat([rows, free]), torch.cat([cols, column])
        mass, fresh = torch.cat([mass - pushed, taken]), torch.cat([fresh, torch.ones_like(column, dtype=torch.bool)])
        fresh &= ~emptied[cols]
        price += emptied
        keep = mass > 0
        rows, cols, mass, fresh = _merged(rows[keep], cols[keep], mass[keep], fresh[keep], m)
    rest_a = (a - torch.zeros_like(a).index_add_(0, rows, mass)).clamp_(min=0)
    rest_b = (b - torch.zeros_like(b).index_add_(0, cols, mass)).clamp_(min=0)
    extra_rows, extra_cols, extra_mass = _northwest_corner(rest_a, rest_b)
    # Dear enough that no row's dual rests on a column without mass; the second c-transform sets that column's own.
    price[b == 0] = price[b > 0].max() + 1 / (delta * _PUSH_STEP)
    return (
        torch.cat([rows, extra_rows]),
        torch.cat([cols, extra_cols]),
        torch.cat([mass, extra_mass]),
        price * step,
        rounds,
    )


def _shares(group: Tensor, wanted: Tensor, available: Tensor) -> Tensor:
    """How much of `wanted`, `(k,)`, each gets when the members of a `group` are served in order from `available`."""
    order = torch.argsort(group, stable=True)
    sorted_group, sorted_wanted = group[order], wanted[order]
    before = sorted_wanted.cumsum(0) - sorted_wanted
    first = torch.ones_like(sorted_group, dtype=torch.bool)
    first[1:] = sorted_group[1:] != sorted_group[:-1]
    start = torch.zeros_like(available).index_put_((sorted_group[first],), before[first])
    left = available[sorted_group] - (before - start[sorted_group])
    share = torch.minimum(left, sorted_wanted).clamp_(min=0)
    return torch.empty_like(wanted).index_copy_(0, order, share)


def _merged(rows: Tensor, cols: Tensor, mass: Tensor, fresh: Tensor, m: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The entries with those of one row, column and price added up."""
    key, index = torch.unique((rows * m + cols) * 2 + fresh, return_inverse=True)
    total = torch.zeros(len(key), dtype=mass.dtype, device=mass.device).index_add_(0, index, mass)
    return key // 2 // m, key // 2 % m, total, key % 2 == 1


def _northwest_corner(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Entries of a coupling of `a`, `(n,)`, and `b`, `(m,)`: both laid end to end on one line, and read off."""
    ends_a, ends_b = a.cumsum(0), b.cumsum(0)
    ends = torch.cat([ends_a, ends_b]).sort().values
    mass = torch.diff(ends, prepend=ends.new_zeros(1))
    ends, mass = ends[mass > 0], mass[mass > 0]
    middle = ends - mass / 2
    rows = torch.searchsorted(ends_a, middle).clamp_(max=len(a) - 1)
    cols = torch.searchsorted(ends_b, middle).clamp_(max=len(b) - 1)
    return rows, cols, mass
