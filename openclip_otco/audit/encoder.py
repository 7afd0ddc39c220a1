"""The encoder of pairs: features of a trained model, and of towers for themselves, in one pass over the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openclip_otco.audit.towers import UnimodalTowers
from openclip_otco.runs.encoder import Encoder


class Features(NamedTuple):
    """What is known of `n` images, or of `n` captions."""

    tower: Tensor
    """`(n, d)`, of a tower for itself; of the trained model where there is no such tower."""
    trained: Tensor | None
    """`(n, k)`, unit norm, of the trained model; None without one."""


@dataclass(frozen=True)
class PairEncoder:
    """A trained model, or unimodal towers, or both; with a model alone, its locked towers speak for themselves.

    Attributes:
        trained: of a checkpoint.
        towers: of `--towers`.
    """

    trained: Encoder | None
    towers: UnimodalTowers | None

    @property
    def device(self) -> torch.device:
        """Where plans are solved."""
        found = self.trained or self.towers
        assert found is not None
        return found.device

    def preprocess(self, image: Any) -> tuple[Tensor, ...]:
        """A picture as each of the two takes it, `(3, H, W)` each."""
        return tuple(each.preprocess(image) for each in (self.trained, self.towers) if each is not None)

    def images(self, pixels: Sequence[Tensor]) -> Features:
        """Features of `n` images, given as `preprocess` has them, `(n, 3, H, W)` each.

        Raises:
            UserError: a feature is not finite.
        """
        if self.trained is None:
            assert self.towers is not None
            return Features(self.towers.images(pixels[0]), None)
        trained, tower = self.trained.images_and_tower(list(pixels[0]))
        return Features(tower if self.towers is None else self.towers.images(pixels[1]), trained)

    def texts(self, captions: Sequence[str]) -> Features:
        """Features of `n` captions.

        Raises:
            UserError: a feature is not finite.
        """
        if self.trained is None:
            assert self.towers is not None
            return Features(self.towers.texts(captions), None)
        trained, tower = self.trained.texts_and_tower(captions)
        return Features(tower if self.towers is None else self.towers.texts(captions), trained)
