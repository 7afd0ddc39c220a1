"""The pass over the shards that encodes missing rows and adds them to a feature table."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from openclip_otco.frozen.shard_pairs import ShardPairs, content_key, samples
from openclip_otco.frozen.table import FeatureTable

# Rows of a part. If a pass is killed, about as many rows at most have to be encoded again.
_PART_ROWS = 4096
_SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class Input:
    """How a row is made of a file's bytes.

    Attributes:
        kind: `image` or `text`.
        prepare: makes a tensor of the bytes, in a process of the loader. If it raises an error, the pair is left out;
            only a `MemoryError` ends the pass.
        encode: from tensors `(b, ...)` to rows `(b, d)`, on this process's device.
        batch: the largest `b`.
    """

    kind: Literal["image", "text"]
    prepare: Callable[[bytes], Tensor]
    encode: Callable[[Tensor], Tensor]
    batch: int


def lacking(table: FeatureTable, pairs: Sequence[ShardPairs], kind: str) -> list[Tensor]:
    """For each shard, its keys `(n,)` that are neither in the table, nor known as failed, nor in an earlier shard.

    Args:
        table: the table of the features.
        pairs: the pairs of each shard.
        kind: `image` or `text`: whether keys of images or of captions are meant.
    """
    keys = torch.cat([getattr(each, kind) for each in pairs])
    shard = torch.repeat_interleave(torch.tensor([len(each.image) for each in pairs]))
    # A stable sort: the first of equal keys is the one of the earliest shard.
    ordered, order = keys.sort(stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    new = order[first & (table.find(ordered) < 0) & ~table.failed(ordered)].sort().values
    return list(keys[new].split(torch.bincount(shard[new], minlength=len(pairs)).tolist()))


def share(keys: Sequence[Tensor], rank: int, world_size: int) -> list[Tensor]:
    """A rank's share of the keys of all shards: about as many keys as other ranks have, and of few shards."""
    total = sum(map(len, keys))
    start, stop = total * rank // world_size, total * (rank + 1) // world_size
    mine, seen = [], 0
    for each in keys:
        mine.append(each[max(0, start - seen) : max(0, stop - seen)])
        seen += len(each)
    return mine


def fill(
    table: FeatureTable, shards: Sequence[Path], keys: Sequence[Tensor], source: Input, workers: int, tell: bool = True
) -> int:
    """Encodes what `keys` name and adds it to the table, a part at a time.

    Args:
        table: of images or of captions.
        shards: tar files.
        keys: of the images or captions that are to be encoded, for each shard.
        source: how they are decoded and encoded.
        workers: processes that decode, 0 for none.
        tell: whether to log progress.

    An input that cannot be decoded causes a warning in the log, and its key is kept as failed. A key that is not found,
    because its shard is torn, is not kept as failed, so a later pass tries it again.

    Returns:
        How many keys were not found in their shards.

    Raises:
        OSError: the table's folder cannot be written.
    """
    wanted = [(shard, set(each.tolist())) for shard, each in zip(shards, keys, strict=True) if len(each)]
    total = sum(len(each) for _, each in wanted)
    if not total:
        return 0
    # With a generator of its own it draws nothing from the run's random numbers.
    inputs = DataLoader(
        _Inputs(wanted, source), batch_size=None, num_workers=min(workers, len(wanted)), generator=torch.Generator()
    )
    done, seen, told, started = 0, 0, time.monotonic(), time.monotonic()
    waiting: list[tuple[Tensor, Tensor]] = []
    failed: list[Tensor] = []

    def write() -> None:
        if waiting:
            table.add(*(torch.cat(tensors) for tensors in zip(*waiting, strict=True)))
            waiting.clear()

    try:
        for batch_keys, batch, failed_keys in inputs:
            if len(batch_keys):
                waiting.append((batch_keys, source.encode(batch).cpu()))
            if len(failed_keys):
                failed.append(failed_keys)
            done += len(batch_keys)
            seen += len(batch_keys) + len(failed_keys)
            if sum(len(each) for each, _ in waiting) >= _PART_ROWS:
                write()
            if tell and time.monotonic() - told > _SECONDS_BETWEEN_LINES:
                told = time.monotonic()
                speed = done / (told - started)
                logging.info(f"Frozen features: {seen:,} of {total:,} {source.kind}s encoded ({speed:,.0f}/s)")
    finally:
        # Also after an error or an interruption, so that rows that were encoded are kept.
        write()
    if failed:
        table.add_failed(torch.cat(failed))
    return total - seen


class _Inputs(IterableDataset[tuple[Tensor, Tensor, Tensor]]):
    """Batches of keys `(b,)`, prepared inputs `(b, ...)`, and keys of what could not be decoded, `(k,)`.

    A shard is read by one worker.
    """

    def __init__(self, wanted: Sequence[tuple[Path, set[int]]], source: Input) -> None:
        self.wanted, self.source = wanted, source

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        batch: dict[int, Tensor] = {}
        failed: list[int] = []
        for shard, keys in self.wanted[number::count]:
            left = set(keys)
            for content in _contents(shard, self.source.kind):
                if (key := content_key(content)) not in left:
                    continue
                left.discard(key)
                try:
                    batch[key] = self.source.prepare(content)
                except MemoryError:
                    raise
                except Exception as error:  # of decoders, which have no common base
                    failed.append(key)
                    logging.warning(f"Frozen features: an {self.source.kind} of {shard} cannot be decoded ({error!r})")
                if len(batch) == self.source.batch:
                    yield _stacked(batch, failed)
                    batch, failed = {}, []
        if batch or failed:
            yield _stacked(batch, failed)


def _contents(shard: Path, kind: str) -> Iterator[bytes]:
    """The images or captions of a shard, as bytes; of a torn one, those before the tear."""
    try:
        for image, text in samples(shard):
            yield image if kind == "image" else text
    except Exception as error:
        logging.warning(f"Frozen features: {shard} cannot be read to its end. {error!r}")


def _stacked(batch: dict[int, Tensor], failed: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    inputs = torch.stack(list(batch.values())) if batch else torch.empty(0)
    return torch.tensor(list(batch), dtype=torch.int64), inputs, torch.tensor(failed, dtype=torch.int64)
