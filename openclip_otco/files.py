"""Files that appear whole or not at all, and locks between the processes that make them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

_PARTIAL = ".partial-"


@contextmanager
def written_whole(path: Path, synced: bool = False) -> Iterator[Path]:
    """A path to write to, beside `path`; the file takes the place of `path` if the block ends without an error.

    A reader, or a kill halfway, meets the old file or the new one. Several processes may do this at once; the last one
    wins. What a kill leaves, `remove_partial` takes away.

    Args:
        path: its parent is made where it is missing.
        synced: wait until the new file is on the disk, so that a crash of the machine, too, leaves one of the two.

    Raises:
        OSError: the parent cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=_PARTIAL, dir=path.parent) as folder:
        partial = Path(folder, path.name)
        yield partial
        if synced:
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)


def remove_partial(folder: Path) -> None:
    """Deletes what killed processes left in `folder` of files that were to be written whole. None may be at it now."""
    for partial in folder.glob(f"{_PARTIAL}*"):
        shutil.rmtree(partial)


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path`, whole or not at all; it is on the disk when this returns.

    Raises:
        OSError: the file or its folder cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    # In a folder from a stranger it may lie there already, as a link to elsewhere.
    part.unlink(missing_ok=True)
    with part.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps other processes from this block for `path`, by a lock beside it that the system frees when a process ends.

    A process that had to wait should look again whether there is anything left to do.

    Args:
        path: a file or a folder, there or not; its parent is made where it is missing.

    Raises:
        OSError: the parent cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f"{path.name}.lock")):
        yield
