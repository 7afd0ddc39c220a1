"""The most suspicious pairs: which ones of a window may come into the gallery."""

from __future__ import annotations

import bisect
from collections.abc import Iterable

from openclip_otco.audit.table import Order


class Worst:
    """The first `top` pairs of the order seen so far, and nothing else."""

    def __init__(self, top: int, seen: Iterable[Order] = ()) -> None:
        self.top = top
        self._first: list[Order] = []
        for order in seen:
            self.admits(order)

    def admits(self, order: Order) -> bool:
        """Whether `order` is among the first now; if so, it is kept."""
        if len(self._first) == self.top and (not self.top or order >= self._first[-1]):
            return False
        bisect.insort(self._first, order)
        del self._first[self.top :]
        return True
