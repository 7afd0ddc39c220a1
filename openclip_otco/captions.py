"""A look at the training shards before training: are they there, and do they hold captions?

OpenCLIP passes over samples without a `.txt` in silence, so that shards without captions would make it wait for ever.
"""

from __future__ import annotations

import os
import tarfile

from webdataset.shardlists import expand_urls

# Members of a shard that are looked at; a caption stands next to its image, so the first few hundred tell.
_MEMBERS = 1000


def caption_problem(train_data: str) -> str | None:
    """What is wrong with the local shards named by `--train-data`, in one line; `None` if nothing is.

    Every named file must exist; the first of each `::` source must be a readable tar with a caption (`.txt`) in it.
    Remote shards and pipes are not looked at.
    """
    for source in train_data.split("::"):
        shards = [shard for shard in expand_urls(source) if "://" not in shard and not shard.startswith("pipe:")]
        for shard in shards:
            if not os.path.isfile(shard):
                return f"{shard} does not exist; check the path and the brace range"
        if shards and (problem := _shard_problem(shards[0])):
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
    except (tarfile.TarError, OSError) as error:
        return f"{shard} is no readable tar file ({error})"
    found = ", ".join(f".{suffix}" for suffix in sorted(suffixes - {""})) or "nothing"
    return f"{shard} holds no captions: a sample needs KEY.txt beside its image, found {found}"
