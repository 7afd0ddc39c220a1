"""The encoder of pairs: features of a trained model and of unimodal towers, in one pass over the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openclip_otco.audit.towers import UnimodalTowers
from openclip_otco.runs.encoder import Encoder


class Features(NamedTuple):
    """Features of `n` images, or of `n` captions."""

    tower: Tensor
    """`(n, d)`, of a unimodal tower; of the trained model if there is no such tower."""
    trained: Tensor | None
    """`(n, k)`, of unit norm, of the trained model; None without one."""


@dataclass(frozen=True)
class PairEncoder:
    """A trained model, or unimodal towers, or both. Without towers, the locked ones of the model take their place.

    Attributes:
        trained: the model of a checkpoint.
        towers: the models of `--towers`.
    """

    trained: Encoder | None
    towers: UnimodalTowers | None

    @property
    def device(self) -> torch.device:
        """The device on which plans are solved."""
        found = self.trained or self.towers
        assert found is not None
        return found.device

    def preprocess(self, image: Any) -> tuple[Tensor, ...]:
        """A picture, prepared for the trained model and for the towers, `(3, H, W)` each."""
        return tuple(each.preprocess(image) for each in (self.trained, self.towers) if each is not None)

    def images(self, pixels: Sequence[Tensor]) -> Features:
        """Features of `n` images.

        Args:
            pixels: stacked outputs of `preprocess`, `(n, 3, H, W)` each.

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
