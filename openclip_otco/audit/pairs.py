"""Pairs: stored samples are decoded by workers and encoded into features, always in the same order."""

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
from openclip_otco.errors import UserError, last_line
from openclip_otco.pages.thumbnail import thumbnail

T = TypeVar("T")

# The longer side of a thumbnail in pixels, and its JPEG quality: about ten kilobytes, and a window holds thousands.
_SIDE, _QUALITY = 256, 80


@dataclass(frozen=True)
class Cursor:
    """A place in the stream at which it can start again, and what was counted before this place.

    Attributes:
        shard, sample: where a batch of the encoder begins.
        skip: number of pairs that lie between the beginning of the batch and the place. The whole batch is encoded
            again: in another batch, features would differ in their last bits.
        images: number of samples before the batch.
        unreadable, captionless: how many of these samples could not be read, or have no caption, and so gave no pair.
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
        place: number of the shard, of the sample in the shard, and of the caption in the sample.
        key, caption: as they are in the data.
        image_digest: a hash of the image file.
        thumbnail: the image as a small JPEG file.
        image_tower, text_tower: `(d,)` and `(e,)`, features of unimodal towers.
        trained: `(k,)` each, of unit norm: the trained model's features of image and caption; None without one.
        cursor: a stream that starts here begins with this pair.
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
    """A sample after decoding; it has no captions and no image if it could not be read."""

    shard: int
    number: int
    key: str
    readable: bool = False
    captions: Sequence[str] = ()
    image_digest: bytes = b""
    thumbnail: bytes = b""


class _Decoder:
    """The work of the decoding workers, as a data set whose indices are the stored samples themselves.

    So only one process reads the data, and only once. The loader gives samples to workers, and puts the
    results in order. Image files are not kept after decoding: those of a window would fill the memory.
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
        except Exception:  # A broken image can make a decoder raise anything, and must not end the audit.
            return _Decoded(sample.shard, sample.number, _encodable(sample.key)), None
        digest = hashlib.blake2b(file, digest_size=16).digest()
        decoded = _Decoded(sample.shard, sample.number, _encodable(sample.key), True, captions, digest, small)
        # An image without captions makes no pair, and no work.
        return decoded, pixels if captions else None


def _encodable(text: str) -> str:
    """Text without lone surrogates. Names in tar files and JSON may have them; tokenizers and tables refuse them."""
    return text.encode("utf-8", "replace").decode()


def _collate(batch: list[tuple[_Decoded, tuple[Tensor, ...] | None]]) -> tuple[list[_Decoded], list[Tensor]]:
    # One tensor for all images, as each tensor that leaves a worker takes a file descriptor.
    pixels = [image for _, image in batch if image is not None]
    return [decoded for decoded, _ in batch], [torch.stack(each) for each in zip(*pixels, strict=True)]


def stream(
    source: Source, encoder: PairEncoder, batch_size: int, workers: int, start: Cursor
) -> Iterator[tuple[list[Pair], Cursor]]:
    """The pairs of `source` from `start` on, a batch at a time, each batch with the cursor of its end.

    Order and features depend neither on the number of workers nor on `start`.

    Args:
        source: the samples.
        encoder: prepares and encodes images, and encodes captions.
        batch_size: number of images that are encoded at once, and the largest number of captions.
        workers: number of processes that decode; 0 decodes in this process.
        start: where to begin.

    Raises:
        UserError: the data cannot be read, or the model's features are not finite.
    """
    from torch.utils.data import DataLoader

    loader: DataLoader = DataLoader(
        _Decoder(source, encoder.preprocess),  # type: ignore[arg-type]  # it has a Dataset's methods
        batch_sampler=_batches(source.samples(start.shard, start.sample), batch_size),
        num_workers=workers,
        collate_fn=_collate,
    )
    cursor, skip = replace(start, skip=0), start.skip
    for decoded, pixels in _with_user_errors(loader):
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
        # A process that goes on with smaller batches skips more than its first one.
        skip = max(0, skip - len(pairs))


def _with_user_errors(loader: Iterable[T]) -> Iterator[T]:
    """The items of `loader`. An `OSError` of its files or processes becomes a `UserError` about `--data`."""
    try:
        yield from loader
    except OSError as error:
        raise UserError(f"--data: cannot be read: {last_line(error)}") from error


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
