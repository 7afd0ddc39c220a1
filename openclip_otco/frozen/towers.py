"""Towers: which parts of an OpenCLIP model are locked, and how their features are taken from the memory."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openclip_otco.frozen.memory import FeatureMemory


class FrozenTower:
    """The locked part of a tower. It looks features up in its memory, and computes those that the memory does not have.

    It computes in evaluation mode, whatever mode the model is in: dropout and drop path are off, and batch norms use
    their running statistics. Else equal inputs would not give equal features.

    Args:
        kind: `image` or `text`, the first part of the memory's file name.
        parts: modules that make the features; all their parameters are locked.
        encode: from inputs `(b, ...)` to features `(b, d)`, by those modules.
        folder: the folder of the memory's file. The file's name has a digest of the parts, so that no other tower reads
            it. None: nothing is remembered.
        setting: all other settings that change the features, such as OpenCLIP's `--precision`; part of the digest.
    """

    def __init__(
        self,
        kind: str,
        parts: list[nn.Module],
        encode: Callable[[Tensor], Tensor],
        folder: Path | None,
        setting: str,
    ) -> None:
        self.kind, self.parts, self.folder, self.setting = kind, parts, folder, setting
        self.memory: FeatureMemory | None = None
        self._encode = encode

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenTower:
        # A momentum encoder's copy of a locked tower is the same function.
        return self

    @torch.compiler.disable
    def __call__(self, inputs: Tensor) -> Tensor:
        """Features `(B, d)` of inputs `(B, ...)`, without gradient. Inputs that are features are returned unchanged."""
        if inputs.ndim == 2 and inputs.is_floating_point():
            return inputs
        if self.folder is None:
            return self.compute(inputs)
        if self.memory is None:
            # Not before the first call: `--resume` loads weights after the model is made.
            self.memory = FeatureMemory(self.folder / f"{self.kind}-{self.digest()}.safetensors")
        return self.memory(inputs, self.compute)

    def digest(self) -> str:
        """Sixteen hexadecimal digits that change with the weights, the architecture, precision and library versions."""
        content = hashlib.sha256(self.setting.encode())
        for name in ("torch", "timm", "transformers", "open_clip_torch"):
            content.update(f"{name} {importlib.metadata.version(name)}\n".encode())
        for part in self.parts:
            content.update(f"{part!r} {getattr(part, 'config', '')}\n".encode())
            for name, tensor in part.state_dict().items():
                content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                content.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return content.hexdigest()[:16]

    @torch.no_grad()
    def compute(self, inputs: Tensor) -> Tensor:
        """Features `(B, d)` of inputs `(B, ...)`, by the tower in evaluation mode; the memory is not asked."""
        for part in self.parts:
            part.eval()
        return self._encode(inputs)


def freeze_towers(
    model: nn.Module, folder: Path | None, precision: str, image_size: int | None = None
) -> list[FrozenTower]:
    """Lets the locked towers of an OpenCLIP model take their features from memory, as `FrozenTower` says.

    It knows image towers of timm and text towers of Hugging Face. The memory holds the inputs of the trained heads: the
    output of the image trunk, and the pooled output of the text transformer. Parameters, buffers and their names stay
    as they are.

    Args:
        model: an OpenCLIP model.
        folder: for the memories' files; None where nothing is to be remembered.
        precision: OpenCLIP's `--precision`.
        image_size: side in pixels to which images are enlarged before the image tower encodes them. So loaders and keys
            deal with smaller images. Loaders and keys take most of the time of a run that remembers its features.

    Returns:
        The towers found locked: none, one or two.
    """
    from open_clip.hf_model import HFTextEncoder
    from open_clip.timm_model import TimmModel

    towers = []
    visual, text = getattr(model, "visual", None), getattr(model, "text", None)
    if isinstance(visual, TimmModel) and _locked(visual.trunk):
        forward, setting = visual.trunk.forward, precision
        if image_size is not None:
            forward, setting = _enlarged(forward, image_size), f"{precision} {image_size}"
        image = FrozenTower("image", [visual.trunk], forward, folder, setting)
        visual.trunk.frozen = image
        visual.trunk.forward = MethodType(_trunk_features, visual.trunk)
        towers.append(image)
    if isinstance(text, HFTextEncoder) and not text.output_tokens and _locked(text.transformer):

        def encode(tokens: Tensor) -> Tensor:
            return _pooled(text, tokens)

        sentence = FrozenTower("text", [text.transformer, text.pooler], encode, folder, precision)
        text.frozen = sentence
        text.forward = MethodType(_projected_features, text)
        towers.append(sentence)
    return towers


def _enlarged(encode: Callable[[Tensor], Tensor], size: int) -> Callable[[Tensor], Tensor]:
    def enlarge_and_encode(images: Tensor) -> Tensor:
        return encode(F.interpolate(images, (size, size), mode="bicubic", antialias=True))

    return enlarge_and_encode


def _locked(part: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in part.parameters())


# Methods, so that a deep copy of a tower uses its own head.
def _trunk_features(self: Any, images: Tensor) -> Tensor:
    return self.frozen(images)


def _projected_features(self: Any, tokens: Tensor) -> Tensor:
    return self.proj(self.frozen(tokens))


def _pooled(text: Any, tokens: Tensor) -> Tensor:
    """The text tower's pooled output `(b, d)` of tokens `(b, L)`, each caption without its padding.

    A caption fills about a third of its places. Attention is masked, so the padding would only cost time.
    """
    lengths = (tokens != text.config.pad_token_id).sum(1)
    features: list[Tensor] = [torch.empty(0)] * len(tokens)
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero().flatten()
        mask = torch.ones_like(tokens[rows, :length])
        pooled = text.pooler(text.transformer(input_ids=tokens[rows, :length], attention_mask=mask), mask)
        for row, feature in zip(rows.tolist(), pooled, strict=True):
            features[row] = feature
    return torch.stack(features)
