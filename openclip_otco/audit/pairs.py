"""Pairs: from stored samples, by decoding workers and the encoder, to features, always in the same order."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from openclip_otco.audit.encoder import PairEncoder
from openclip_otco.audit.source import RawSample, Source
from openclip_otco.data import samples
from openclip_otco.pages.thumbnail import thumbnail

T = TypeVar("T")

# Of a thumbnail, whose longer side has so many pixels: some ten kilobytes, of which a window holds thousands.
_SIDE, _QUALITY = 256, 80


@dataclass(frozen=True)
class Cursor:
    """A place in the stream from which it can be taken up again, and what was counted before it.

    Attributes:
        shard, sample: where a batch of the encoder begins.
        skip: pairs of that batch that lie before the place. (The batch is encoded whole again: in another one features
            would differ in their last bits.)
        images: samples before the batch.
        unreadable, captionless: how many of them gave no pair, as the image could not be decoded, or had no caption.
    """

    shard: int = 0
    sample: int = 0
    skip: int = 0
    images: int = 0
    unreadable: int = 0
    captionless: int = 0


@dataclass(frozen=True, slots=True)
class Pair:
    """An image with one of its captions.

    Attributes:
        place: of the shard, of the sample in it, of the caption among the sample's.
        key, caption: as the data have them.
        image_digest: tells different images apart.
        thumbnail: the image as a small JPEG file.
        image_tower, text_tower: `(d,)` and `(e,)`, features of two towers for themselves.
        trained: `(k,)` each, unit norm, the trained model's features of image and caption; None without one.
        cursor: where the stream begins with this pair.
    """

    place: tuple[int, int, int]
    key: str
    caption: str
    image_digest: bytes
    thumbnail: bytes
    image_tower: Tensor
    text_tower: Tensor
    trained: tuple[Tensor, Tensor] | None
    cursor: Cursor


@dataclass(frozen=True)
class _Decoded:
    """A sample whose image was decoded; without captions and image if it could not be."""

    shard: int
    number: int
    key: str
    readable: bool = False
    captions: Sequence[str] = ()
    image_digest: bytes = b""
    thumbnail: bytes = b""


class _Decoder:
    """What the workers do, as a data set whose indices are the stored samples themselves.

    So one process alone reads the data, once; the loader hands the samples out and puts them back in order. Image files
    end here: a window of them would fill the memory.
    """

    def __init__(self, source: Source, preprocess: Callable[[Any], Any]) -> None:
        self.source, self.preprocess = source, preprocess

    def __getitem__(self, sample: RawSample) -> tuple[_Decoded, tuple[Tensor, ...] | None]:
        from webdataset.autodecode import imagehandler

        try:
            if sample.path is not None:
                file = Path(sample.path).read_bytes()
            else:
                file = next(sample.files[kind] for kind in samples.IMAGE_TYPES if kind in sample.files)
            captions = [_encodable(caption) for caption in self.source.captions(sample)]
            image = imagehandler("pilrgb")("jpg", file)
            pixels = self.preprocess(image)
            small = thumbnail(image, _SIDE, _QUALITY)
        except Exception:  # Strangers' images make decoders raise anything; one of them must not end the audit.
            return _Decoded(sample.shard, sample.number, _encodable(sample.key)), None
        digest = hashlib.blake2b(file, digest_size=16).digest()
        decoded = _Decoded(sample.shard, sample.number, _encodable(sample.key), True, captions, digest, small)
        # An image without captions makes no pair, and no work.
        return decoded, pixels if captions else None


def _encodable(text: str) -> str:
    """Text that tokenizers and tables take: names in tar files and escapes in JSON can hold halves of characters."""
    return text.encode("utf-8", "replace").decode()


def _collate(batch: list[tuple[_Decoded, tuple[Tensor, ...] | None]]) -> tuple[list[_Decoded], list[Tensor]]:
    # One tensor for all images, as each takes a file descriptor on its way out of a worker.
    pixels = [image for _, image in batch if image is not None]
    return [decoded for decoded, _ in batch], [torch.stack(each) for each in zip(*pixels, strict=True)]


def stream(
    source: Source, encoder: PairEncoder, batch_size: int, workers: int, start: Cursor
) -> Iterator[tuple[list[Pair], Cursor]]:
    """The pairs of `source` from `start` on, a batch at a time, each with the cursor behind it.

    Order and features do not depend on the number of workers, nor on `start`.

    Args:
        source: the samples.
        encoder: gives features, and says how images are prepared.
        batch_size: images encoded at once, and at most so many captions.
        workers: processes that decode, 0 for none.
        start: where to begin.

    Raises:
        UserError: a shard cannot be read.
        UserError: the model's features are not finite.
    """
    from torch.utils.data import DataLoader

    loader: DataLoader = DataLoader(
        _Decoder(source, encoder.preprocess),  # type: ignore[arg-type]  # a Dataset in all but name
        batch_sampler=_batches(source.samples(start.shard, start.sample), batch_size),
        num_workers=workers,
        collate_fn=_collate,
    )
    cursor, skip = replace(start, skip=0), start.skip
    for decoded, pixels in loader:
        pairs = list(_pairs(decoded, pixels, encoder, batch_size, cursor))
        cursor = Cursor(
            decoded[-1].shard,
            decoded[-1].number + 1,
            0,
            cursor.images + len(decoded),
            cursor.unreadable + sum(not sample.readable for sample in decoded),
            cursor.captionless + sum(sample.readable and not sample.captions for sample in decoded),
        )
        yield pairs[skip:], cursor
        skip = 0


def _pairs(
    decoded: list[_Decoded], pixels: list[Tensor], encoder: PairEncoder, batch_size: int, cursor: Cursor
) -> Iterator[Pair]:
    if not pixels:
        return
    captioned = [sample for sample in decoded if sample.captions]
    captions = [caption for sample in captioned for caption in sample.captions]
    images, texts = encoder.images(pixels), [encoder.texts(part) for part in _batches(captions, batch_size)]
    text_towers = torch.cat([text.tower for text in texts])
    trained_texts = [row for text in texts if text.trained is not None for row in text.trained]
    number = 0
    for index, sample in enumerate(captioned):
        for line, caption in enumerate(sample.captions):
            yield Pair(
                (sample.shard, sample.number, line),
                sample.key,
                caption,
                sample.image_digest,
                sample.thumbnail,
                images.tower[index],
                text_towers[number],
                None if images.trained is None else (images.trained[index], trained_texts[number]),
                replace(cursor, skip=number),
            )
            number += 1


def _batches(things: Iterable[T], size: int) -> Iterator[list[T]]:
    things = iter(things)
    while batch := list(itertools.islice(things, size)):
        yield batch
