"""What OpenCLIP's script gives to the model: OpenCLIP 3 by position, OpenCLIP 4 by name."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def images_and_texts(inputs: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The images `(B, 3, H, W)` and tokens `(B, L)` of a call of the model, as a forward hook sees it.

    Args:
        inputs, named: the positional and the named arguments of the call.
    """
    if named:
        return named["image"], named["text"]
    images, texts = inputs
    return images, texts
