"""What a shard holds: a key for the image and for the caption of each of its pairs, made from their bytes."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import webdataset as wds
from open_clip_train.data import filter_no_caption_or_no_image, tarfile_to_samples_nothrow
from safetensors import SafetensorError, safe_open
from torch import Tensor

from openclip_otco.data.samples import IMAGE_TYPES
from openclip_otco.frozen.save import save_tensors


@dataclass(frozen=True)
class ShardPairs:
    """The pairs of a shard, in its order: keys `(n,)` int64 of their images and of their captions."""

    image: Tensor
    text: Tensor


def content_key(content: bytes) -> int:
    """64 bits of the BLAKE2 hash of a file's bytes, as a signed integer."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def samples(shard: Path) -> Iterator[tuple[bytes, bytes]]:
    """The image and the caption of each pair, as bytes, in the pairs' order; OpenCLIP's own reading of a shard.

    Raises:
        Exception: the shard is torn; raised after the last pair that can be read. The errors of WebDataset and
            `tarfile` have no common base.
    """
    pipeline = wds.DataPipeline(
        wds.SimpleShardList([str(shard)]),
        partial(tarfile_to_samples_nothrow, handler=wds.reraise_exception),
        wds.select(filter_no_caption_or_no_image),
    )
    for sample in pipeline:
        yield next(sample[kind] for kind in IMAGE_TYPES if kind in sample), sample["txt"]


def shard_pairs(shard: Path, folder: Path) -> ShardPairs:
    """The pairs of `shard`, kept in `folder` until the shard's size or time changes.

    If the shard is torn, these are the pairs before the tear. A warning says so, and they are not kept in `folder`.

    Raises:
        OSError: the shard is missing, or the folder cannot be written.
    """
    about = shard.stat()
    identity = json.dumps([str(shard.resolve()), about.st_size, about.st_mtime_ns])
    kept = folder / f"{hashlib.sha256(str(shard.resolve()).encode()).hexdigest()[:16]}.safetensors"
    if kept.is_file():
        try:
            with safe_open(str(kept), framework="pt") as file:
                if (file.metadata() or {}).get("shard") == identity:
                    return ShardPairs(file.get_tensor("image"), file.get_tensor("text"))
        except (SafetensorError, OSError) as error:
            logging.warning(f"Frozen features: {kept} is not usable and will be made anew. {error}")
    keys: list[tuple[int, int]] = []
    whole = True
    try:
        keys.extend((content_key(image), content_key(text)) for image, text in samples(shard))
    except Exception as error:
        whole = False
        logging.warning(f"Frozen features: {shard} can be read up to pair {len(keys)}, the rest is left out. {error!r}")
    image, text = torch.tensor(keys, dtype=torch.int64).view(-1, 2).unbind(1)
    pairs = ShardPairs(image, text)
    if whole:
        save_tensors(kept, {"image": pairs.image, "text": pairs.text}, {"shard": identity})
    return pairs
