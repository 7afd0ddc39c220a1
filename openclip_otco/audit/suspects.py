"""The most suspicious pairs: which ones of a window may come into the gallery."""

from __future__ import annotations

import heapq
from collections.abc import Iterable


class Worst:
    """The `top` lowest of the scores seen so far, and nothing else."""

    def __init__(self, top: int, scores: Iterable[float] = ()) -> None:
        self.top = top
        self._heap: list[float] = []  # negative, so that the highest of the lowest comes first
        for score in scores:
            self.admits(score)

    def admits(self, score: float) -> bool:
        """Whether `score` is among the lowest now; if so, it is kept."""
        if len(self._heap) < self.top:
            heapq.heappush(self._heap, -score)
            return True
        if self._heap and -score > self._heap[0]:
            heapq.heapreplace(self._heap, -score)
            return True
        return False
