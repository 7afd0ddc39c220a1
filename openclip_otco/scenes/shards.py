"""Shards: the scenes data set on disk, as WebDataset shards that OpenCLIP reads as they are."""

import argparse
import json
import random
import tempfile
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from openclip_otco.errors import UserError
from openclip_otco.scenes.mismatch import mismatch
from openclip_otco.scenes.pairs import Pair, make_pairs

MANIFEST = "settings.json"
# Goes up whenever the same settings begin to give other bytes.
_VERSION = 1
_PARTIAL = ".partial-"


@dataclass(frozen=True)
class Settings:
    """What decides a data set's bytes; `size` is the side of a picture in pixels, `mismatch` a share in [0, 1]."""

    train: int = 5000
    val: int = 1000
    mismatch: float = 0.0
    seed: int = 0
    size: int = 64
    shards: int = 8

    def __post_init__(self) -> None:
        if self.shards < 1:
            raise UserError(f"--shards {self.shards}: give 1 or more")
        for split in ("train", "val"):
            if (count := getattr(self, split)) < self.shards:
                raise UserError(f"--{split} {count}: give at least one pair for each of the --shards {self.shards}")
        if not 0 <= self.mismatch <= 1:
            raise UserError(f"--mismatch {self.mismatch}: give a share of the training pairs between 0 and 1")
        if not 32 <= self.size <= 1024:
            raise UserError(f"--size {self.size}: give 32 to 1024 pixels")


def _member(pair: Pair, placed: tuple, **matched: object) -> bytes:
    things = [{**asdict(thing), **asdict(spot)} for thing, spot in zip(pair.scene.things, placed, strict=True)]
    facts = {
        "caption": pair.caption,
        "family": pair.family,
        "layout": pair.scene.layout,
        "near_miss": pair.near_miss,
        "things": things,
        **matched,
    }
    return json.dumps(facts, sort_keys=True).encode()


