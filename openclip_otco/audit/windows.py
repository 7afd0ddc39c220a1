"""Windows: the pairs of the data are judged in groups of a fixed size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Window(Generic[T]):
    """Items that are judged together.

    Attributes:
        items: all of them.
        judged: so many items in front were in the window before, and are judged already.
        following: the next item of the data, or None if it is not read yet.
        is_last: whether no item can follow.
    """

    items: list[T]
    judged: int = 0
    following: T | None = None
    is_last: bool = False


def second_half(size: int) -> slice:
    """The items of a window of `size` that are judged once more beside the last items of the data, if these are few."""
    return slice(size // 2, size)


def windows(batches: Iterable[list[T]], size: int, half_before: Callable[[], list[T]] = list) -> Iterator[Window[T]]:
    """Groups the items of `batches`, in their order, into windows of `size`, each as soon as it is full.

    At the end of the data, some items are left. If they are fewer than half a window, they have too little to be
    compared with. Then the second half of the window before is put in front of them.

    Args:
        batches: the items.
        size: of a window, at least 1.
        half_before: gives the second half of the window that came before `batches`; no items if there was none. It is
            only called if it is needed.
    """
    kept: list[T] = []
    half: list[T] | None = None
    for batch in batches:
        kept += batch
        while len(kept) >= size:
            half = kept[second_half(size)]
            full = Window(kept[:size], following=kept[size] if len(kept) > size else None)
            del kept[:size]
            yield full
            del full  # it would stay in memory until the next one is full
    if kept:
        if 2 * len(kept) >= size:
            half = []
        elif half is None:
            half = half_before()
        yield Window(half + kept, judged=len(half), is_last=True)
