"""Mismatch: pictures that get the caption of another picture, as in captions scraped from the web."""

import random
from collections import defaultdict
from collections.abc import Sequence

from openclip_otco.errors import UserError


def mismatch(captions: Sequence[str], share: float, rng: random.Random) -> dict[int, int]:
    """Deranges the captions within a random share of the pairs.

    Args:
        captions: the captions in the pairs' order.
        share: the share of the pairs that lose their caption, in [0, 1]; `round(share * len(captions))` pairs.

    Returns:
        For each pair that loses its caption the pair that lends one: a permutation of the chosen pairs, in which no
        pair gets its own caption or one of equal text.

    Raises:
        UserError: when the chosen captions cannot be deranged (a single one, or one text in more than half of them).
    """
    chosen = rng.sample(range(len(captions)), round(share * len(captions)))
    alike: dict[str, list[int]] = defaultdict(list)
    for index in chosen:
        alike[captions[index]].append(index)
    step = max(map(len, alike.values()), default=0)
    if 2 * step > len(chosen):
        raise UserError(f"--mismatch {share}: {len(chosen)} captions cannot change places; take a larger share")
    # Equal texts stand together, so a turn by the longest such run gives every pair a different text.
    takers = [index for run in alike.values() for index in run]
    return dict(zip(takers, takers[step:] + takers[:step], strict=True))
