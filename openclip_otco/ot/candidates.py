"""Candidate lists: the few columns that are cheapest for a row, so that a bid need not look at the whole row.

Prices only rise, so columns off the list have not become cheaper since the list was made. As long as a column on the
list costs no more than the cheapest column off the list did then, the list answers as the whole row would (the "third
best" device of auction codes; Bertsekas, *Linear Network Optimization*, MIT Press 1991).
"""

from __future__ import annotations

import torch
from torch import Tensor

from openclip_otco.ot.cost import Cost, rows_per_tile, tiles

# Columns on a list.
_LIST_SIZE = 16


class CandidateLists:
    """The cheapest columns of each row of a cost. Costs and prices are in shares of the cost's range.

    A noise is added to the cost. Without it, rows with equal costs would all bid for the same column, and a round would
    sell only one. The noise of entry `(i, j)` is `r[i + j]` for one random vector `r`. So rows with equal costs prefer
    different columns, and the noise of a matrix is a view of `r`, which takes no memory.

    Args:
        cost: `(n, m)`, not constant.
        low, spread: its least entry and its range.
        noise: the noise lies in `[0, noise)`.
        price: `(m,)` first prices.
        seed: of the noise.

    Attributes:
        columns: `(n, k)`, the list of each row.
        costs: `(n, k)`, what these columns cost the row, with noise and without price.
        least_off_list: `(n,)`, what each column off the list costs the row at least, with price.
    """

    def __init__(self, cost: Cost, low: float, spread: float, noise: float, price: Tensor, seed: int) -> None:
        self.cost, self.low, self.spread = cost, low, spread
        n, m = cost.shape
        random = torch.rand(n + m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self._noise = (random * noise).to(cost.device, cost.dtype).unfold(0, m, 1)
        size = min(_LIST_SIZE, m)
        self.columns = torch.empty(n, size, dtype=torch.long, device=cost.device)
        self.costs = torch.empty(n, size, dtype=cost.dtype, device=cost.device)
        self.least_off_list = torch.empty(n, dtype=cost.dtype, device=cost.device)
        self._work = torch.empty(3, min(rows_per_tile(cost), n), m, dtype=cost.dtype, device=cost.device)
        for tile in tiles(cost):
            self._make_lists(tile, price)

    def bids(self, rows: Tensor, price: Tensor) -> tuple[Tensor, Tensor]:
        """For each of `rows`, `(k,)`: its cheapest column at the prices `(m,)`, and how much more the second costs.

        The difference may be too small. The bid is then lower than it could be, and still right.
        """
        column, best, second = self._two_cheapest(rows, price)
        outdated = best > self.least_off_list[rows]
        if bool(outdated.any()):
            for part in rows[outdated].split(rows_per_tile(self.cost)):
                self._make_lists(part, price)
            column[outdated], best[outdated], second[outdated] = self._two_cheapest(rows[outdated], price)
        gap = torch.minimum(second, self.least_off_list[rows]) - best
        return column, torch.where(gap.isfinite(), gap, 0.0)

    def _two_cheapest(self, rows: Tensor, price: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """On the lists of `rows`: the cheapest column, what it costs with its price, and what the second one does."""
        columns = self.columns[rows]
        values, order = (self.costs[rows] + price[columns]).topk(min(2, columns.shape[1]), dim=1, largest=False)
        return columns.gather(1, order[:, :1]).squeeze(1), values[:, 0], values[:, -1]

    def _make_lists(self, rows: slice | Tensor, price: Tensor) -> None:
        """Makes the lists of `rows` anew, at the prices `(m,)`."""
        size = len(rows) if isinstance(rows, Tensor) else rows.stop - rows.start
        rows_memory, work, priced = self._work[:, :size]
        costs = torch.sub(self.cost.rows(rows, rows_memory), self.low, out=work)
        costs.div_(self.spread).add_(self._noise[rows])
        list_size = self.columns.shape[1]
        values, columns = torch.add(costs, price, out=priced).topk(list_size, dim=1, largest=False, sorted=False)
        self.least_off_list[rows] = values.amax(dim=1) if list_size < costs.shape[1] else torch.inf
        self.columns[rows] = columns
        self.costs[rows] = costs.gather(1, columns)
