"""The gallery of an audit: its most suspicious pairs as cards that can be sorted, filtered and cut at a threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from openclip_otco.pages.page import write_page


@dataclass(frozen=True)
class Suspect:
    """A pair that the plan does not trust, and the caption that it would pair the image with.

    Args:
        rank: place by confidence among all pairs of the audit, the lowest confidence first, counted from 1.
        key, shard, caption: of the pair, as the data have them: strangers' text.
        confidence: the plan's, in `[0, 1]`.
        cosine: of the pair's features, in `[-1, 1]`.
        best_key, best_caption: the other pair of the window that most of the image's mass goes to, and its caption.
        thumbnail: the image as a JPEG file.
    """

    rank: int
    key: str
    shard: str
    caption: str
    confidence: float
    cosine: float
    best_key: str
    best_caption: str
    thumbnail: bytes


def write_gallery(path: Path, suspects: Sequence[Suspect], facts: Mapping[str, str | int | float], title: str) -> None:
    """Write the page of `suspects` to `path`, one HTML file with everything in it.

    Args:
        path: the file; its folder is made where it is missing.
        suspects: in the order in which the page shows them first.
        facts: what the page says of the audit above them, name and value.
        title: of the page.

    Raises:
        OSError: `path` cannot be written.
    """
    write_page(path, "gallery", title=title, facts=facts, suspects=suspects)
