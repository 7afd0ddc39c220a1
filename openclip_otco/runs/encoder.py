"""The encoder: a trained model with its tokenizer and preprocessing, which makes features of images and texts."""

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openclip_otco.errors import UserError
from openclip_otco.frozen.towers import FrozenTower


@dataclass(frozen=True)
class Encoder:
    """An OpenCLIP model in evaluation mode; features are unit norm, float32, on the CPU."""

    name: str
    model: Any
    tokenizer: Callable[[Sequence[str]], Tensor]
    preprocess: Callable[[Any], Tensor]
    device: torch.device
    precision: str
    autocast: Callable[[], AbstractContextManager]
    input_dtype: torch.dtype | None
    frozen: Sequence[FrozenTower] = ()

    def save_frozen(self) -> None:
        """Saves the features of the locked towers in the folder of `--frozen-features`, for the next evaluation."""
        for tower in self.frozen:
            if tower.memory is not None:
                # If the folder cannot be written, the next evaluation takes longer, but its results are the same.
                with contextlib.suppress(OSError):
                    tower.memory.save(everything=True)

    @torch.inference_mode()
    def images(self, images: Sequence[Tensor]) -> Tensor:
        """`(n, d)` features of `n` preprocessed images, `(3, H, W)` each.

        Raises:
            UserError: a feature is not finite.
        """
        return self.images_and_tower(images)[0]

    @torch.inference_mode()
    def images_and_tower(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """`(n, d)` features of the model, and `(n, e)` of its image tower alone where that is locked, else the same.

        Raises:
            UserError: a feature is not finite.
        """
        batch = torch.stack(list(images)).to(self.device, self.input_dtype)
        with self.autocast():
            return self._both("image", batch, self.model.encode_image)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """`(n, d)` features of `n` texts.

        Raises:
            UserError: a feature is not finite.
        """
        return self.texts_and_tower(texts)[0]

    @torch.inference_mode()
    def texts_and_tower(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """`(n, d)` features of the model, and `(n, e)` of its text tower alone where that is locked, else the same.

        Raises:
            UserError: a feature is not finite.
        """
        tokens = self.tokenizer(list(texts)).to(self.device)
        with self.autocast():
            return self._both("text", tokens, self.model.encode_text)

    def _both(self, kind: str, inputs: Tensor, encode: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        for tower in self.frozen:
            if tower.kind == kind:
                features = tower(inputs)
                # The tower returns its own features unchanged, so that `encode` applies only the head to them.
                return self._features(encode(features), kind), self._checked(features, kind)
        features = self._features(encode(inputs), kind)
        return features, features

    def _features(self, features: Tensor, kind: str) -> Tensor:
        # In float32: half precision would leave norms that differ by a percent, which reorders candidates.
        return self._checked(torch.nn.functional.normalize(features.float(), dim=-1), kind)

    def _checked(self, features: Tensor, kind: str) -> Tensor:
        features = features.float().cpu()
        # No number is greater or smaller than NaN, so with NaN the own candidate of every query would rank first.
        if not features.isfinite().all():
            raise UserError(f"the model's {kind} features are not finite: it diverged, or needs --precision fp32")
        return features
