"""Sharing a solve among processes: each takes a slice of the columns, and what it cannot know alone is summed up.

Every process goes through the same collectives in the same order, whatever happens to it in what it is asked to `make`:
one that fails there puts in what no sound process would, so that all of them see the failure at once and none waits for
another that has left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Shards:
    """The processes that solve a problem together. This one solves it alone.

    Wherever processes `make` a tensor, `like` says what shape, type and device it has in all of them.
    """

    rank = 0
    count = 1

    def part(self, size: int) -> slice:
        """This process's share of `size` rows or columns; shares differ by one at most."""
        return slice(size * self.rank // self.count, size * (self.rank + 1) // self.count)

    def total(self, make: Callable[[], Tensor], like: Tensor) -> Tensor:
        """The sum over all processes of what each makes, equal to the bit on all of them.

        Raises:
            RuntimeError: another process failed. Where it failed its own error is raised.
        """
        return make()

    def least(self, make: Callable[[], Tensor], like: Tensor) -> Tensor:
        """The elementwise minimum over all processes; errors as in `total`."""
        return make()

    def first(self, make: Callable[[], Tensor], like: Tensor) -> Tensor:
        """What the first process makes; the others only wait. Errors as in `total`."""
        return make()

    def joined(self, part: Tensor, size: int) -> Tensor:
        """All shares, `(size,)`, of a vector of which this process has its own."""
        return part

    def attempt(self, make: Callable[[], T]) -> T:
        """What this process makes, if none of them fails; errors as in `total`."""
        return make()


ALONE = Shards()


class DistributedShards(Shards):
    """The processes of a `torch.distributed` group; the default group where `None`."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)

    def total(self, make: Callable[[], Tensor], like: Tensor) -> Tensor:
        return self._reduced(make, like, dist.ReduceOp.SUM, torch.nan)

    def least(self, make: Callable[[], Tensor], like: Tensor) -> Tensor:
        return self._reduced(make, like, dist.ReduceOp.MIN, -torch.inf)

    def first(self, make: Callable[[], Tensor], like: Tensor) -> Tensor:
        # As a sum: a process that fails alone and one that is not asked then do the same thing.
        return self.total(make if self.rank == 0 else lambda: torch.zeros_like(like), like)

    def joined(self, part: Tensor, size: int) -> Tensor:
        whole = part.new_zeros(size)
        whole[self.part(size)] = part
        dist.all_reduce(whole, group=self.group)
        return whole

    def attempt(self, make: Callable[[], T]) -> T:
        error, made = None, None
        try:
            made = make()
        except Exception as caught:
            error = caught
        device = "cuda" if "nccl" in dist.get_backend(self.group) else "cpu"
        failed = torch.tensor(float(error is not None), device=device)
        dist.all_reduce(failed, group=self.group)
        if error is not None:
            raise error
        if float(failed):
            raise RuntimeError(f"{int(failed)} of {self.count} ranks failed")
        return made  # type: ignore[return-value]

    def _reduced(self, make: Callable[[], Tensor], like: Tensor, op: Any, poison: float) -> Tensor:
        error: Exception | None = None
        try:
            part = make().contiguous()
        except Exception as caught:
            error, part = caught, torch.full_like(like, poison)
        dist.all_reduce(part, op, group=self.group)
        if error is not None:
            raise error
        if bool((part == poison).any() if poison == poison else part.isnan().any()):
            raise RuntimeError("another rank failed")
        return part
