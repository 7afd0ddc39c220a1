"""The window: the features of the last optimizer steps. The next plan is made of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from openclip_otco.ot.finite import finite_rows
from openclip_otco.rules import AT_LEAST_ONE


class FeatureWindow:
    """The image and text features of the last optimizer steps, at most `max_support` pairs of them.

    Args:
        steps: `Δ >= 1`, the steps that make a window.
        max_support: the largest number of pairs kept. Each step may fill its part of it; of a larger batch, a random
            subsample is kept. So memory is `O(max_support · d)` for every batch size.
        seed: seed of the subsample; with the same seed all ranks choose the same pairs.

    Raises:
        ValueError: `steps` or `max_support` below one.
    """

    def __init__(self, steps: int = 8, max_support: int = 8192, seed: int = 0) -> None:
        AT_LEAST_ONE.check(steps=steps, max_support=max_support)
        self.steps, self.max_support, self.seed = steps, max_support, seed
        self._batches: list[tuple[Tensor, Tensor]] = []
        self.dropped = 0

    def __len__(self) -> int:
        """Steps in the window."""
        return len(self._batches)

    @property
    def full(self) -> bool:
        """Whether the window holds the features of `steps` steps."""
        return len(self) >= self.steps

    def add(self, image_features: Tensor, text_features: Tensor, step: int) -> None:
        """Takes the features of one step.

        Args:
            image_features, text_features: `(B, d)`, row `i` of both being one pair; kept in float32, without gradient.
            step: optimizer step; with the seed it decides which pairs stay where there are too many.
        """
        images, texts = image_features.detach().float(), text_features.detach().float()
        # The k-th step gets the k-th part of the cap, so that the parts add up to it exactly.
        k = len(self)
        quota = self.max_support * (k + 1) // self.steps - self.max_support * k // self.steps
        if len(images) > quota:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
            chosen = torch.randperm(len(images), generator=generator)[:quota].sort().values.to(images.device)
            images, texts = images[chosen], texts[chosen]
        self._batches.append((images.clone(), texts.clone()))

    def skip(self) -> None:
        """Counts a step that gave nothing, so that windows of all ranks fill up at the same step."""
        self._batches.append((torch.zeros(0, 1), torch.zeros(0, 1)))

    def features(self) -> tuple[Tensor, Tensor]:
        """Image and text features, `(N, d)` each, of the whole window; pairs with a NaN or an infinity are left out
        and counted in `dropped`.

        Raises:
            ValueError: there are none.
        """
        if not self._batches:
            raise ValueError("the window is empty")
        batches = [batch for batch in self._batches if len(batch[0])] or self._batches[:1]
        images, texts = (torch.cat(features) for features in zip(*batches, strict=True))
        # Not in `add`: there, the CPU would have to wait for the GPU at every step.
        finite = finite_rows(images) & finite_rows(texts)
        left = int(finite.sum())
        self.dropped += len(finite) - left
        if not left:
            raise ValueError("the window holds no finite features")
        return images[finite], texts[finite]

    def clear(self) -> None:
        """Takes all features out; what was dropped stays counted."""
        self._batches.clear()

    def digest(self) -> str:
        """A hash of the features. It is equal on two ranks only if their features are equal to the bit."""
        digest = hashlib.sha256()
        for images, texts in self._batches:
            digest.update(str(tuple(images.shape)).encode())
            for side in (images, texts):
                digest.update(side.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain types only, so that `torch.load(weights_only=True)` reads it."""
        return {"batches": [list(batch) for batch in self._batches], "dropped": self.dropped}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str = "cpu") -> None:
        """Loads a saved window onto `device`. Of a longer or larger one, it keeps as much as this window has room for.

        Raises:
            KeyError, TypeError, ValueError: this is not the state of a window. The window is then empty.
        """
        self.clear()
        try:
            room = self.steps - 1  # a full window has become a plan before it is saved
            for index, (images, texts) in enumerate(state["batches"][-room:] if room else []):
                if not (isinstance(images, Tensor) and isinstance(texts, Tensor)):
                    raise TypeError("a window's features must be tensors")
                if not images.is_floating_point() or images.ndim != 2 or images.shape != texts.shape:
                    raise ValueError("a window's features must be pairs of (B, d) tensors")
                self.add(images.to(device), texts.to(device), step=index)
            if len({images.shape[1] for images, _ in self._batches if len(images)}) > 1:
                raise ValueError("a window's features must have one width")
            self.dropped = int(state["dropped"])
        except Exception:
            self.clear()
            raise
