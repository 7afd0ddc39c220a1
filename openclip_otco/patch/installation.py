"""The installed OpenCLIP training script: whether it has its plugin point, and how it gets it or loses it again.

The patches are those of `openclip_otco.patches`, one for each supported version of open_clip_torch. A file is changed
only if its git blob id is the one on the patch's index line, and what is written has the other id of that line: so a
file is either OpenCLIP's own or the patched one to the byte, and nobody's changes are lost.
"""

import contextlib
import fcntl
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from importlib import resources
from pathlib import Path

from openclip_otco.patch.diff import NO_FILE, PACKAGE, FilePatch, PatchError, blob_id, parse_patch

DISTRIBUTION = "open_clip_torch"
# What the patches of earlier versions of this package made of OpenCLIP's files.
SUPERSEDED = frozenset(
    {
        "50472947840625ffb633899d84647c6d9e9aed0a",  # main.py of 3.2.0, before `prepare_model`
        "a70a3a04faad0d31a6311c4015d510037a7a151e",  # main.py of 3.3.0, before `prepare_model`
        "83d1a89693281c1a84a3ee986adb95cbfa450bf1",  # plugins.py, before `prepare_model`
        "71b88a058f2d6a7367a768e85f53cc2d8dd7eee8",  # main.py of 3.2.0, before `prepare_data`
        "d78b017fea5a18650eae8764eca9a0e59bd0e7c3",  # main.py of 3.3.0, before `prepare_data`
        "6ab02ec652df982dd87b8a228d86f576b2e21f65",  # plugins.py, before `prepare_data`
    }
)
# The commit of OpenCLIP that the patch of an unreleased version is for.
COMMITS = {"4.2.0.dev0": "89fb801f1e6087880e951fc8354b8a2077b79c6d"}

# Folders in the package that hold new contents and backups while files change places.
_STAGED = ".openclip-otco-"
_PATCH_NAME = re.compile(rf"{PACKAGE}-(.+)\.patch")


class State(Enum):
    """What an installation is, and each of its files (those are only the first two, `OUTDATED` or `MODIFIED`)."""

    UNPATCHED = "unpatched"
    PATCHED = "patched"
    PARTIAL = "partial"
    OUTDATED = "patched by an older openclip-otco"
    MODIFIED = "modified"
    UNSUPPORTED = "unsupported version"
    NOT_INSTALLED = "not installed"


@dataclass(frozen=True)
class Status:
    """`files` has the state of each file that the patch changes; it is empty if there is no patch."""

    state: State
    version: str | None
    folder: Path | None
    files: Mapping[str, State]


def apply(target: Path | None = None, version: str | None = None, dry_run: bool = False) -> list[Path]:
    """Patches OpenCLIP and returns the files that changed (with `dry_run`: would change), none if it is patched.

    `target` is a folder that holds `open_clip_train`, by default where Python finds it; `version` is the version of
    open_clip_torch, by default what its metadata say. Raises `PatchError` or `OSError`, and has changed nothing then.
    """
    return _bring_to(State.PATCHED, target, version, dry_run)


def revert(target: Path | None = None, version: str | None = None, dry_run: bool = False) -> list[Path]:
    """Restores OpenCLIP's own files. As `apply`."""
    return _bring_to(State.UNPATCHED, target, version, dry_run)


def status(target: Path | None = None, version: str | None = None) -> Status:
    """Looks at an installation; the arguments are those of `apply`."""
    folder = _find_folder(target)
    version = version or _find_version(target, folder)
    if folder is None:
        return Status(State.NOT_INSTALLED, version, folder, {})
    if version is None or version not in supported_versions():
        return Status(State.UNSUPPORTED, version, folder, {})
    files = {patch.path: _file_state(folder, patch) for patch in load_patch(version)}
    states = set(files.values())
    worst = [state for state in (State.MODIFIED, State.OUTDATED) if state in states]
    mixture = [*worst, State.PARTIAL][0]
    return Status(states.pop() if len(states) == 1 else mixture, version, folder, files)


def shadow(folder: Path | None) -> Path | None:
    """The working directory, if `python -m` would find another `open_clip_train` in it before the one in `folder`."""
    here = Path.cwd()
    if sys.flags.safe_path or os.environ.get("PYTHONSAFEPATH") or here == folder:
        return None
    found = importlib.machinery.PathFinder.find_spec(PACKAGE, [str(here)])
    return here if found is not None and found.origin else None


def supported_versions() -> list[str]:
    """The versions of open_clip_torch that there is a patch for."""
    names = (_PATCH_NAME.fullmatch(file.name) for file in resources.files("openclip_otco.patches").iterdir())
    return sorted(name[1] for name in names if name)


def load_patch(version: str) -> list[FilePatch]:
    """The patch for one of the `supported_versions`."""
    file = resources.files("openclip_otco.patches") / f"{PACKAGE}-{version}.patch"
    return parse_patch(file.read_bytes())


def _bring_to(goal: State, target: Path | None, version: str | None, dry_run: bool) -> list[Path]:
    current = _patchable(target, version)
    if dry_run:
        return list(_changes(current, goal))
    assert current.folder is not None
    with _alone(current.folder / PACKAGE):
        # Again, as another process may have patched it in the meantime.
        contents = _changes(_patchable(target, version), goal)
        for left_by_a_kill in (current.folder / PACKAGE).glob(f"{_STAGED}*"):
            shutil.rmtree(left_by_a_kill)
        if contents:
            _replace_files(contents, current.folder / PACKAGE)
    return list(contents)


