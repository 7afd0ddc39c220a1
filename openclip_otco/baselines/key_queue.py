"""Queue of keys: features of the last batches, the negatives of MoCo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from openclip_otco.method.features import Features
from openclip_otco.ot.finite import finite_rows
from openclip_otco.rules import AT_LEAST_ONE


class KeyQueue:
    """The newest `size` pairs of keys, first in, first out. It starts empty, not with random vectors.

    Args:
        size: `K >= 1`, the largest number of pairs that it holds. It need not be a multiple of the batch size.

    Raises:
        ValueError: `size` below one.
    """

    def __init__(self, size: int) -> None:
        AT_LEAST_ONE.check(size=size)
        self.size = size
        self.keys: Features | None = None

    def __len__(self) -> int:
        return 0 if self.keys is None else len(self.keys.images)

    def add(self, keys: Features) -> None:
        """Appends `(B, d)` image and text keys, row `i` of both one pair; a pair that is not finite is left out.

        If the queue held a single such pair, every loss would be NaN until this pair left the queue.
        """
        finite = finite_rows(keys.images) & finite_rows(keys.texts)
        new = Features(*(side[finite].detach().float() for side in keys))
        held = new if self.keys is None else Features(*map(torch.cat, zip(self.keys, new, strict=True)))
        # A copy: a view would also keep the keys that have left the queue, in memory and in the checkpoint.
        self.keys = Features(*(side[-self.size :].clone() for side in held))

    def clear(self) -> None:
        """Takes all keys out."""
        self.keys = None

    def state_dict(self) -> dict[str, Tensor]:
        """The keys, `(n, d)` of images and of texts, oldest first; empty without keys."""
        return {} if self.keys is None else self.keys._asdict()

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str) -> None:
        """Loads a saved state onto `device`; of a larger queue, only the newest pairs.

        Raises:
            ValueError: the state is not one of a queue.
        """
        self.clear()
        if not state:
            return
        images, texts = (state.get(name) for name in Features._fields)
        if not (isinstance(images, Tensor) and isinstance(texts, Tensor) and images.ndim == 2 <= images.shape[1]):
            raise ValueError("the queue's keys must be (n, d) tensors")
        if images.shape != texts.shape:
            raise ValueError(f"as many image as text keys are needed; got {len(images)} and {len(texts)}")
        self.add(Features(images.to(device), texts.to(device)))
