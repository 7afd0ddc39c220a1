"""The gallery of an audit: its most suspicious pairs by picture, to be sorted, filtered and marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from openclip_otco.pages.page import write_page


@dataclass(frozen=True)
class Suspect:
    """A pair that may not belong together, and the caption that the plan would give the image.

    Args:
        rank: place among all pairs of the audit, the least likely pair first, counted from 1.
        key, shard, caption: of the pair, as the data have them: strangers' text.
        probability: that the pair belongs together, in `[0, 1]`.
        structure: how alike image and caption lie among the others, in standard deviations of random pairs.
        cosine: of the trained model's features, in `[-1, 1]`; None without a trained model.
        best_key, best_caption: the other pair of the window that most of the image's mass goes to, and its caption.
        thumbnail: the image as a JPEG file.
    """

    rank: int
    key: str
    shard: str
    caption: str
    probability: float
    structure: float
    cosine: float | None
    best_key: str
    best_caption: str
    thumbnail: bytes


@dataclass(frozen=True)
class Estimate:
    """What an audit says of all pairs.

    Args:
        pairs: how many there are.
        wrong: the estimated share of wrong ones; `low` and `high` bound it with a probability of 95 %.
        histogram: pairs by probability, in bins of equal width from 0 to 1.
    """

    pairs: int
    wrong: float
    low: float
    high: float
    histogram: Sequence[int]

    @property
    def bars(self) -> list[float]:
        """Heights of the histogram, the highest 1. Roots of the counts: else the sure pairs would hide the others."""
        highest = max(self.histogram, default=0) or 1
        return [(count / highest) ** 0.5 for count in self.histogram]


def by_picture(suspects: Sequence[Suspect]) -> list[list[Suspect]]:
    """The pairs of each picture; pictures in the order in which the first pair of each comes."""
    pictures: dict[bytes, list[Suspect]] = {}
    for suspect in suspects:
        pictures.setdefault(suspect.thumbnail, []).append(suspect)
    return list(pictures.values())


def write_gallery(
    path: Path, suspects: Sequence[Suspect], estimate: Estimate, facts: Mapping[str, str | int | float], title: str
) -> None:
    """Write the page of `suspects` to `path`, one HTML file with everything in it.

    Args:
        path: the file; its folder is made where it is missing.
        suspects: in the order in which the page shows them first.
        estimate: of all pairs.
        facts: what else the page says of the audit, name and value.
        title: of the page.

    Raises:
        OSError: `path` cannot be written.
    """
    write_page(path, "gallery", title=title, estimate=estimate, facts=facts, pictures=by_picture(suspects))
