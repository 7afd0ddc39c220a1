"""Batches of rows from feature tables, in an order that the seed decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from openclip_otco.frozen.table import FeatureTable


class SeededBatches(Sampler[list[int]]):
    """The pairs of each batch of an epoch, for one rank.

    All ranks go through the same random permutations of the pairs, one after the other until the epoch is full, and
    each rank takes its part of every step. So each pair comes once before any pair comes twice, and the pairs of a step
    depend on the size of the global batch, but not on the number of ranks that share it.

    Args:
        size: number of pairs.
        batch: number of pairs of one rank in a step.
        steps: number of steps of an epoch.
        seed: not negative.
        epoch: called when an epoch starts; its number, from 0, decides the order as the seed does.
        rank, world_size: which of how many processes this one is.
    """

    def __init__(
        self, size: int, batch: int, steps: int, seed: int, epoch: Callable[[], int], rank: int = 0, world_size: int = 1
    ) -> None:
        self.size, self.batch, self.steps, self.seed, self.epoch = size, batch, steps, seed, epoch
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self.epoch()
        step = self.batch * self.world_size
        left = np.empty(0, dtype=np.int64)
        permutations = (np.random.default_rng((self.seed, epoch, n)).permutation(self.size) for n in count())
        for _ in range(self.steps):
            while len(left) < step:
                left = np.concatenate([left, next(permutations)])
            yield left[self.batch * self.rank : self.batch * (self.rank + 1)].tolist()
            left = left[step:]


class BatchesInOrder(Sampler[list[int]]):
    """All `size` pairs in their order, as OpenCLIP validates: `batch` at a time, and the rest in the last batch."""

    def __init__(self, size: int, batch: int) -> None:
        self.size, self.batch = size, batch

    def __len__(self) -> int:
        return -(-self.size // self.batch)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, self.size, self.batch):
            yield list(range(start, min(start + self.batch, self.size)))


class PairTable(Dataset[Any]):
    """Pairs of rows of two tables.

    Args:
        images, texts: the tables.
        image_rows, text_rows: `(n,)` int64, the rows of each pair.
    """

    def __init__(self, images: FeatureTable, texts: FeatureTable, image_rows: Tensor, text_rows: Tensor) -> None:
        self.images, self.texts, self.image_rows, self.text_rows = images, texts, image_rows, text_rows

    def __len__(self) -> int:
        return len(self.image_rows)

    def __getitems__(self, pairs: list[int]) -> tuple[Tensor, Tensor]:
        """A batch: image features `(b, d)`, and text features `(b, d)` or tokens `(b, L)` int64."""
        chosen = torch.tensor(pairs)
        texts = self.texts.take(self.text_rows[chosen])
        return self.images.take(self.image_rows[chosen]), texts if texts.is_floating_point() else texts.long()


def loader(
    pairs: PairTable, batches: Sampler[list[int]], workers: int, pin_memory: bool, named: bool = False
) -> DataLoader[Any]:
    """Batches as OpenCLIP's loaders give them: pairs, or if `named` dicts of `image` and `text`.

    Args:
        pairs: the pairs.
        batches: which of them make each batch.
        workers: processes that read, 0 for none.
        pin_memory: whether batches lie in memory from which a GPU copies fast.
    """
    return DataLoader(
        pairs,
        batch_sampler=batches,
        collate_fn=_by_name if named else _as_it_is,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        # With a generator of its own it draws nothing from the run's random numbers.
        generator=torch.Generator(),
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def _by_name(batch: Any) -> Any:
    return dict(zip(("image", "text"), batch, strict=True))
