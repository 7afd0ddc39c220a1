"""Pairs of made-up features, as many as are asked for, to audit in place of shards, pictures and a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from openclip_otco.audit import audit, judging
from openclip_otco.audit.encoder import PairEncoder
from openclip_otco.audit.pairs import Cursor, Pair
from openclip_otco.audit.settings import JudgeSettings
from openclip_otco.audit.source import Shards

_WIDTH = 64
# A thumbnail is then as large as real ones are, in bytes.
_THUMBNAIL_REPEATS = 1500


class MadeUpShards(Shards):
    """The source of an audit of so many pairs."""

    def __init__(self, pairs: int) -> None:
        self.data, self.caption_lines = str(pairs), False
        self.names = ["made up"]

    def total(self) -> int:
        return int(self.data)

    def fingerprint(self) -> list[Any]:
        return [self.data]


class _CPU:
    """What the audit asks of a model that encodes nothing."""

    device = torch.device("cpu")


def audit_made_up_pairs(batch_size: int) -> None:
    """Lets audits of this process read `MadeUpShards` in batches of this size, and load no model."""

    def stream(source: MadeUpShards, *_: Any) -> Iterator[tuple[list[Pair], Cursor]]:
        mixing = torch.randn(_WIDTH, _WIDTH, generator=torch.Generator().manual_seed(0))
        for start in range(0, source.total(), batch_size):
            batch = _batch(start, min(batch_size, source.total() - start), mixing)
            yield batch, Cursor(0, start + len(batch), 0, start + len(batch))

    judging.stream = stream
    audit.load_encoder = lambda settings: PairEncoder(None, _CPU())  # type: ignore[arg-type]


def settings(window: int) -> JudgeSettings:
    """Of an audit by towers that there are not."""
    return JudgeSettings(towers="made up", window=window)


def _batch(start: int, size: int, mixing: torch.Tensor) -> list[Pair]:
    """Pairs whose texts are their images, with noise, seen in another basis."""
    generator = torch.Generator().manual_seed(start)
    images = torch.randn(size, _WIDTH, generator=generator)
    texts = (images + torch.randn(images.shape, generator=generator)) @ mixing
    batch = []
    for number, image, text in zip(range(start, start + size), images, texts, strict=True):
        digest = number.to_bytes(8, "little")
        caption = f"a caption of some length, of picture number {number}"
        batch.append(
            Pair(
                (0, number, 0),
                str(number),
                caption,
                digest,
                digest * _THUMBNAIL_REPEATS,
                image,
                text,
                None,
                Cursor(0, number),
            )
        )
    return batch
