"""Ledgers of an auction: which row holds how much of which column, and at what price."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from openclip_otco.ot.cost import Cost, rows_per_tile

# Mass is counted in whole units, 2^60 to all of it: sums are exact, and so are the marginals.
_UNITS = 2**60
# Free mass is placed exactly, if its rows and the unsold columns make a matrix of no more entries than this.
_EXACT_ENTRIES = 2**19


class Ledger(Protocol):
    """What the auction asks of a ledger. The price of a column, `(m,)`, is that of its cheapest mass."""

    def free(self) -> Tensor:
        """Rows with mass to place, `(k,)`."""
        ...

    def free_share(self) -> float:
        """The share of all mass that the free rows hold, in `[0, 1]`."""
        ...

    def sell(self, rows: Tensor, columns: Tensor, offers: Tensor, price: Tensor) -> None:
        """Row `rows[i]` offers `offers[i]` for `columns[i]`; the highest offers win, and `price` is raised in place."""
        ...

    def placed(self) -> tuple[Tensor, Tensor, Tensor]:
        """What is sold: rows, columns and masses, `(k,)` each."""
        ...

    def place_free(self, cost: Cost) -> tuple[Tensor, Tensor, Tensor]:
        """A coupling of the free mass with what is unsold: rows, columns and masses, `(k,)` each. Nothing is sold.

        Where few rows are free, no such coupling has a lower `cost`, `(n, m)`.
        """
        ...

    def release(self, which: Tensor, price: Tensor) -> None:
        """Takes back the entries of `placed` where `which`, `(k,)`, is true: their rows are free again.

        What they held is for sale at its column's `price`, `(m,)`.
        """
        ...


class AssignmentLedger:
    """`n` rows and `n` columns that all hold the same mass: a column belongs to one row, or to none."""

    def __init__(self, n: int, device: torch.device) -> None:
        self.n = n
        self.owner = torch.full((n,), -1, device=device)
        self._free = torch.arange(n, device=device)

    def free(self) -> Tensor:
        """As `Ledger.free`."""
        return self._free

    def free_share(self) -> float:
        """As `Ledger.free_share`."""
        return len(self._free) / self.n

    def sell(self, rows: Tensor, columns: Tensor, offers: Tensor, price: Tensor) -> None:
        """As `Ledger.sell`."""
        top = torch.full_like(price, -torch.inf).scatter_reduce_(0, columns, offers, "amax")
        wins = torch.nonzero(offers == top[columns]).squeeze(1)
        # The first of equal offers gets the column: each column has one winner, which does not depend on timing.
        winner = torch.full_like(self.owner, len(rows)).scatter_reduce_(0, columns[wins], wins, "amin")
        sold = torch.nonzero(winner < len(rows)).squeeze(1)
        winner = winner[sold]
        evicted = self.owner[sold]
        self.owner[sold] = rows[winner]
        price[sold] = top[sold]
        lost = torch.ones_like(rows, dtype=torch.bool)
        lost[winner] = False
        self._free = torch.cat([rows[lost], evicted[evicted >= 0]])

    def placed(self) -> tuple[Tensor, Tensor, Tensor]:
        """As `Ledger.placed`."""
        columns = torch.nonzero(self.owner >= 0).squeeze(1)
        return self.owner[columns], columns, self._mass(columns)

    def place_free(self, cost: Cost) -> tuple[Tensor, Tensor, Tensor]:
        """As `Ledger.place_free`."""
        unsold = torch.nonzero(self.owner < 0).squeeze(1)
        if len(unsold) ** 2 > _EXACT_ENTRIES:
            return self._free, unsold, self._mass(unsold)
        rows, columns = linear_sum_assignment(_block(cost, self._free, unsold).cpu().numpy())
        rows, columns = (torch.as_tensor(index, device=unsold.device) for index in (rows, columns))
        return self._free[rows], unsold[columns], self._mass(unsold)

    def release(self, which: Tensor, price: Tensor) -> None:
        """As `Ledger.release`."""
        columns = torch.nonzero(self.owner >= 0).squeeze(1)[which]
        self._free = torch.cat([self._free, self.owner[columns]])
        self.owner[columns] = -1

    def _mass(self, columns: Tensor) -> Tensor:
        return torch.full(columns.shape, 1 / self.n, dtype=torch.float64, device=columns.device)


class Lots(NamedTuple):
    """Lots of mass, `(k,)` each: each is part of one column, and belongs to one row at one price."""

    row: Tensor
    """The row that holds the lot; -1 for a lot that is unsold."""
    column: Tensor
    mass: Tensor
    """In whole units, int64."""
    price: Tensor

    def at(self, index: Tensor) -> Lots:
        """The lots at the places `index`, or those where a mask is true."""
        return Lots(self.row[index], self.column[index], self.mass[index], self.price[index])

    def cheapest_first(self, on_sale: Tensor) -> Lots:
        """The lots where `on_sale`, `(k,)`, is true, sorted by column; the cheapest of a column comes first."""
        order = torch.nonzero(on_sale).squeeze(1)
        order = order[self.price[order].argsort(stable=True)]
        return self.at(order[self.column[order].argsort(stable=True)])


class Bids(NamedTuple):
    """Bids, `(k,)` each: a row offers a price for mass of a column, and wants as much as it has to place."""

    row: Tensor
    column: Tensor
    offer: Tensor
    wanted: Tensor
    """In whole units, int64."""

    def highest_first(self) -> Bids:
        """The bids, sorted by column; the highest offer for a column comes first."""
        order = self.offer.argsort(descending=True, stable=True)
        order = order[self.column[order].argsort(stable=True)]
        return Bids(*(values[order] for values in self))


class TransportLedger:
    """Rows and columns of any masses: a column is sold in lots, each to one row at one price.

    Bertsekas, Castañon, *The auction algorithm for the transportation problem*, Annals of Operations Research 20, 1989.

    Args:
        a, b: `(n,)` and `(m,)` float64 masses of rows and columns; each sums to one.
        dtype: of the prices.
    """

    def __init__(self, a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
        self.supply = _in_units(a)
        mass = _in_units(b)
        columns = torch.nonzero(mass).squeeze(1)
        unsold = torch.full_like(columns, -1)
        price = torch.zeros(len(columns), dtype=dtype, device=columns.device)
        self.lots = Lots(unsold, columns, mass[columns], price)

    def free(self) -> Tensor:
        """As `Ledger.free`."""
        return torch.nonzero(self.supply).squeeze(1)

    def free_share(self) -> float:
        """As `Ledger.free_share`."""
        return int(self.supply.sum()) / _UNITS

    def sell(self, rows: Tensor, columns: Tensor, offers: Tensor, price: Tensor) -> None:
        """Row `rows[i]` offers `offers[i]` for `columns[i]`: the highest offers take the cheapest lots.

        The lots of a column lie end to end on a line, the cheapest first. The bidders for that column lie end to end on
        the same line, the highest offer first, each as long as the mass that it has to place. A bidder buys the mass
        that lies in front of it, if that costs less than its offer. A row that loses mass in this way is free again.

        Three rows of masses 1/2, 1/4, 1/4 bid for column 0, which holds 1/2 and is not sold yet. Row 1 offers most,
        then row 2, and nothing is left for row 0:

            column 0:  |--- unsold, at 0 ---------------|
            bidders:   |--- row 1, 0.3 -|- row 2, 0.2 --|------- row 0, 0.1 -------|

        >>> mass = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
        >>> ledger, price = TransportLedger(mass, mass, torch.float64), torch.zeros(3, dtype=torch.float64)
        >>> offers = torch.tensor([0.1, 0.3, 0.2], dtype=torch.float64)
        >>> ledger.sell(torch.tensor([0, 1, 2]), torch.tensor([0, 0, 0]), offers, price)
        >>> def show():
        ...     for row, column, mass in zip(*ledger.placed()):
        ...         print(f"row {row} holds {mass} of column {column}")
        ...     print("free:", ledger.free().tolist(), "prices:", price.tolist())
        >>> show()
        row 1 holds 0.25 of column 0
        row 2 holds 0.25 of column 0
        free: [0] prices: [0.2, 0.0, 0.0]

        Then row 0 offers 0.25. That is more than row 2 has paid, and less than row 1 has paid:

            column 0:  |- row 2, at 0.2 |- row 1, at 0.3|
            bidders:   |--------- row 0, 0.25 ----------|

        >>> ledger.sell(torch.tensor([0]), torch.tensor([0]), torch.tensor([0.25], dtype=torch.float64), price)
        >>> show()
        row 0 holds 0.25 of column 0
        row 1 holds 0.25 of column 0
        free: [0, 2] prices: [0.25, 0.0, 0.0]
        """
        has_bids = torch.zeros_like(price, dtype=torch.bool)
        has_bids[columns] = True
        on_sale = has_bids[self.lots.column]
        lots = self.lots.cheapest_first(on_sale)
        bids = Bids(rows, columns, offers, self.supply[rows]).highest_first()
        lot_end = lots.mass.cumsum(0)
        stretches = _stretches(lot_end, *_places_of_bids(lots, lot_end, bids, len(price)))
        sold = stretches.in_front & (lots.price[stretches.lot] < bids.offer[stretches.bid])
        self._pay(lots, bids, stretches, sold)
        unchanged, changed = self.lots.at(~on_sale), _lots_after(lots, bids, stretches, sold)
        self.lots = Lots(*(torch.cat(parts) for parts in zip(unchanged, changed, strict=True)))
        least = torch.full_like(price, torch.inf).scatter_reduce_(0, self.lots.column, self.lots.price, "amin")
        price[has_bids] = least[has_bids]

    def _pay(self, lots: Lots, bids: Bids, stretches: _Stretches, sold: Tensor) -> None:
        """Takes the sold mass from what the buyers have to place, and gives it to the rows that held it before."""
        self.supply.index_add_(0, bids.row[stretches.bid[sold]], -stretches.length[sold])
        evicted = sold & (lots.row[stretches.lot] >= 0)
        self.supply.index_add_(0, lots.row[stretches.lot[evicted]], stretches.length[evicted])

    def placed(self) -> tuple[Tensor, Tensor, Tensor]:
        """As `Ledger.placed`."""
        sold = self.lots.at(self.lots.row >= 0)
        return sold.row, sold.column, sold.mass.double() / _UNITS

    def place_free(self, cost: Cost) -> tuple[Tensor, Tensor, Tensor]:
        """As `Ledger.place_free`."""
        rows, unsold = self.free(), self.lots.at(self.lots.row < 0)
        columns, supply, demand = unsold.column, self.supply[rows], unsold.mass
        if len(rows) * len(columns) > _EXACT_ENTRIES or not len(rows):
            return _end_to_end(rows, columns, supply, demand)
        # Not at the top: POT looks for JAX, TensorFlow and CuPy when it is imported, and most plans do without.
        import ot as pot

        total = float(supply.sum())
        block = _block(cost, rows, columns).double()
        # POT takes negative costs for infeasible ones, and its tolerances are absolute.
        block = (block - block.min()) / (block.max() - block.min()).clamp(min=torch.finfo(torch.float64).tiny)
        plan, log = pot.emd(
            (supply.double() / total).cpu().numpy(), (demand.double() / total).cpu().numpy(), block.cpu().numpy(),
            numItermax=1_000_000, log=True,
        )  # fmt: skip
        if log["warning"]:
            return _end_to_end(rows, columns, supply, demand)
        plan = torch.as_tensor(plan, device=rows.device)
        i, j = torch.nonzero(plan, as_tuple=True)
        return rows[i], columns[j], plan[i, j] * (total / _UNITS)

    def release(self, which: Tensor, price: Tensor) -> None:
        """As `Ledger.release`."""
        places = torch.nonzero(self.lots.row >= 0).squeeze(1)[which]
        released = self.lots.at(places)
        self.supply.index_add_(0, released.row, released.mass)
        self.lots.row[places] = -1
        self.lots.price[places] = price[released.column]


def _places_of_bids(lots: Lots, lot_end: Tensor, bids: Bids, columns: int) -> tuple[Tensor, Tensor]:
    """Where each bid starts and ends on the line of lots, `(k,)` each.

    A bid starts where the one before it in its column ends; the first starts where the column's lots start. What lies
    beyond the column's lots is cut off.

    Args:
        lots, bids: sorted by column.
        lot_end: where each lot ends on the line.
        columns: number of columns.
    """
    column_end = lot_end.new_zeros(columns).scatter_reduce_(0, lots.column, lot_end, "amax")
    column_mass = torch.zeros_like(column_end).index_add_(0, lots.column, lots.mass)
    # First end to end as if there were no columns, and then each column's bids moved to the column's start.
    end = bids.wanted.cumsum(0)
    start = end - bids.wanted
    first = torch.ones_like(bids.column, dtype=torch.bool)
    first[1:] = bids.column[1:] != bids.column[:-1]
    first_start = torch.zeros_like(column_end).index_put_((bids.column[first],), start[first])
    limit = column_end[bids.column]
    shift = limit - column_mass[bids.column] - first_start[bids.column]
    return torch.minimum(start + shift, limit), torch.minimum(end + shift, limit)


class _Stretches(NamedTuple):
    """The line of lots, cut wherever a lot or a bid starts or ends; `(k,)` each, from left to right."""

    length: Tensor
    """In whole units, above zero."""
    lot: Tensor
    """The lot that the stretch is part of."""
    bid: Tensor
    """The bid that lies in front of the stretch."""
    in_front: Tensor
    """Whether any bid does; where not, `bid` means nothing."""


def _stretches(lot_end: Tensor, start: Tensor, end: Tensor) -> _Stretches:
    """The line, cut where lots end, at `lot_end`, and where bids do, at `start` and `end`."""
    cuts = torch.cat([lot_end, start, end]).unique()
    left = torch.cat([cuts.new_zeros(1), cuts[:-1]])
    length = cuts - left
    left, length = left[length > 0], length[length > 0]
    lot = torch.searchsorted(lot_end, left, right=True)
    bid = torch.searchsorted(end, left, right=True).clamp_(max=len(end) - 1)
    return _Stretches(length, lot, bid, (start[bid] <= left) & (left < end[bid]))


def _lots_after(lots: Lots, bids: Bids, stretches: _Stretches, sold: Tensor) -> Lots:
    """What the `lots` on sale are after the sale of the stretches where `sold`, `(k,)`, is true."""
    # A bidder's stretches are neighbours, as the cheapest mass goes to the highest offer: they make one lot.
    holder, index = torch.where(sold, stretches.bid, stretches.lot + len(bids.row)).unique_consecutive(
        return_inverse=True
    )
    mass = torch.zeros_like(holder).index_add_(0, index, stretches.length)
    bought = holder < len(bids.row)
    bid, lot = torch.where(bought, holder, 0), torch.where(bought, 0, holder - len(bids.row))
    return Lots(
        torch.where(bought, bids.row[bid], lots.row[lot]),
        torch.where(bought, bids.column[bid], lots.column[lot]),
        mass,
        torch.where(bought, bids.offer[bid], lots.price[lot]),
    )


def _block(cost: Cost, rows: Tensor, columns: Tensor) -> Tensor:
    """`C[rows][:, columns]`, which asks for no more than a tile of the cost at a time."""
    return torch.cat([cost.rows(part)[:, columns] for part in rows.split(rows_per_tile(cost))])


def _in_units(mass: Tensor) -> Tensor:
    """Masses that sum to one, in whole units that sum to `_UNITS`."""
    units = (mass * _UNITS).round().long()
    units[mass.argmax()] += _UNITS - units.sum()
    return units


def _end_to_end(rows: Tensor, columns: Tensor, supply: Tensor, demand: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A coupling that ignores the cost: supply and demand lie end to end on two lines, and what is at one place is
    coupled. Both have the same sum of units."""
    row_end, column_end = supply.cumsum(0), demand.cumsum(0)
    cuts = torch.cat([row_end, column_end]).unique()
    left = torch.cat([cuts.new_zeros(min(1, len(cuts))), cuts[:-1]])
    row, column = torch.searchsorted(row_end, left, right=True), torch.searchsorted(column_end, left, right=True)
    return rows[row], columns[column], (cuts - left).double() / _UNITS
