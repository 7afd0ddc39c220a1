"""Several processes solve one problem: each takes a slice of the columns, and sums over all columns are collectives.

Every process has to call the same collectives in the same order, whatever happens to it. So the work that processes
share is an `attempt`. Before each of its collectives they tell each other whether all of them are still well. A process
that fails, on whatever line, tells so in place of its next collective, and all leave the attempt with an error. This
costs a sum of one number before each collective, and no other line needs a guard.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Group:
    """The processes that solve a problem together; here only this one."""

    rank = 0
    count = 1

    def part(self, size: int) -> slice:
        """This process's share of `size` rows or columns; shares differ by one at most."""
        return slice(size * self.rank // self.count, size * (self.rank + 1) // self.count)

    def total(self, part: Tensor) -> Tensor:
        """The sum over all processes of their `part`, equal to the bit on all of them.

        Raises:
            RuntimeError: another process failed. The process that failed raises its own error.
        """
        return part

    def least(self, part: Tensor) -> Tensor:
        """The elementwise minimum of all processes' `part`; errors as in `total`."""
        return part

    def first(self, make: Callable[[], Tensor], like: Tensor) -> Tensor:
        """The result of `make` in the first process, with the shape, type and device of `like`; the others only wait.

        Errors as in `total`.
        """
        return make()

    def joined(self, part: Tensor, size: int) -> Tensor:
        """The vector `(size,)` of all processes' shares; `part` is the share of this one. Errors as in `total`."""
        return part

    def attempt(self, make: Callable[[], T]) -> T:
        """The result of `make` in this process, if no process fails; errors as in `total`.

        All collectives belong in an attempt. One attempt may be part of another.
        """
        return make()


ALONE = Group()


class DistributedGroup(Group):
    """The processes of a `torch.distributed` group; the default group where `None`."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)
        # Made now, as a process that has run out of memory has to be able to say so.
        self._failed = torch.zeros(1, device="cuda" if "nccl" in dist.get_backend(group) else "cpu")
        self._attempts = 0
        self._failure_is_known = False

    def total(self, part: Tensor) -> Tensor:
        """As `Group.total`."""
        return self._reduced(part.clone(memory_format=torch.contiguous_format), dist.ReduceOp.SUM)

    def least(self, part: Tensor) -> Tensor:
        """As `Group.least`."""
        return self._reduced(part.clone(memory_format=torch.contiguous_format), dist.ReduceOp.MIN)

    def first(self, make: Callable[[], Tensor], like: Tensor) -> Tensor:
        """As `Group.first`."""
        # A sum is exact here, as the others add zero.
        return self.total(make() if self.rank == 0 else torch.zeros_like(like))

    def joined(self, part: Tensor, size: int) -> Tensor:
        """As `Group.joined`."""
        joined = part.new_zeros(size)
        joined[self.part(size)] = part
        return self._reduced(joined, dist.ReduceOp.SUM)

    def attempt(self, make: Callable[[], T]) -> T:
        """As `Group.attempt`."""
        if self._attempts == 0:
            self._failure_is_known = False
        self._attempts += 1
        try:
            made = make()
            self._meet()
        except Exception:
            if not self._failure_is_known:
                self._meet(failed=True)
            raise
        finally:
            self._attempts -= 1
        return made

    def _reduced(self, part: Tensor, op: Any) -> Tensor:
        self._meet()
        dist.all_reduce(part, op, group=self.group)
        return part

    def _meet(self, failed: bool = False) -> None:
        """Tells the others whether this process failed; raises an error if only another one failed."""
        self._failed.fill_(failed)
        dist.all_reduce(self._failed, group=self.group)
        count = int(self._failed)
        self._failure_is_known = count > 0
        if count and not failed:
            raise RuntimeError(f"{count} of {self.count} ranks failed")
