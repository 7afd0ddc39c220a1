"""The lock of an output folder: two commands at work in one folder would delete each other's runs."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from openclip_otco.errors import UserError


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold the lock of `folder`, and yield its file descriptor, which children inherit.

    The system frees the lock when the last process that holds it has ended. If a command is killed, its folder is thus
    free as soon as the trainings that it could not stop have ended. For that, children must
    get the descriptor, which filelock keeps to itself.

    Raises:
        UserError: another process holds it.
    """
    with open(folder / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{folder}: is in use by another `compare` (process {file.read().strip() or 'unknown'}), or by a "
                "training that it left when it was killed; wait for it, or name another folder by --out"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield file.fileno()
