"""A look at the shards before training: are they there, and do they hold captions?

OpenCLIP passes over samples without a `.txt` in silence, so that shards without captions would make it wait for ever.
"""

from __future__ import annotations

import os
import tarfile
import zlib
from urllib.parse import urlparse

from webdataset.shardlists import expand_urls

# Members of a shard that are looked at; a caption stands next to its image, so the first few hundred tell.
_MEMBERS = 1000


def caption_problem(data: str) -> str | None:
    """What is wrong with the shards named by `--train-data` or `--val-data`, in one line; `None` if nothing is.

    Of each `::` source the first local shard that exists must be a readable tar with a caption (`.txt`) in it. Gaps in
    a range are OpenCLIP's to skip; remote shards and pipes are not looked at.
    """
    for source in filter(None, data.split("::")):
        try:
            shards = [shard for shard in expand_urls(source) if shard != "-" and not urlparse(shard).scheme]
        except Exception as error:  # the expansion's own errors have no common base
            return f"cannot expand {source}: {_first_line(error)}"
        there = next((shard for shard in shards if os.path.isfile(shard)), None)
        if shards and there is None:
            return f"none of the {len(shards)} shards of {source} exists; check the path and the brace range"
        if there is not None and (problem := _shard_problem(there)):
            return problem
    return None


def _shard_problem(shard: str) -> str | None:
    suffixes: set[str] = set()
    try:
        with tarfile.open(shard) as tar:
            for count, member in enumerate(tar):
                suffixes.add(member.name.rpartition("/")[2].partition(".")[2].lower())
                if "txt" in suffixes:
                    return None
                if count >= _MEMBERS:
                    break
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        return f"{shard} is no readable tar file ({_first_line(error)})"
    found = ", ".join(f".{suffix}" for suffix in sorted(suffixes - {""})) or "nothing"
    return f"{shard} holds no captions: a sample needs KEY.txt beside its image, found {found}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
