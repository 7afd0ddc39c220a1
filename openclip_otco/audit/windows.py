"""Windows: the pairs of the data are judged in groups of a fixed size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def windows(batches: Iterable[list[T]], size: int) -> Iterator[tuple[list[T], T | None]]:
    """Groups the items of `batches`, in their order, into windows of `size`; each comes with the next item, or None.

    The last window has between 0.5 and 1.5 times `size` items: fewer pairs would have too little to be compared with.
    So a window is given out only when half of the next one has been read. Data with fewer items are one window.
    """
    kept: list[T] = []
    for batch in batches:
        kept += batch
        while 2 * len(kept) >= 3 * size:
            yield kept[:size], kept[size]
            kept = kept[size:]
    if kept:
        yield kept, None
