"""Candidate lists: the few columns that each row may want, so that a bid need not look at the whole row.

Prices only rise. What a row saw beyond its list when it was last looked at can only have become dearer since, so as
long as something on the list is no dearer than the cheapest of the rest was then, the list answers as the row would
(the "third best" device of auction codes; Bertsekas, *Linear Network Optimization*, MIT Press 1991).
"""

from __future__ import annotations

import torch
from torch import Tensor

from openclip_otco.ot.cost import Cost, rows_per_tile, tiles

# Columns on a list.
_LIST = 16


class CandidateLists:
    """The cheapest columns of each row of a cost, in shares of the cost's range, with a noise that breaks ties.

    Without noise, equal costs would make all rows bid for the same column, in as many rounds as there are columns.
    The noise of entry `(i, j)` is `r[i + j]` for one random vector `r`: a view that costs no memory, equal whichever
    rows are asked for together, and under which rows of equal costs prefer different columns.

    Args:
        cost: `(n, m)`, not constant.
        low, spread: its least entry and its range.
        noise: the noise lies in `[0, noise)`, a share of the cost's range.
        price: `(m,)` first prices, in shares of the cost's range.
        seed: of the noise.
    """

    def __init__(self, cost: Cost, low: float, spread: float, noise: float, price: Tensor, seed: int) -> None:
        self.cost, self.low, self.spread = cost, low, spread
        n, m = cost.shape
        random = torch.rand(n + m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self._noise = (random * noise).to(cost.device, cost.dtype).unfold(0, m, 1)
        size = min(_LIST, m)
        self.columns = torch.empty(n, size, dtype=torch.long, device=cost.device)
        self.costs = torch.empty(n, size, dtype=cost.dtype, device=cost.device)
        self.beyond = torch.empty(n, dtype=cost.dtype, device=cost.device)  # what is off the list costs this at least
        self._work = torch.empty(3, min(rows_per_tile(cost), n), m, dtype=cost.dtype, device=cost.device)
        for tile in tiles(cost):
            self._look(tile, price)

    def bids(self, rows: Tensor, price: Tensor) -> tuple[Tensor, Tensor]:
        """For each of `rows`, `(k,)`: its cheapest column at the prices `(m,)`, and how much dearer the second is.

        That difference may be understated, which makes for a lower bid and not for a wrong one.
        """
        column, best, second = self._best(rows, price)
        outdated = best > self.beyond[rows]
        if bool(outdated.any()):
            for part in rows[outdated].split(rows_per_tile(self.cost)):
                self._look(part, price)
            column[outdated], best[outdated], second[outdated] = self._best(rows[outdated], price)
        gap = torch.minimum(second, self.beyond[rows]) - best
        return column, torch.where(gap.isfinite(), gap, 0.0)

    def _best(self, rows: Tensor, price: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        columns = self.columns[rows]
        values, order = (self.costs[rows] + price[columns]).topk(min(2, columns.shape[1]), dim=1, largest=False)
        return columns.gather(1, order[:, :1]).squeeze(1), values[:, 0], values[:, -1]

    def _look(self, rows: slice | Tensor, price: Tensor) -> None:
        """Makes the lists of `rows` anew."""
        size = len(rows) if isinstance(rows, Tensor) else rows.stop - rows.start
        made, work, priced = self._work[:, :size]
        costs = torch.sub(self.cost.rows(rows, made), self.low, out=work).div_(self.spread).add_(self._noise[rows])
        size = self.columns.shape[1]
        values, columns = torch.add(costs, price, out=priced).topk(size, dim=1, largest=False, sorted=False)
        self.beyond[rows] = values.amax(dim=1) if size < costs.shape[1] else torch.inf
        self.columns[rows] = columns
        self.costs[rows] = costs.gather(1, columns)
