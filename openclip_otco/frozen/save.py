"""Tensor files that appear whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from openclip_otco.files import written_whole


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file; its folder is made where it is missing.

    Raises:
        OSError: it cannot be written; the message names the file.
    """
    with written_whole(path) as partial:
        try:
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()}, str(partial), dict(metadata or {})
            )
        except SafetensorError as error:  # also of a full disk
            raise OSError(f"{path} cannot be written: {error}") from error
