"""Flickr8k for a study: its training captions as pairs, mismatched by a fixed list, and its dev split for validation.

Hodosh, Young, Hockenmaier: Framing image description as a ranking task, JAIR 2013. The data are for research, and are
not in the package. The user needs a folder with `train-*.tar` and `dev-*.tar`, whose samples are `KEY.jpg` and
`KEY.json` (`{"captions": [...]}`). For each share `N` of mismatched images, it also holds a list `mismatch-N.csv`
(`key,caption_key`), or `mismatch-near-N.csv` with captions of similar images.
"""

import csv
import json
import os
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from openclip_otco.data.shard import shard_samples
from openclip_otco.errors import UserError

SOURCE = "OPENCLIP_OTCO_FLICKR8K"
# Goes up whenever the same source begins to give other shards.
VERSION = 1
_SHARDS_PER_CAPTION = 2


def source_folder(given: str | None = None) -> Path:
    """The folder with Flickr8k: `given`, or what the environment variable names.

    Raises:
        UserError: neither is given, or it is no folder with `train-*.tar` and `dev-*.tar`.
    """
    named = given or os.environ.get(SOURCE)
    wanted = "a folder with train-*.tar, dev-*.tar and mismatch-*.csv"
    if not named:
        raise UserError(f"Flickr8k: let the environment variable {SOURCE} name {wanted}")
    folder = Path(named).expanduser()
    for split in ("train", "dev"):
        if not any(folder.glob(f"{split}-*.tar")):
            raise UserError(f"Flickr8k: {folder} has no {split}-*.tar; let {SOURCE} name {wanted}")
    return folder


def fingerprint(folder: Path) -> list[list[str | int]]:
    """Names and sizes of the files of Flickr8k in `folder`: equal where a copy of it lies."""
    files = [path for kind in ("*.tar", "mismatch-*.csv") for path in folder.glob(kind)]
    return sorted([path.name, path.stat().st_size] for path in files)


NO_MISMATCH = "mismatch-0"


def write_train(source: Path, folder: Path, mismatch: str = NO_MISMATCH, matched_only: bool = False) -> None:
    """Writes the training shards into `folder`: a sample for each image and caption, and OpenCLIP's `sizes.json`.

    An image of the list `mismatch` gets all captions of the image that the list names, and none of its own. A shard
    holds the i-th captions of one half of the images. So an image comes only once in a shard, and seldom twice in the
    samples that OpenCLIP shuffles at a time, about two shards. Equal sources give equal bytes.

    Args:
        source: the folder with Flickr8k.
        folder: must not exist.
        mismatch: name of a list, less `.csv`.
        matched_only: leave the images of the list out.

    Raises:
        UserError: the list is missing, or does not fit the images.
    """
    from webdataset.writer import TarWriter  # Imported late: WebDataset imports torch.

    samples = dict(_samples(source, "train"))
    donors = _donors(source, mismatch) if mismatch != NO_MISMATCH else {}
    if strangers := sorted({*donors, *donors.values()} - samples.keys()):
        raise UserError(f"Flickr8k: {_list(source, mismatch)} names {strangers[0]}, which no train-*.tar holds")
    captions = {key: samples[donors.get(key, key)][1] for key in samples}
    keys = sorted(samples.keys() - donors.keys() if matched_only else samples)
    if not keys:
        raise UserError(f"Flickr8k: {_list(source, mismatch)} names all images, so matched-only leaves none")
    random.Random(VERSION).shuffle(keys)
    bounds = [len(keys) * part // _SHARDS_PER_CAPTION for part in range(_SHARDS_PER_CAPTION + 1)]
    folder.mkdir(parents=True)
    sizes: dict[str, int] = {}
    for index in range(max(len(captions[key]) for key in keys)):
        for start, stop in pairwise(bounds):
            name = f"{len(sizes):04d}.tar"
            own = [key for key in keys[start:stop] if index < len(captions[key])]
            sizes[name] = len(own)
            with (
                (folder / name).open("wb") as stream,
                TarWriter(stream, user="", group="", mtime=0, encoder=False) as writer,
            ):
                for key in own:
                    image, caption = samples[key][0], captions[key][index]
                    writer.write({"__key__": f"{key}-{index}", "jpg": image, "txt": caption.encode()})
    _write_sizes(folder, sizes)


def write_val(source: Path, folder: Path) -> None:
    """Writes the dev split into `folder`: a sample is an image, its first caption, and all of them in `KEY.json`.

    Args:
        source: the folder with Flickr8k.
        folder: must not exist.
    """
    from webdataset.writer import TarWriter

    folder.mkdir(parents=True)
    count = 0
    with (
        (folder / "0000.tar").open("wb") as stream,
        TarWriter(stream, user="", group="", mtime=0, encoder=False) as writer,
    ):
        for key, (image, captions) in _samples(source, "dev"):
            facts = json.dumps({"captions": captions}).encode()
            writer.write({"__key__": key, "jpg": image, "json": facts, "txt": captions[0].encode()})
            count += 1
    _write_sizes(folder, {"0000.tar": count})


def _samples(source: Path, split: str) -> Iterator[tuple[str, tuple[bytes, list[str]]]]:
    """Key, JPEG bytes and captions of each image.

    Raises:
        UserError: a shard cannot be read, or a file of a sample is missing or holds no captions.
    """
    for path in sorted(source.glob(f"{split}-*.tar")):
        for key, files in shard_samples(str(path), "Flickr8k"):
            content = {file.kind: file.content for file in files}
            if not {"jpg", "json"} <= content.keys():
                raise UserError(f"Flickr8k: {path} lacks {key}.jpg or {key}.json; copy the shard anew")
            try:
                captions = json.loads(content["json"])["captions"]
            except (ValueError, KeyError, TypeError):
                captions = None
            if not isinstance(captions, list) or not captions or not all(isinstance(each, str) for each in captions):
                raise UserError(f'Flickr8k: {path}: {key}.json must be {{"captions": [TEXT, ...]}} with a text or more')
            yield key, (content["jpg"], captions)


def _list(source: Path, mismatch: str) -> Path:
    return source / f"{mismatch}.csv"


def _donors(source: Path, mismatch: str) -> dict[str, str]:
    """By image, the image whose captions it gets."""
    path = _list(source, mismatch)
    if not path.is_file():
        there = sorted(path.stem for path in source.glob("mismatch-*.csv"))
        raise UserError(f"Flickr8k: {path} is missing; there is {', '.join([NO_MISMATCH, *there])}")
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            return {row["key"]: row["caption_key"] for row in csv.DictReader(stream)}
    except (KeyError, ValueError, csv.Error) as error:
        raise UserError(f"Flickr8k: {path} cannot be used: it needs the columns key and caption_key") from error


def _write_sizes(folder: Path, sizes: dict[str, int]) -> None:
    (folder / "sizes.json").write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
