"""Windows: how many pairs are coupled at a time, and where one window ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def windows(batches: Iterable[list[T]], size: int) -> Iterator[tuple[list[T], T | None]]:
    """The items of `batches`, in order, `size` at a time, each time with the first item behind them, if there is one.

    The last window has between half as many and one and a half times as many, as the last few pairs would have nothing
    to be compared with: a window is given out only when half a window lies behind it, and at the end what is left is
    one. (Fewer than half a window of items in all are a window as well.)
    """
    kept: list[T] = []
    for batch in batches:
        kept += batch
        while 2 * len(kept) >= 3 * size:
            yield kept[:size], kept[size]
            kept = kept[size:]
    if kept:
        yield kept, None
