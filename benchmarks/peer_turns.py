"""Who answers the calls of a peer's test: this package each time, or the peer and this package in turns."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


class Turns:
    """Counts the calls of one test. Where the peer and this package take turns, the peer answers the first call: a test
    that compares two answers then compares theirs with ours.

    Args:
        every: this package answers each `every`-th call: 1, all of them; 2, every other one.

    Attributes:
        ours: calls that this package answered.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.asked = self.ours = 0
        self._answering = False

    def between(self, theirs: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
        """A function that hands each call to `theirs` or to `ours`."""

        @functools.wraps(theirs)
        def answer(*args: Any, **kwargs: Any) -> Any:
            if self._answering:  # one of the two calls the other, as `exact_plan` calls `ot.emd`
                return theirs(*args, **kwargs)
            self.asked += 1
            mine = self.asked % self.every == 0
            self.ours += mine
            self._answering = True
            try:
                return (ours if mine else theirs)(*args, **kwargs)
            finally:
                self._answering = False

        return answer
