"""A shard: a tar file whose neighbouring files of the same name make a sample, as in WebDataset."""

from __future__ import annotations

import contextlib
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO
from urllib.parse import urlparse

from openclip_otco.errors import UserError, last_line

# The errors of reading a torn shard, or a file that is not a shard.
BROKEN = (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)
# The pattern with which WebDataset splits a file's name into key and type.
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")


@dataclass(frozen=True)
class File:
    """A file of a sample in a shard, with its header; `kind` is its type, such as `jpg`, in small letters."""

    header: tarfile.TarInfo
    kind: str
    content: bytes


def shard_samples(shard: str, flag: str = "--data") -> Iterator[tuple[str, list[File]]]:
    """Key and files of each sample of a shard, as OpenCLIP reads them.

    A sample is files in a row with the same name up to the first dot, each of another type.

    Args:
        shard: a path, a URL, or `pipe:` and a command; anything that WebDataset opens.
        flag: what named the shard, for the message of an error.

    Raises:
        UserError: the shard cannot be read to its end.
    """
    key, files = None, list[File]()
    try:
        with _opened(shard) as stream, tarfile.open(fileobj=stream, mode="r|*") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # else it keeps all headers in memory
                of, kind = key_and_kind(member.name)
                if of is None or not member.isreg():
                    continue
                # A type that comes again begins a new sample, as in OpenCLIP: some shards of LAION repeat keys.
                if files and (of != key or any(kind == file.kind for file in files)):
                    yield str(key), files
                    files = []
                key = of
                content = tar.extractfile(member)
                assert content is not None  # it is a regular file
                files.append(File(member, kind, content.read()))
    except BROKEN as error:
        raise UserError(f"{flag}: {shard} is no readable tar file ({last_line(error)})") from error
    if files:
        yield str(key), files


def key_and_kind(name: str) -> tuple[str | None, str]:
    """The key of a file's sample and the file's type, which begins behind the first dot; no key where there is none."""
    found = _NAME.match(name)
    return (found[1], found[2].lower()) if found else (None, "")


def is_local(shard: str) -> bool:
    """Whether a shard is a file of this machine, neither a URL nor a `pipe:`."""
    return not shard.startswith("pipe:") and not urlparse(shard).scheme


def _opened(shard: str) -> contextlib.AbstractContextManager[IO[bytes]]:
    if is_local(shard):
        return open(shard, "rb")
    # Not at the top, nor for a file: WebDataset imports torch.
    from webdataset.gopen import gopen

    stream: contextlib.AbstractContextManager[IO[bytes]] = gopen(shard)
    return stream
