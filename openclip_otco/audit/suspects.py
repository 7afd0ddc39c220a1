"""The most suspicious pairs so far: only these can come into the gallery."""

from __future__ import annotations

import bisect
from collections.abc import Iterable

from openclip_otco.audit.table import Order


class Worst:
    """The places in the ranking of the `top` worst pairs that were seen so far."""

    def __init__(self, top: int, seen: Iterable[Order] = ()) -> None:
        self.top = top
        self._first: list[Order] = []
        for order in seen:
            self.admits(order)

    def admits(self, order: Order) -> bool:
        """Add a pair, and say whether it is now among the worst."""
        if len(self._first) == self.top and (not self.top or order >= self._first[-1]):
            return False
        bisect.insort(self._first, order)
        del self._first[self.top :]
        return True
