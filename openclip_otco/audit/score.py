"""Known wrong pairs, and how well a score tells them from right ones."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from openclip_otco.errors import UserError


class Truth:
    """The pairs that are wrong: a CSV file lists them in its column `key`.

    A listed key `K` means the sample `K` and the samples `K-0`, `K-1`, ... Samples have such names if each holds
    another caption of the same image.

    Raises:
        UserError: the file cannot be read, or has no such column.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open(newline="", encoding="utf-8-sig") as stream:
                rows = csv.DictReader(stream)
                has_keys = "key" in (rows.fieldnames or ())
                self._keys = {row["key"] for row in rows} if has_keys else set()
        except (OSError, ValueError, csv.Error) as error:
            raise UserError(f"--truth {path}: cannot be read: {error}") from error
        if not has_keys:
            raise UserError(f"--truth {path}: has no column `key`")

    def is_wrong(self, key: str) -> bool:
        """Whether the list has the pair with this key."""
        return key in self._keys or re.sub(r"-\d+$", "", key) in self._keys


def auroc(scores: ArrayLike, wrong: ArrayLike) -> float:
    """The area under the ROC curve: the chance that a right pair scores higher than a wrong one, ties counted half.

    By ranks (Mann and Whitney, 1947).

    Args:
        scores: `(n,)`.
        wrong: `(n,)`, boolean.

    Raises:
        ValueError: all are wrong, or none is.
    """
    wrong = np.asarray(wrong, dtype=bool)
    right_count, wrong_count = int((~wrong).sum()), int(wrong.sum())
    if not right_count or not wrong_count:
        raise ValueError("an AUROC needs both right and wrong pairs")
    ranks = rankdata(scores)[~wrong].sum() - right_count * (right_count + 1) / 2
    return float(ranks / (right_count * wrong_count))
