"""Shards of a data setting: scenes or Flickr8k, made once, and the pattern by which OpenCLIP finds them."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from openclip_otco.data import flickr8k
from openclip_otco.errors import UserError
from openclip_otco.study.study import DataSetting, Flags, Flickr8k, arguments

# Stands for the study's output folder in the flags of a run, so that they hold no path of a machine.
OUT = "OUT"
_SCENES, _FLICKR8K, _SOURCE = "scenes.json", "flickr8k.json", "source.json"


def in_folder(value: str, out: Path) -> str:
    """`value` with the folder `out` in place of `OUT/`, at its beginning or at that of a part of a `::` list."""
    prefix = f"{OUT}/"
    parts = (f"{out}/{part.removeprefix(prefix)}" if part.startswith(prefix) else part for part in value.split("::"))
    return "::".join(parts)


def pattern(folder: str, names: list[str]) -> str:
    """What `--train-data` takes for the shards `names` in `folder`: a brace range, or a `::` list."""
    names = sorted(names)
    stems = [name.removesuffix(".tar") for name in names]
    if len(names) > 1 and all(stem.isascii() and stem.isdigit() for stem in stems):
        first, last, width = int(stems[0]), int(stems[-1]), len(stems[0])
        if names == [f"{number:0{width}d}.tar" for number in range(first, last + 1)]:
            return f"{folder}/{{{stems[0]}..{stems[-1]}}}.tar"
    return "::".join(f"{folder}/{name}" for name in names)


def scenes_command(setting: DataSetting, folder: Path) -> list[str]:
    """The command that renders the scenes of `setting` into `folder`."""
    options = arguments(setting.scenes or {})
    return [sys.executable, "-m", "openclip_otco.cli", "scenes", str(folder), *options]


def make(setting: DataSetting, out: Path) -> None:
    """Make the shards of `setting` under `out/data`, unless they are there and were made with the same options.

    Raises:
        UserError: they cannot be made, or a folder holds something that this command did not make.
    """
    key = f"data.{setting.name}"
    if setting.scenes is not None:
        _make_once(
            out / "data" / setting.name,
            _SCENES,
            setting.scenes,
            lambda part: _render(setting, part),
            f"rendering the scenes of {key}",
        )
    elif (wanted := setting.flickr8k) is not None:
        train, val = _flickr8k_folders(setting, out)
        recipe = {"version": flickr8k.VERSION}

        def write_train(part: Path) -> None:
            source = flickr8k.source_folder(wanted.folder)
            flickr8k.write_train(source, part, wanted.list_name, wanted.matched_only)
            _note_source(source, part)

        def write_val(part: Path) -> None:
            source = flickr8k.source_folder(wanted.folder)
            flickr8k.write_val(source, part)
            _note_source(source, part)

        try:
            announcement = f"writing the shards of {key}"
            _make_once(train, _FLICKR8K, {**recipe, **_mismatch_recipe(wanted)}, write_train, announcement)
            _make_once(val, _FLICKR8K, recipe, write_val)
            for folder in (train, val):
                _check_source(wanted.folder, folder)
        except UserError as error:
            raise UserError(f"{key}: {error}") from error


def _make_once(folder: Path, marker: str, recipe: Any, make: Callable[[Path], None], announcement: str = "") -> None:
    """Let `make` write `folder`, unless it is there and its `marker` file holds this `recipe`."""
    if (folder / marker).is_file():
        if _read_json(folder / marker) == recipe:
            return
        shutil.rmtree(folder)
    elif folder.exists():
        raise UserError(f"{folder}: is in the way of the study's data, and was not made by `compare`; move it away")
    # Made under another name, and renamed at the end: a folder with its final name is complete.
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if announcement:
        print(announcement, file=sys.stderr, flush=True)
    make(part)
    (part / marker).write_text(json.dumps(recipe))
    part.rename(folder)


def _read_json(path: Path) -> Any:
    """What the file holds; None if there is no such file, or it is torn."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _note_source(source: Path, folder: Path) -> None:
    (folder / _SOURCE).write_text(json.dumps(flickr8k.fingerprint(source)), encoding="utf-8")


def _check_source(given: str | None, folder: Path) -> None:
    """Check that the shards in `folder` come from the Flickr8k that is named now, if one is.

    Runs on other data would have the same flags, so that they would count as finished.

    Raises:
        UserError: they come from another one.
    """
    noted = _read_json(folder / _SOURCE)  # shards of an earlier version have no note
    try:
        source = flickr8k.source_folder(given)
    except UserError:
        return  # the shards are there, and nothing more is needed
    if noted is not None and noted != flickr8k.fingerprint(source):
        raise UserError(f"{folder} was made from another Flickr8k than {source}; name another --out")


def _render(setting: DataSetting, folder: Path) -> None:
    done = subprocess.run(
        scenes_command(setting, folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if done.returncode or not list(folder.glob("train/*.tar")):
        tail = " / ".join(done.stdout.strip().splitlines()[-3:]) or "no shards were written"
        raise UserError(f"data.{setting.name}: scenes failed (exit {done.returncode}): {tail}")


def _flickr8k_folders(setting: DataSetting, out: Path) -> tuple[Path, Path]:
    """Folders of training and validation. The first name tells what the folder holds, and so do a run's flags."""
    assert setting.flickr8k is not None
    name = setting.flickr8k.list_name + ("-matched" if setting.flickr8k.matched_only else "")
    return out / "data" / f"flickr8k-{name}", out / "data" / "flickr8k-dev"


def _mismatch_recipe(wanted: Flickr8k) -> dict[str, Any]:
    # Options that are off are left out, so that shards from before these options existed count as the same.
    options = {"near": wanted.near, "matched_only": wanted.matched_only}
    return {"mismatch": wanted.mismatch, **{name: True for name, given in options.items() if given}}


def data_flags(setting: DataSetting, out: Path) -> Flags:
    """OpenCLIP's data flags of `setting`; `SHARDS` stands for shards that are not made yet."""
    if setting.scenes is not None:
        folders = [out / "data" / setting.name / split for split in ("train", "val")]
    elif setting.flickr8k is not None:
        folders = list(_flickr8k_folders(setting, out))
    else:
        return setting.flags
    flags: Flags = {}
    for split, folder in zip(("train", "val"), folders, strict=True):
        names = [path.name for path in folder.glob("*.tar")]
        flags[f"{split}-data"] = pattern(f"{OUT}/{folder.relative_to(out).as_posix()}", names or ["SHARDS"])
    return {**flags, **setting.flags}


def samples_per_epoch(flags: Flags, out: Path) -> int | None:
    """Training samples of an epoch, from the flags or from `sizes.json`; None if neither tells."""
    if isinstance(given := flags.get("train-num-samples"), int):
        return given
    first = in_folder(str(flags["train-data"]), out).split("::")[0]
    try:
        return sum(map(int, json.loads((Path(first).parent / "sizes.json").read_text()).values()))
    except (OSError, ValueError, AttributeError, TypeError):
        return None
