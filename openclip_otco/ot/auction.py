"""An auction of columns to rows, and the plan that it has come to.

Bertsekas' Jacobi auction (*Annals of Operations Research* 14, 1988; 20, 1989 for general marginals): all rows that are
free bid at once, so that every round is a few operations over those rows, on a CPU or a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openclip_otco.ot.candidates import CandidateLists
from openclip_otco.ot.cost import Cost
from openclip_otco.ot.ledger import Ledger
from openclip_otco.ot.sparse_plan import SparsePlan, certified

# The bidding first stops with a step of `δ` and a free share of `6δ`, but of no more than a tenth. On trained features
# the plan is then just about good enough. Each time it is not, the larger cause of the error is made smaller.
_STEP = 1.0
_FREE_SHARE = 6.0
_LARGEST_FREE_SHARE = 0.1
# The step grows by this factor when the bidding with it has not ended after so many rounds.
_PATIENCE = 100
_FACTOR = 4
# Ties are broken by a noise of this share of `δ`.
_NOISE = 0.02


class Auction:
    """Columns are sold to the rows that bid for them, until no more than a given share of the mass is free.

    Prices and steps are in shares of the cost's range.

    Args:
        cost: `(n, m)`.
        low, spread: its least entry and its range, which is above zero.
        row_mass, col_mass: `(n,)` and `(m,)` float64 marginals.
        ledger: of these marginals, with nothing sold.
        additive_error: `δ`.
        seed: of the noise that breaks ties.

    Attributes:
        price: `(m,)`, infinite for a column without mass.
        step: how much more than necessary a row bids.
        largest_free_share: the bidding stops when so much of the mass is free, or less.
        rounds: of bidding so far.
    """

    def __init__(
        self,
        cost: Cost,
        low: float,
        spread: float,
        row_mass: Tensor,
        col_mass: Tensor,
        ledger: Ledger,
        additive_error: float,
        seed: int,
    ) -> None:
        self.cost, self.spread, self.row_mass, self.col_mass = cost, spread, row_mass, col_mass
        self.ledger, self.additive_error = ledger, additive_error
        self.price = torch.zeros(cost.shape[1], dtype=cost.dtype, device=cost.device)
        self.price[col_mass == 0] = torch.inf  # nothing to sell there
        self.lists = CandidateLists(cost, low, spread, _NOISE * additive_error, self.price, seed)
        self.step = _STEP * additive_error
        self.largest_free_share = min(_FREE_SHARE * additive_error, _LARGEST_FREE_SHARE)
        self.rounds = 0

    @property
    def done(self) -> bool:
        """Whether enough of the mass is placed."""
        return self.ledger.free_share() <= self.largest_free_share

    def bid(self, most_rounds: int) -> None:
        """Bids until it is done, for `most_rounds` rounds at most.

        A free row bids for the column that is cheapest for it, as much more as would make the second cheapest as good,
        and one step on top. What the row then holds is within a step of its best choice, however other prices rise.
        """
        last = self.rounds + most_rounds
        while not self.done and self.rounds < last:
            self.rounds += 1
            rows = self.ledger.free()
            columns, gap = self.lists.bids(rows, self.price)
            self.ledger.sell(rows, columns, self.price[columns] + gap + self.step, self.price)

    def end_price_wars(self) -> None:
        """Bids with longer and longer steps until it is done, or the step is as long as the cost's range.

        Price wars, where many rows fight for few columns a step at a time, can take 1/δ² rounds. Longer steps end them.
        The plan is worse for it, until `refine` repairs it by shorter steps, from the prices that were found.
        """
        while not self.done and self.step < 1:
            self.bid(_PATIENCE)
            if not self.done:
                self.step *= _FACTOR

    def plan(self) -> SparsePlan:
        """A coupling of all mass as it stands, what is free with what is unsold, and duals made from the prices."""
        parts = zip(self.ledger.placed(), self.ledger.place_free(self.cost), strict=True)
        rows, cols, mass = (torch.cat(both) for both in parts)
        duals = -self.price * self.spread
        return certified(self.cost, self.row_mass, self.col_mass, rows, cols, mass, duals, self.spread, self.rounds)

    def refine(self, plan: SparsePlan) -> None:
        """Shortens the steps or halves the free share, whichever makes most of the error of the present `plan`."""
        rows, columns, mass = self.ledger.placed()
        # By how much each entry misses its row's best price: the error, entry by entry.
        excess = (self.cost.entries(rows, columns) - plan.f[rows]) / self.spread + self.price[columns]
        if float((mass * excess).sum()) > self.additive_error / 2:
            self.step /= _FACTOR if plan.additive_error > _FACTOR * self.additive_error else 2
            self.ledger.release(excess > self.step, self.price)
        else:
            self.largest_free_share /= 2
