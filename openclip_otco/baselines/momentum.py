"""Momentum encoders: a slowly following copy of the model that encodes each batch a second time.

He, Fan, Wu, Xie, Girshick, *Momentum contrast for unsupervised visual representation learning*, CVPR 2020, here of both
towers, as in Li et al., *Align before fuse*, NeurIPS 2021.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from openclip_otco.rules import SHARE_BELOW_ONE
from openclip_otco.train.model_call import images_and_texts


class MomentumEncoders:
    """Adds `image_keys` and `text_keys`, `(B, d)` unit norm, to what the model gives out while it trains.

    The loss gets them together with the features. The copy stays in training mode, as MoCo's key encoder does: it draws
    its own dropout, and its batch norm normalizes by the batch. The copy is not part of the model: the optimizer does
    not change it, and DDP does not wrap it.

    Args:
        model: the model as OpenCLIP made it, on the device where it trains, with the weights that the copy starts from.
        momentum: `m` in `[0, 1)`; after each step `θ_k <- m θ_k + (1 - m) θ_q`.

    Raises:
        ValueError: `momentum` outside `[0, 1)`.
    """

    def __init__(self, model: nn.Module, momentum: float) -> None:
        SHARE_BELOW_ONE.check(momentum=momentum)
        self.model = model
        self.encoder: Any = copy.deepcopy(model).requires_grad_(False).train()
        self._average = get_ema_multi_avg_fn(momentum)
        model.register_forward_hook(self._add_keys, with_kwargs=True)

    def update(self) -> None:
        """Moves the encoders towards the model; called after the optimizer's step."""
        self._average(list(self.encoder.parameters()), list(self.model.parameters()), None)

    def reset(self) -> None:
        """Sets the encoders' weights to those of the model."""
        self.encoder.load_state_dict(self.model.state_dict())

    def state_dict(self) -> dict[str, Tensor]:
        """The encoders' weights, as the model names them."""
        return dict(self.encoder.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads a saved state.

        Raises:
            RuntimeError: the state is of another model. Some weights may have been changed already.
        """
        self.encoder.load_state_dict(state)

    # Not compiled: it draws random numbers for dropout, and it calls another module than the one that is compiled.
    @torch.compiler.disable
    @torch.no_grad()
    def _add_keys(
        self, model: nn.Module, inputs: tuple[Tensor, ...], named: Mapping[str, Tensor], output: dict[str, Tensor]
    ) -> Any:
        if not model.training:
            return None
        images, texts = images_and_texts(inputs, named)
        return {
            **output,
            "image_keys": self.encoder.encode_image(images, normalize=True),
            "text_keys": self.encoder.encode_text(texts, normalize=True),
        }
