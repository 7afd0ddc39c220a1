"""Ledgers of an auction: which row holds how much of which column, and at what price."""

from __future__ import annotations

from typing import Protocol

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from openclip_otco.ot.cost import Cost, rows_per_tile

# Mass is counted in whole units, 2^60 to all of it: sums are exact, and so are the marginals.
_UNITS = 2**60
# A rest of no more entries than this is placed exactly.
_EXACT_REST = 2**19


class Ledger(Protocol):
    """What the auction asks of a ledger. Prices `(m,)` are those of each column's cheapest mass."""

    def free(self) -> Tensor:
        """Rows with mass to place, `(k,)`."""
        ...

    def free_share(self) -> float:
        """How much of all the mass they hold."""
        ...

    def sell(self, rows: Tensor, columns: Tensor, offers: Tensor, price: Tensor) -> None:
        """Row `rows[i]` offers `offers[i]` for `columns[i]`; the highest offers win, and `price` is raised in place."""
        ...

    def placed(self) -> tuple[Tensor, Tensor, Tensor]:
        """What is sold: rows, columns and masses, `(k,)` each."""
        ...

    def rest(self, cost: Cost) -> tuple[Tensor, Tensor, Tensor]:
        """A coupling of what is free with what is unsold: rows, columns and masses."""
        ...

    def release(self, which: Tensor, price: Tensor) -> None:
        """Takes back the entries of `placed` where `which`, `(k,)`, is true."""
        ...


class AssignmentLedger:
    """Of `n` rows and columns that hold the same mass each, every column belongs to one row."""

    def __init__(self, n: int, device: torch.device) -> None:
        self.n = n
        self.owner = torch.full((n,), -1, device=device)
        self._free = torch.arange(n, device=device)

    def free(self) -> Tensor:
        return self._free

    def free_share(self) -> float:
        return len(self._free) / self.n

    def sell(self, rows: Tensor, columns: Tensor, offers: Tensor, price: Tensor) -> None:
        top = torch.full_like(price, -torch.inf).scatter_reduce_(0, columns, offers, "amax")
        wins = torch.nonzero(offers == top[columns]).squeeze(1)
        # Of equal offers the first gets the column: one winner a column, and no dependence on timing.
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
        columns = torch.nonzero(self.owner >= 0).squeeze(1)
        return self.owner[columns], columns, self._mass(columns)

    def rest(self, cost: Cost) -> tuple[Tensor, Tensor, Tensor]:
        unsold = torch.nonzero(self.owner < 0).squeeze(1)
        if len(unsold) ** 2 > _EXACT_REST:
            return self._free, unsold, self._mass(unsold)
        rows, columns = linear_sum_assignment(_block(cost, self._free, unsold).cpu().numpy())
        rows, columns = (torch.as_tensor(index, device=unsold.device) for index in (rows, columns))
        return self._free[rows], unsold[columns], self._mass(unsold)

    def release(self, which: Tensor, price: Tensor) -> None:
        columns = torch.nonzero(self.owner >= 0).squeeze(1)[which]
        self._free = torch.cat([self._free, self.owner[columns]])
        self.owner[columns] = -1

    def _mass(self, columns: Tensor) -> Tensor:
        return torch.full(columns.shape, 1 / self.n, dtype=torch.float64, device=columns.device)


