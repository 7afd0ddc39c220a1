"""The most suspicious pairs: which ones of a window deserve a thumbnail, and the thumbnail."""

from __future__ import annotations

import heapq
import io
from collections.abc import Iterable

from PIL import Image

_EDGE = 256
_QUALITY = 80


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


def thumbnail(file: bytes) -> bytes:
    """A JPEG of at most 256 pixels a side, of an image file that was decoded before."""
    with Image.open(io.BytesIO(file)) as image:
        image.draft("RGB", (2 * _EDGE, 2 * _EDGE))  # JPEG decoders may as well decode fewer pixels
        small = image.convert("RGB")
    small.thumbnail((_EDGE, _EDGE))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=_QUALITY)
    return stream.getvalue()
