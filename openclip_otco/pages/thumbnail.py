"""Thumbnails: pictures small enough for many of them to stand in one page."""

from __future__ import annotations

import io

from PIL import Image


def thumbnail(image: Image.Image, side: int, quality: int = 85) -> bytes:
    """`image` as a JPEG file whose longer side has at most `side` pixels; a smaller picture keeps its size."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=quality)
    return stream.getvalue()