class TransportLedger:
    """Rows and columns of any masses: a column is sold in lots, each to one row at one price.

    Bertsekas, Castañon, *The auction algorithm for the transportation problem*, Annals of Operations Research 20, 1989.
    """

    def __init__(self, a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
        self.supply = _in_units(a)
        mass = _in_units(b)
        held = torch.nonzero(mass).squeeze(1)
        # Lots, `(k,)` each. Row -1 holds what is unsold.
        self.row, self.col, self.mass = torch.full_like(held, -1), held, mass[held]
        self.price = torch.zeros(len(held), dtype=dtype, device=held.device)

    def free(self) -> Tensor:
        return torch.nonzero(self.supply).squeeze(1)

    def free_share(self) -> float:
        return int(self.supply.sum()) / _UNITS

    def sell(self, rows: Tensor, columns: Tensor, offers: Tensor, price: Tensor) -> None:
        wanted = torch.zeros_like(price, dtype=torch.bool)
        wanted[columns] = True
        on_sale = wanted[self.col]
        # The lots of each wanted column, cheapest first, laid end to end on one line of mass.
        lots = torch.nonzero(on_sale).squeeze(1)
        lots = lots[self.price[lots].argsort(stable=True)]
        lots = lots[self.col[lots].argsort(stable=True)]
        lot_end = self.mass[lots].cumsum(0)
        column_end = torch.zeros_like(price, dtype=torch.long).scatter_reduce_(0, self.col[lots], lot_end, "amax")
        column_mass = torch.zeros_like(column_end).index_add_(0, self.col[lots], self.mass[lots])
        # And the bidders for each column on the same line, the highest offer first.
        order = offers.argsort(descending=True, stable=True)
        order = order[columns[order].argsort(stable=True)]
        rows, columns, offers = rows[order], columns[order], offers[order]
        wish = self.supply[rows].cumsum(0)
        before = wish - self.supply[rows]
        first = torch.ones_like(columns, dtype=torch.bool)
        first[1:] = columns[1:] != columns[:-1]
        base = torch.zeros_like(column_end).index_put_((columns[first],), before[first])
        shift = column_end[columns] - column_mass[columns] - base[columns]
        start = torch.minimum(before + shift, column_end[columns])
        end = torch.minimum(wish + shift, column_end[columns])
        # Every stretch of the line lies in one lot and in front of at most one bidder.
        cuts = torch.cat([lot_end, start, end]).unique()
        left = torch.cat([cuts.new_zeros(1), cuts[:-1]])
        stretch = cuts - left
        left, stretch = left[stretch > 0], stretch[stretch > 0]
        lot = torch.searchsorted(lot_end, left, right=True)
        bidder = torch.searchsorted(end, left, right=True).clamp_(max=len(end) - 1)
        lot = lots[lot]
        sold = (start[bidder] <= left) & (left < end[bidder]) & (self.price[lot] < offers[bidder])
        self.supply.index_add_(0, rows[bidder[sold]], -stretch[sold])
        evicted = sold & (self.row[lot] >= 0)
        self.supply.index_add_(0, self.row[lot[evicted]], stretch[evicted])
        # A bidder's stretches are neighbours, as the cheapest mass goes to the highest offer: they make one lot.
        holder, index = torch.where(sold, bidder, lot + len(rows)).unique_consecutive(return_inverse=True)
        mass = torch.zeros_like(holder).index_add_(0, index, stretch)
        bought = holder < len(rows)
        buyer, seller = torch.where(bought, holder, 0), torch.where(bought, 0, holder - len(rows))
        keep = ~on_sale
        self.row = torch.cat([self.row[keep], torch.where(bought, rows[buyer], self.row[seller])])
        self.col = torch.cat([self.col[keep], torch.where(bought, columns[buyer], self.col[seller])])
        self.mass = torch.cat([self.mass[keep], mass])
        self.price = torch.cat([self.price[keep], torch.where(bought, offers[buyer], self.price[seller])])
        least = torch.full_like(price, torch.inf).scatter_reduce_(0, self.col, self.price, "amin")
        price[wanted] = least[wanted]

    def placed(self) -> tuple[Tensor, Tensor, Tensor]:
        sold = self.row >= 0
        return self.row[sold], self.col[sold], self.mass[sold].double() / _UNITS

    def rest(self, cost: Cost) -> tuple[Tensor, Tensor, Tensor]:
        rows, lots = self.free(), torch.nonzero(self.row < 0).squeeze(1)
        columns, supply, demand = self.col[lots], self.supply[rows], self.mass[lots]
        if len(rows) * len(lots) > _EXACT_REST or not len(rows):
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
        lots = torch.nonzero(self.row >= 0).squeeze(1)[which]
        self.supply.index_add_(0, self.row[lots], self.mass[lots])
        self.row[lots] = -1
        self.price[lots] = price[self.col[lots]]


def _block(cost: Cost, rows: Tensor, columns: Tensor) -> Tensor:
    """`C[rows][:, columns]`, with no more of the cost at a time than a tile."""
    return torch.cat([cost.rows(part)[:, columns] for part in rows.split(rows_per_tile(cost))])


def _in_units(mass: Tensor) -> Tensor:
    """Masses that sum to one, in whole units that sum to `_UNITS`."""
    units = (mass * _UNITS).round().long()
    units[mass.argmax()] += _UNITS - units.sum()
    return units


def _end_to_end(rows: Tensor, columns: Tensor, supply: Tensor, demand: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A coupling of equal sums of units without regard to cost: both laid on one line, and read off."""
    row_end, column_end = supply.cumsum(0), demand.cumsum(0)
    cuts = torch.cat([row_end, column_end]).unique()
    left = torch.cat([cuts.new_zeros(min(1, len(cuts))), cuts[:-1]])
    row, column = torch.searchsorted(row_end, left, right=True), torch.searchsorted(column_end, left, right=True)
    return rows[row], columns[column], (cuts - left).double() / _UNITS
