"""Unimodal towers: an image model of timm and a text model of Hugging Face, none of them trained on pairs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openclip_otco.errors import UserError, first_line

# Longer captions are cut, as OpenCLIP cuts them.
_TOKENS = 77


@dataclass(frozen=True)
class UnimodalTowers:
    """Two pretrained models, each with its own preparation of inputs; features are float32, on the CPU.

    Attributes:
        name: the value of `--towers`.
        image_model: from `(n, 3, H, W)` to `(n, d)`.
        text_model, tokenizer: of transformers; a caption's features are the mean over its tokens (Reimers and Gurevych,
            *Sentence-BERT*, EMNLP 2019).
        preprocess: from a picture to `(3, H, W)`.
        device: the device of both models.
    """

    name: str
    image_model: Any
    text_model: Any
    tokenizer: Any
    preprocess: Callable[[Any], Tensor]
    device: torch.device

    @torch.inference_mode()
    def images(self, pixels: Tensor) -> Tensor:
        """`(n, d)` features of `n` prepared images, `(n, 3, H, W)`.

        Raises:
            UserError: a feature is not finite.
        """
        return self._checked(self.image_model(pixels.to(self.device)), "image")

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """`(n, e)` features of `n` texts.

        Raises:
            UserError: a feature is not finite.
        """
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=_TOKENS, return_tensors="pt")
        tokens = tokens.to(self.device)
        hidden = self.text_model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(2).to(hidden.dtype)
        return self._checked((hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1), "text")

    def _checked(self, features: Tensor, kind: str) -> Tensor:
        features = features.float().cpu()
        if not features.isfinite().all():
            raise UserError(f"--towers {self.name}: the {kind} tower's features are not finite; name another one")
        return features


def load_towers(name: str, device: str | None = None) -> UnimodalTowers:
    """The towers with this name, with pretrained weights.

    Args:
        name: a model of this package, whose towers are taken without their heads; or `IMAGE+TEXT`: the name of a timm
            model, and the name or the folder of a transformers model.
        device: of torch; by default a GPU if there is one.

    Raises:
        UserError: there is no such model, its weights cannot be loaded, it cannot encode texts, or there is no such
            device.
    """
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        image, text = _names(name)
        towers = _load(name, image, text, place)
        towers.texts(["some", "more words"])  # not every text model can pad, or take tokens alone
        return towers
    except UserError:
        raise
    except Exception as error:  # timm, transformers and the hub have no common base
        raise UserError(
            f"--towers {name}: cannot be loaded: {first_line(error)} (give a model of this package that has pretrained "
            "towers, EfficientNet-Lite0-MiniLM-L6, or IMAGE+TEXT: a timm model, and a Hugging Face model or its folder)"
        ) from error


def _names(name: str) -> tuple[str, str]:
    from openclip_otco.models.registry import model_configs, prepare_model, register_models

    image, plus, text = name.partition("+")
    if plus:
        return image, text
    config = model_configs().get(name)
    if config is None:
        raise ValueError("there is no such model")
    register_models()
    prepare_model(name)
    return config["vision_cfg"]["timm_model_name"], config["text_cfg"]["hf_model_name"]


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Turns off warnings of transformers. It advises to train the pooler, but no feature here comes from the pooler."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _load(name: str, image: str, text: str, device: torch.device) -> UnimodalTowers:
    import timm
    from timm.data import create_transform, resolve_model_data_config
    from transformers import AutoModel, AutoTokenizer

    image_model = timm.create_model(image, pretrained=True, num_classes=0).eval().to(device)
    # No crop beyond what makes the picture a square: the caption may speak of things at its edge.
    preparation = resolve_model_data_config(image_model) | {"crop_pct": 1.0}
    with _quiet_transformers():
        text_model = AutoModel.from_pretrained(text)
    return UnimodalTowers(
        name,
        image_model,
        text_model.eval().to(device),
        AutoTokenizer.from_pretrained(text),
        create_transform(**preparation, is_training=False),
        device,
    )