def _patchable(target: Path | None, version: str | None) -> Status:
    """The state of an installation whose files are all OpenCLIP's own or the patched ones."""
    current = status(target, version)
    if current.folder is None:
        where = f" in {target}" if target else f": pip install '{DISTRIBUTION}[training]'"
        raise PatchError(f"{PACKAGE} is not installed{where}")
    if current.version is None:
        raise PatchError(f"{current.folder} does not say which version of {DISTRIBUTION} it holds: give --version")
    if current.state is State.UNSUPPORTED:
        known = ", ".join(supported_versions())
        raise PatchError(f"there is no patch for {DISTRIBUTION} {current.version}, only for {known}")
    if current.state is State.MODIFIED and current.version in COMMITS:
        commit = COMMITS[current.version]
        raise PatchError(f"{current.folder} is not OpenCLIP's commit {commit}, which the patch is for: check that out")
    if current.state is State.MODIFIED:
        raise PatchError(f"changed by someone else: undo that change, or {cure(current)}")
    if current.state is State.OUTDATED:
        raise PatchError(f"{current.state.value}: {cure(current)}")
    return current


def _changes(current: Status, goal: State) -> dict[Path, bytes | None]:
    """The new content of each file that has to change; None stands for no file."""
    assert current.folder is not None
    assert current.version is not None
    contents = {}
    for patch in load_patch(current.version):
        if current.files[patch.path] is not goal:
            path = current.folder / patch.path
            before = None if _is_left_behind(current.folder, patch) else _read(path)
            contents[path] = (patch if goal is State.PATCHED else patch.inverse()).apply(before)
    return contents


@contextlib.contextmanager
def _alone(package: Path) -> Iterator[None]:
    """Keeps other processes that patch the same package waiting.

    The lock is on a file of the package that no patch changes: nothing is left behind, as a lock file of filelock's
    would be. Open for writing, although nothing is written: NFS locks no other files.
    """
    with (package / "__init__.py").open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cure(current: Status) -> str:
    """How to get OpenCLIP's own files back where the patch that made these is not at hand."""
    assert current.folder is not None
    ours = (State.UNPATCHED, State.PATCHED)
    names = [str(current.folder / path) for path, state in current.files.items() if state not in ours]
    return (
        f"delete {', '.join(names)}; run pip install --force-reinstall --no-deps {DISTRIBUTION}=={current.version}; "
        "then openclip-otco patch"
    )


def _find_folder(target: Path | None) -> Path | None:
    if target is not None:
        return target if (target / PACKAGE).is_dir() else None
    # find_spec does not import a top-level package, and so not torch either.
    spec = importlib.util.find_spec(PACKAGE)
    return Path(spec.origin).parent.parent if spec and spec.origin else None


def _find_version(target: Path | None, folder: Path | None) -> str | None:
    """What the code says of itself, as a checkout has no metadata; else what the metadata say."""
    text = _read(folder / "open_clip" / "version.py") if folder else None
    if told := re.search(rb"__version__ = ['\"](.+)['\"]", text or b""):
        return told[1].decode()
    path = sys.path if target is None else [str(target)]
    found = importlib.metadata.distributions(name=DISTRIBUTION, path=path)
    return next((distribution.version for distribution in found), None)


def _file_state(folder: Path, patch: FilePatch) -> State:
    states = {patch.old_id: State.UNPATCHED, patch.new_id: State.PATCHED}
    if _is_left_behind(folder, patch):
        return State.UNPATCHED
    found = blob_id(_read(folder / patch.path))
    return states.get(found, State.OUTDATED if found in SUPERSEDED else State.MODIFIED)


def _is_left_behind(folder: Path, patch: FilePatch) -> bool:
    """Whether another version's patch made the file: an upgrade of OpenCLIP leaves behind what pip did not install."""
    found = blob_id(_read(folder / patch.path))
    if patch.old_id != NO_FILE or found in (NO_FILE, patch.new_id):
        return False
    others = (other for version in supported_versions() for other in load_patch(version))
    return any(other.path == patch.path and other.new_id == found for other in others)


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _replace_files(contents: Mapping[Path, bytes | None], package: Path) -> None:
    """Writes or deletes (None) files. On any failure all of them are what they were.

    All that needs space or permission comes first: new contents and backups are staged in a folder of the package, so
    that only renames are left to do, and to undo. A killed run leaves every single file whole, old or new.
    """
    with tempfile.TemporaryDirectory(prefix=_STAGED, dir=package) as folder:
        new = {path: Path(folder, f"{index}.new") for index, path in enumerate(contents)}
        old = {path: Path(folder, f"{index}.old") for index, path in enumerate(contents)}
        for path, data in contents.items():
            mode = _mode_for(path)
            if data is not None:
                _write(new[path], data, mode)
            if (before := _read(path)) is not None:
                _write(old[path], before, mode)
        done: list[Path] = []
        try:
            for path, data in contents.items():
                if data is None:
                    path.unlink()
                else:
                    os.replace(new[path], path)
                done.append(path)
        except BaseException:
            for path in done:
                if old[path].exists():
                    os.replace(old[path], path)
                else:
                    path.unlink()
            raise


def _mode_for(path: Path) -> int:
    # Whoever can read the package's other files has to be able to read a new one.
    return stat.S_IMODE((path if path.exists() else path.with_name("__init__.py")).stat().st_mode)


def _write(path: Path, data: bytes, mode: int) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    path.chmod(mode)
