"""Samples of WebDataset shards: an image, its captions, and its class where it has one."""

import functools
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from openclip_otco.data.shard import BROKEN, is_local, key_and_kind, shard_samples
from openclip_otco.errors import UserError, last_line

# The image types that OpenCLIP reads, in its order of preference.
IMAGE_TYPES = ("jpg", "png", "jpeg", "webp")


@dataclass(frozen=True)
class Sample:
    """One image, preprocessed, with its captions (none in a set for classification) and its class, counted from 0."""

    key: str
    image: Any
    captions: list[str]
    label: int | None


def shards(data: str) -> list[str]:
    """The shards that `data` names: brace ranges, and sources parted by `::`, as in OpenCLIP's `--val-data`.

    Raises:
        UserError: a local shard is missing.
    """
    found = expanded(data)
    missing = [shard for shard in found if is_local(shard) and not Path(shard).is_file()]
    if missing:
        raise UserError(f"--data {data}: {len(missing)} of {len(found)} shards do not exist, first {missing[0]}")
    return found


def captions(sample: Mapping[str, bytes], by_line: bool = False) -> list[str]:
    """All captions of a sample whose files are given by type: `captions` in the `json`, else each `txt`, else `caption`
    in the `json`.

    Args:
        sample: contents by type. `KEY.txt`, `KEY.0.txt`, `KEY.1.txt` and so on are all read.
        by_line: each line of a `txt` is a caption, as clip-benchmark writes its shards for retrieval. Else a `txt` is
            one caption, as OpenCLIP trains on it.

    Raises:
        ValueError: the `json` is not valid, `captions` is not a list of texts, or a text is not UTF-8.
    """
    facts = json.loads(sample["json"]) if "json" in sample else None
    if isinstance(facts, dict) and "captions" in facts:
        listed = facts["captions"]
        if not isinstance(listed, list) or not all(isinstance(caption, str) for caption in listed):
            raise ValueError("`captions` in its .json is no list of texts")
        return listed
    found = [caption for kind in sorted(sample) if is_text(kind) for caption in texts(sample[kind], by_line)]
    if not found and isinstance(facts, dict) and isinstance(facts.get("caption"), str):
        return [facts["caption"]]
    return found


def is_text(kind: str) -> bool:
    """Whether a file of this type holds captions as plain text."""
    return kind == "txt" or kind.endswith(".txt")


def texts(content: bytes, by_line: bool) -> list[str]:
    """The captions in a `txt`: the whole text, or each line of it. White space alone is no caption.

    Raises:
        ValueError: bytes that are no UTF-8.
    """
    text = content.decode()
    return [part.strip() for part in (text.splitlines() if by_line else [text]) if part.strip()]


def expanded(data: str) -> list[str]:
    """The names of the shards that `data` names, whether there or not.

    Raises:
        UserError: braces that do not match.
    """
    try:
        return [shard for source in data.split("::") for shard in braceexpand(source)]
    except ValueError as error:
        raise UserError(f"--data {data}: cannot be expanded: {error}") from error


@functools.cache
def several_captions(data: str) -> bool:
    """Whether images have more than one caption each in the local shards of `data`, as the first sample tells."""
    try:
        path = next(filter(is_local, shards(data)))
        _, files = next(shard_samples(path))
        return len(captions({file.kind: file.content for file in files})) > 1
    except (StopIteration, ValueError):
        return False


def images(data: str) -> int | None:
    """Number of images in `data`, or None where a shard is not local.

    Raises:
        UserError: a shard is missing or no tar file.
    """
    total = 0
    for shard in shards(data):
        if not is_local(shard):
            return None
        try:
            with tarfile.open(shard) as tar:
                total += sum(key_and_kind(member.name)[1] in IMAGE_TYPES for member in tar)
        except BROKEN as error:
            raise UserError(f"--data {data}: {shard} is no readable tar file ({last_line(error)})") from error
    return total


def batches(
    data: str, preprocess: Callable[[Any], Any], size: int, workers: int, by_line: bool = False
) -> Iterator[list[Sample]]:
    """The samples of `data`, `size` at a time, in the order of the shards where there is at most one worker.

    Args:
        data: shards, as OpenCLIP's `--val-data` names them.
        preprocess: what OpenCLIP gives for validation, from a PIL image to a `(3, H, W)` tensor.
        size: samples in a batch; the last may have fewer.
        workers: number of processes that decode; 0 decodes in this process. At most one for each shard is started.
        by_line: as `captions` takes it.

    Raises:
        UserError: a shard or a sample cannot be read.
    """
    import webdataset as wds
    from torch.utils.data import DataLoader

    paths = shards(data)
    pipeline = wds.DataPipeline(
        wds.SimpleShardList(paths),
        wds.split_by_worker,
        wds.tarfile_to_samples(),
        wds.map(functools.partial(_sample, preprocess=preprocess, by_line=by_line)),
    )
    loader = DataLoader(pipeline, batch_size=size, num_workers=min(workers, len(paths)), collate_fn=list)
    try:
        yield from loader
    except Exception as error:  # errors of decoders have no common base, and a worker passes them on as text
        raise UserError(f"--data {data}: {last_line(error)}") from error


def _sample(files: dict[str, Any], preprocess: Callable[[Any], Any], by_line: bool) -> Sample:
    from webdataset.autodecode import imagehandler

    name = f"{files['__key__']} of {files['__url__']}"
    kind = next((kind for kind in IMAGE_TYPES if kind in files), None)
    if kind is None:
        raise ValueError(f"sample {name} has no image ({', '.join(IMAGE_TYPES)})")
    try:
        image = preprocess(imagehandler("pilrgb")(kind, files[kind]))
        label = int(files["cls"]) if "cls" in files else None
        contents = {kind: content for kind, content in files.items() if isinstance(content, bytes)}
        found = captions(contents, by_line)
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"sample {name} cannot be read: {last_line(error)}") from error
    return Sample(files["__key__"], image, found, label)
