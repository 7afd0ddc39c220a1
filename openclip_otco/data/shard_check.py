"""A look at the shards before training: are they there, and do they hold captions?

OpenCLIP skips samples without a `.txt` and gives no warning. With shards without captions it would wait for ever.
"""

from __future__ import annotations

import os
import tarfile

from webdataset.shardlists import expand_urls

from openclip_otco.data.shard import BROKEN, is_local, key_and_kind
from openclip_otco.errors import last_line

# Number of members of a shard that are checked. A caption is next to its image, so the first members are enough.
_MEMBERS = 1000


def caption_problem(data: str) -> str | None:
    """What is wrong with the shards named by `--train-data` or `--val-data`, in one line; `None` if nothing is.

    Only the first local shard that exists of each `::` source is checked: it must be a readable tar file with a caption
    (`.txt`). Shards that a range names but that are missing are no problem, because OpenCLIP skips them. Remote shards
    and pipes are not checked.
    """
    for source in filter(None, data.split("::")):
        try:
            shards = [shard for shard in expand_urls(source) if shard != "-" and is_local(shard)]
        except Exception as error:  # the expansion's own errors have no common base
            return f"cannot expand {source}: {last_line(error)}"
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
                suffixes.add(key_and_kind(member.name)[1])
                if "txt" in suffixes:
                    return None
                if count >= _MEMBERS:
                    break
    except BROKEN as error:
        return f"{shard} is no readable tar file ({last_line(error)})"
    found = ", ".join(f".{suffix}" for suffix in sorted(suffixes - {""})) or "nothing"
    return f"{shard} holds no captions: a sample needs KEY.txt beside its image, found {found}"
