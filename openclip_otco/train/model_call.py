"""How OpenCLIP's script gives images and texts to the model: OpenCLIP 3 by position, OpenCLIP 4 by name."""

from __future__ import annotations

from collections.abc import Mapping

import open_clip
from torch import Tensor


def batches_have_names() -> bool:
    """Whether OpenCLIP's loop takes dicts of `image` and `text`, as its training tasks do, and not pairs."""
    return hasattr(open_clip, "create_task")


def images_and_texts(inputs: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The images `(B, 3, H, W)` and tokens `(B, L)` of a call of the model, as a forward hook sees it.

    Args:
        inputs, named: the positional and the named arguments of the call.
    """
    if named:
        return named["image"], named["text"]
    images, texts = inputs
    return images, texts
