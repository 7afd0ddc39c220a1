"""A lock between processes that make the same file."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keeps other processes from this block for `path`, by a lock beside it that the system frees when a process ends.

    Whoever waited should look again whether there is anything left to do.

    Args:
        path: a file or a folder, there or not; its parent is made where it is missing.

    Raises:
        OSError: the parent cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f"{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
