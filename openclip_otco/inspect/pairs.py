"""Pairs to look at: the first ones of a run's shards, with features, captions and thumbnails."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from openclip_otco.data import samples
from openclip_otco.errors import UserError
from openclip_otco.pages.thumbnail import thumbnail
from openclip_otco.runs.encoder import Encoder

# Longer side of a thumbnail in pixels. On a dense screen it is sharp at the size that pages show.
_THUMBNAIL_SIDE = 192


@dataclass(frozen=True)
class Pair:
    """One pair as a reader sees it; `thumbnail` is a JPEG file, or None where only features are known."""

    key: str
    caption: str
    thumbnail: bytes | None


@dataclass(frozen=True)
class Pairs:
    """`n` pairs: how they look, and their `(n, d)` unit-norm features."""

    shown: tuple[Pair, ...]
    images: Tensor
    texts: Tensor


def encode_pairs(encoder: Encoder, data: str, count: int, batch_size: int, workers: int) -> Pairs:
    """The first `count` pairs of the shards `data`; of an image with several captions, the first caption.

    Args:
        encoder: the model.
        batch_size: images encoded at once.
        workers: processes that decode, 0 for none.

    Raises:
        UserError: a shard cannot be read, features are not finite, or there are fewer than two pairs.
    """
    prepare = functools.partial(_prepared, preprocess=encoder.preprocess)
    shown: list[Pair] = []
    images, texts = [], []
    with tqdm(total=count, desc="pairs", unit="pair", disable=None) as bar:
        for batch in samples.batches(data, prepare, min(batch_size, count), workers):
            captioned = [sample for sample in batch if sample.captions][: count - len(shown)]
            if captioned:
                images.append(encoder.images([sample.image[0] for sample in captioned]))
                texts.append(encoder.texts([sample.captions[0] for sample in captioned]))
                shown += [Pair(sample.key, sample.captions[0], sample.image[1]) for sample in captioned]
                bar.update(len(captioned))
            if len(shown) >= count:
                break
    if len(shown) < 2:
        raise UserError(f"--data {data}: has no two images with captions (.txt, .json)")
    return Pairs(tuple(shown), torch.cat(images), torch.cat(texts))


def _prepared(image: Image.Image, preprocess: Callable[[Any], Any]) -> tuple[Any, bytes]:
    """The image as the model takes it, and its thumbnail as a JPEG file."""
    return preprocess(image), thumbnail(image, _THUMBNAIL_SIDE)