def _write_split(folder: Path, name: str, pairs: list[Pair], settings: Settings, donors: dict[int, int]) -> None:
    # Imported late: the command's help must not wait for torch, which WebDataset imports.
    from tqdm import tqdm
    from webdataset.writer import TarWriter

    from openclip_otco.scenes.picture import place, render

    folder.mkdir()
    keys = [f"{name}{index:06d}" for index in range(len(pairs))]
    bounds = [len(pairs) * shard // settings.shards for shard in range(settings.shards + 1)]
    sizes = {}
    bar = tqdm(total=len(pairs), desc=f"scenes {name}", unit="pair", disable=None)
    for shard, (start, stop) in enumerate(pairwise(bounds)):
        path = folder / f"{shard:04d}.tar"
        sizes[path.name] = stop - start
        with path.open("wb") as stream, TarWriter(stream, user="", group="", mtime=0, encoder=False) as writer:
            for index in range(start, stop):
                pair, donor = pairs[index], donors.get(index, index)
                # One stream for each picture, so that no other setting changes what a picture looks like.
                rng = random.Random(f"{settings.seed} {keys[index]}")
                placed = place(pair.scene, rng)
                matched = {"matched": True} if donor == index else {"matched": False, "donor": keys[donor]}
                writer.write(
                    {
                        "__key__": keys[index],
                        "jpg": render(pair.scene, placed, settings.size, rng),
                        "json": _member(pair, placed, **matched),
                        "txt": pairs[donor].caption.encode(),
                    }
                )
                bar.update()
    bar.close()
    (folder / "sizes.json").write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")


def _manifest(settings: Settings) -> str:
    return json.dumps({"version": _VERSION, **asdict(settings)}, indent=1) + "\n"


def _state(folder: Path, settings: Settings) -> str:
    """ "free", "there" (this very data set, finished), "torn" (the same with files missing), "other" or "foreign"."""
    try:
        manifest = (folder / MANIFEST).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        held = folder.exists() and (
            not folder.is_dir() or any(not entry.name.startswith(_PARTIAL) for entry in folder.iterdir())
        )
        return "foreign" if held else "free"
    if manifest != _manifest(settings):
        return "other"
    names = [f"{shard:04d}.tar" for shard in range(settings.shards)] + ["sizes.json"]
    return "there" if all((folder / split / name).is_file() for split in ("train", "val") for name in names) else "torn"


def write_scenes(folder: Path, settings: Settings, force: bool = False) -> bool:
    """Writes `train/` and `val/` into `folder`, each with `0000.tar`... and the `sizes.json` that OpenCLIP reads.

    The folder's manifest is its last file to appear, so a data set with a manifest is whole.

    Args:
        folder: made where missing.
        settings: equal settings give equal bytes.
        force: replace another data set's `train/` and `val/`; other files in `folder` stay.

    Returns:
        False when the very data set was there already, True when it was written.

    Raises:
        UserError: `folder` holds something else and `force` is off, or the settings do not fit each other.
    """
    state = _state(folder, settings)
    if state == "there" and not force:
        return False
    if folder.exists() and not folder.is_dir():
        raise UserError(f"OUT_DIR {folder} is a file; name a folder")
    if state in ("other", "foreign") and not force:
        what = "another scenes data set" if state == "other" else "files that are not a scenes data set"
        raise UserError(f"OUT_DIR {folder} holds {what}; name an empty folder, or replace train/ and val/ by --force")
    # Validation comes first: training avoids its scenes, whatever the number of training pairs.
    val = make_pairs(settings.val, f"{settings.seed} val")
    train = make_pairs(settings.train, f"{settings.seed} train", avoid={pair.scene for pair in val})
    captions = [pair.caption for pair in train]
    donors = mismatch(captions, settings.mismatch, random.Random(f"{settings.seed} mismatch"))

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=_PARTIAL, dir=folder, ignore_cleanup_errors=True) as name:
        partial = Path(name)
        _write_split(partial / "val", "val", val, settings, {})
        _write_split(partial / "train", "train", train, settings, donors)
        (partial / MANIFEST).write_text(_manifest(settings), encoding="utf-8")
        if not force and _state(folder, settings) == "there":
            return False  # another process was faster
        (folder / MANIFEST).unlink(missing_ok=True)
        for entry in ("train", "val"):
            if (folder / entry).exists():
                (folder / entry).rename(partial / f"old {entry}")
            (partial / entry).rename(folder / entry)
        (partial / MANIFEST).rename(folder / MANIFEST)
    return True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `openclip-otco scenes`."""
    default = Settings()
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path, help="folder for the data set")
    parser.add_argument("--train", type=int, default=default.train, metavar="N", help="training pairs (%(default)s)")
    parser.add_argument("--val", type=int, default=default.val, metavar="N", help="validation pairs (%(default)s)")
    parser.add_argument(
        "--mismatch",
        type=float,
        default=default.mismatch,
        metavar="SHARE",
        help="share of the training pictures that get another picture's caption, 0 to 1 (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=default.seed, help="equal seeds give equal files (%(default)s)")
    parser.add_argument("--size", type=int, default=default.size, metavar="PIXELS", help="picture side (%(default)s)")
    parser.add_argument(
        "--shards", type=int, default=default.shards, metavar="N", help="shards of train and of val (%(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="replace the train/ and val/ that OUT_DIR holds")


def run(args: argparse.Namespace) -> int:
    """Runs `openclip-otco scenes`, and returns 0.

    Raises:
        UserError: the settings do not fit each other, or the folder cannot be used.
    """
    settings = Settings(args.train, args.val, args.mismatch, args.seed, args.size, args.shards)
    try:
        written = write_scenes(args.out_dir, settings, args.force)
    except OSError as error:
        raise UserError(f"OUT_DIR {args.out_dir} cannot be written: {error}") from error
    last = f"{settings.shards - 1:04d}"
    print(f"{'wrote' if written else 'already there:'} {args.out_dir}")
    shards = [f"--{split}-data '{args.out_dir / split}/{{0000..{last}}}.tar'" for split in ("train", "val")]
    print(*shards)
    return 0
