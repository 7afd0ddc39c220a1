"""Shards of a data setting: rendered scenes made once, and the pattern under which OpenCLIP finds them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from openclip_otco.study.study import DataSetting, Flags, StudyError, arguments

# Stands for the study's output folder in the flags of a run, so that they name no path of one machine.
OUT = "OUT"
_MARKER = "scenes.json"


def in_folder(value: str, out: Path) -> str:
    """`value` with the `OUT/` that begins it, or a part of a `::` list, replaced by the folder `out`."""
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
    """Render the scenes of `setting` into `out/data/NAME`, unless they are there with the same options.

    Raises:
        StudyError: the command failed, or the folder holds something that this command did not make.
    """
    if setting.scenes is None:
        return
    folder = out / "data" / setting.name
    marker = folder / _MARKER
    if marker.is_file():
        if json.loads(marker.read_text()) == setting.scenes:
            return
        shutil.rmtree(folder)
    elif folder.exists():
        raise StudyError(f"{folder}: is in the way of the scenes of data.{setting.name}, and was not made by `compare`")
    # Rendered beside its place and moved there whole: a folder under its final name is complete.
    part = folder.with_name(f".{setting.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"rendering the scenes of data.{setting.name}", file=sys.stderr, flush=True)
    done = subprocess.run(
        scenes_command(setting, part), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if done.returncode or not list(part.glob("train/*.tar")):
        tail = " / ".join(done.stdout.strip().splitlines()[-3:]) or "no shards were written"
        raise StudyError(f"data.{setting.name}: scenes failed (exit {done.returncode}): {tail}")
    (part / _MARKER).write_text(json.dumps(setting.scenes))
    part.rename(folder)


def data_flags(setting: DataSetting, out: Path) -> Flags:
    """OpenCLIP's data flags of `setting`; shards that are not made yet show as `SHARDS`."""
    if setting.scenes is None:
        return setting.flags
    flags: Flags = {}
    for split in ("train", "val"):
        names = [path.name for path in (out / "data" / setting.name / split).glob("*.tar")]
        flags[f"{split}-data"] = pattern(f"{OUT}/data/{setting.name}/{split}", names or ["SHARDS"])
    return {**flags, **setting.flags}


def samples_per_epoch(flags: Flags, out: Path) -> int | None:
    """Training samples of an epoch, as far as flags or `sizes.json` tell; None if they do not."""
    if isinstance(given := flags.get("train-num-samples"), int):
        return given
    first = in_folder(str(flags["train-data"]), out).split("::")[0]
    try:
        return sum(map(int, json.loads((Path(first).parent / "sizes.json").read_text()).values()))
    except (OSError, ValueError, AttributeError, TypeError):
        return None
