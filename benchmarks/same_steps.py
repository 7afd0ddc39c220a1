"""Do two commits of this package train alike, to the bit, also from a checkpoint of the earlier one?

`python benchmarks/same_steps.py BEFORE [AFTER] [-- FLAGS]`, for a change that should change no number. Each commit is
installed into a folder of its own, and trains two epochs on the same rendered scenes, in the same order, with
`--loss otco` and FLAGS for OpenCLIP's script. AFTER is `HEAD` if it is not given. Both also train a second epoch from
BEFORE's checkpoint of the first one: OpenCLIP draws the order of a resumed epoch anew. Then three pairs of checkpoints
are compared, value by value: after one epoch, after two, and after the resumed epoch.

It prints a line for each pair of checkpoints: how many tensors are equal to the bit, and what differs, with `*` for
numbers in names. It exits with 1 if anything differs. What only one of the two commits keeps in a checkpoint is told,
and is no difference; nor are the run's name and the seconds that a plan took.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from versions import ROOT, checked, write_commit

from openclip_otco.scenes.shards import Settings, write_scenes

# What no two runs have alike.
UNLIKE = r"^/name$|/seconds$"
PAIRS = 1280
BATCH = 64
FLAGS = {
    "model": "RN10t-bert-tiny", "device": "cpu", "precision": "fp32", "workers": 0, "batch-size": BATCH, "epochs": 2,
    "lr": 1e-3, "warmup": 4, "save-frequency": 1, "log-every-n-steps": 1, "dataset-type": "csv", "csv-separator": ",",
    "seed": 0, "loss": "otco", "otco-window": 2,
}  # fmt: skip


@dataclass
class Comparison:
    """Of two checkpoints: how many tensors are equal, the paths of values that differ, and of those that one lacks."""

    equal: int = 0
    differ: list[str] = field(default_factory=list)
    alone: list[str] = field(default_factory=list)


def compare(before: Any, after: Any) -> Comparison:
    """Compares two checkpoints: tensors to the bit, and each other value by `==`."""
    ours, theirs = dict(leaves(before)), dict(leaves(after))
    found = Comparison(alone=list(ours.keys() ^ theirs.keys()))
    for path in ours.keys() & theirs.keys():
        one, other = ours[path], theirs[path]
        if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
            found.differ += [path] if one != other and not re.search(UNLIKE, path) else []
        elif one.shape == other.shape and one.dtype == other.dtype and bits(one) == bits(other):
            found.equal += 1
        else:
            found.differ.append(path)
    return found


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The values in nested dicts, lists and tuples, each with its path."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))
    else:
        yield path, value
        return
    for name, inner in items:
        yield from leaves(inner, f"{path}/{name}")


def told(paths: list[str]) -> str:
    """Paths that differ in numbers alone are one."""
    return ", ".join(sorted({re.sub(r"\b\d+\b", "*", path) for path in paths})) or "nothing"


def write_data(folder: Path, pairs: int) -> Path:
    """Scenes, two of five with another scene's caption, listed in a CSV: WebDataset's order ignores the seed."""
    write_scenes(folder, Settings(train=pairs, val=16, mismatch=0.4, shards=1))
    with tarfile.open(folder / "train/0000.tar") as shard:
        shard.extractall(folder, filter="data")
    listed = folder / "scenes.csv"
    with listed.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("filepath", "title"))
        for picture in sorted(folder.glob("*.jpg")):
            rows.writerow((picture, picture.with_suffix(".txt").read_text(encoding="utf-8").strip()))
    return listed


def install(commit: str, folder: Path) -> str:
    """Installs a commit of this package, without what it needs, into `folder/site`, and returns its short name."""
    name = write_commit(ROOT, commit, folder)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder / "site", folder]
    checked(pip, folder, dict(os.environ))
    return name


def train(site: Path, data: Path, logs: Path, name: str, flags: list[str], resume: Path | None = None) -> Path:
    """Trains with the package in `site`, and returns the folder of its checkpoints."""
    words = FLAGS | {"train-data": data, "logs": logs, "name": name} | ({"resume": resume} if resume else {})
    options = [str(part) for flag, value in words.items() for part in (f"--{flag}", value)]
    environment = os.environ | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    # -P: the folder in which this is started may hold another version of the package.
    done = subprocess.run(
        [sys.executable, "-P", "-m", "open_clip_train.main", *options, *flags],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-5000:]}")
    return logs / name / "checkpoints"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", metavar="BEFORE", help="a commit")
    parser.add_argument("after", metavar="AFTER", nargs="?", default="HEAD", help="a later commit")
    parser.add_argument("flags", metavar="FLAGS", nargs="*", help="for OpenCLIP's script, after --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="same-steps-") as name:
        folder = Path(name)
        names = [install(commit, folder / side) for commit, side in ((args.before, "before"), (args.after, "after"))]
        data = write_data(folder / "data", PAIRS)
        sides = [(folder / side / "site", side) for side in ("before", "after")]
        before, after = (train(site, data, folder / "logs", side, args.flags) for site, side in sides)
        first = before / "epoch_1.pt"
        rest = [train(site, data, folder / "logs", f"{side}-resumed", args.flags, first) for site, side in sides]
        print(f"{names[0]} and {names[1]}, {PAIRS // BATCH} steps an epoch, {' '.join(args.flags) or 'default flags'}")
        differs = False
        for what, one, other in (
            ("one epoch", first, after / "epoch_1.pt"),
            ("two epochs", before / "epoch_2.pt", after / "epoch_2.pt"),
            (f"a second epoch from {names[0]}'s first", *(folder / "epoch_2.pt" for folder in rest)),
        ):
            found = compare(*(torch.load(path, map_location="cpu", weights_only=True) for path in (one, other)))
            differs |= bool(found.differ) or not found.equal
            print(f"{what}: {found.equal} tensors equal")
            print(f"    different: {told(found.differ)}; in one alone: {told(found.alone)}", flush=True)
    sys.exit(int(differs))


if __name__ == "__main__":
    main()
