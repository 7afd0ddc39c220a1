"""Gives the installed OpenCLIP training script its plugin point, and takes it away again.

The patches are those of `openclip_otco.patches`, one for each supported version of open_clip_torch. A file is changed
only if its git blob id is the one on the patch's index line, and what is written has the other id of that line: so a
file is either OpenCLIP's own or the patched one to the byte, and nobody's changes are lost.
"""

import argparse
import contextlib
import fcntl
import hashlib
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

DISTRIBUTION = "open_clip_torch"
PACKAGE = "open_clip_train"
NO_FILE = "0" * 40
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

# Folders in the package that hold new contents and backups while files change places.
_STAGED = ".openclip-otco-"
_PATCH_NAME = re.compile(rf"{PACKAGE}-(.+)\.patch")
_HEAD = re.compile(
    rb"(?:(?:new|deleted) file mode 100644\n)?"
    rb"index ([0-9a-f]{40})\.\.([0-9a-f]{40})(?: 100644)?\n"
    rb"--- (.+)\n"
    rb"\+\+\+ (.+)\n"
)
_HUNK = re.compile(rb"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@.*\n")


class PatchError(Exception):
    """Why nothing was changed, in one line for the user."""


@dataclass(frozen=True)
class Hunk:
    """One change of a file. Lines keep their line ends; the context is in both `old` and `new`."""

    old_start: int
    old: tuple[bytes, ...]
    new_start: int
    new: tuple[bytes, ...]

    def inverse(self) -> "Hunk":
        return Hunk(self.new_start, self.new, self.old_start, self.old)


@dataclass(frozen=True)
class FilePatch:
    """The changes of one file: `path` is relative to the folder that holds the package, ids are git blob ids."""

    path: str
    old_id: str
    new_id: str
    hunks: tuple[Hunk, ...]

    def inverse(self) -> "FilePatch":
        return FilePatch(self.path, self.new_id, self.old_id, tuple(hunk.inverse() for hunk in self.hunks))

    def apply(self, data: bytes | None) -> bytes | None:
        """Changes the content of the file; None stands for no file. Raises `PatchError` if this is not exact."""
        if blob_id(data) != self.old_id:
            raise PatchError(f"{self.path}: not the content that the patch is for")
        result = None if self.new_id == NO_FILE else _apply_hunks(data or b"", self.hunks, self.path)
        if blob_id(result) != self.new_id:
            raise PatchError(f"{self.path}: the patch does not give the content that it promises")
        return result


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
    version = version or _find_version(target)
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


def parse_patch(text: bytes) -> list[FilePatch]:
    """Reads the output of `git diff --full-index`: text files that are changed, created or deleted, nothing else.

    Leading folders of the paths up to the package are dropped. Raises `PatchError` on anything that it does not know.
    """
    sections = re.split(rb"^diff --git .*\n", text, flags=re.MULTILINE)
    if sections[0]:
        raise PatchError("malformed patch: it does not begin with 'diff --git'")
    return [_parse_file(section) for section in sections[1:]]


def blob_id(data: bytes | None) -> str:
    """The id that git gives to a file's content; `NO_FILE` for None."""
    if data is None:
        return NO_FILE
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `openclip-otco patch`."""
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--status", action="store_true", help="say if OpenCLIP is patched (exit code 0) or not (1)")
    action.add_argument("--dry-run", action="store_true", help="name the files that would change")
    action.add_argument("--revert", action="store_true", help="restore OpenCLIP's own files")
    parser.add_argument("--target", type=Path, metavar="DIR", help=f"folder of {PACKAGE} (default: the installed one)")
    parser.add_argument("--version", help=f"version of {DISTRIBUTION} (default: the installed one)")


def run(args: argparse.Namespace) -> int:
    """`openclip-otco patch`: returns the exit code."""
    try:
        before = status(args.target, args.version)
        if args.status:
            return _print_status(before, args.target)
        changed = (revert if args.revert else apply)(args.target, args.version, dry_run=args.dry_run)
    except PatchError as error:
        print(f"openclip-otco patch: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"openclip-otco patch: {error.filename}: {error.strerror}; nothing was changed: make that folder writable, "
            "or install into a virtual environment of your own",
            file=sys.stderr,
        )
        return 1
    goal = "unpatched" if args.revert else "patched"
    if not changed:
        print(f"{DISTRIBUTION} {before.version} in {before.folder} is already {goal}")
    else:
        print(f"{DISTRIBUTION} {before.version} in {before.folder} {'would be' if args.dry_run else 'is now'} {goal}:")
        print("\n".join(f"  {path}" for path in changed))
    return 0


def _print_status(found: Status, target: Path | None) -> int:
    """Says what is trained by, and what `python -m` takes instead in this folder; 0 if all of it is patched."""
    copies = [found]
    if target is None and (here := shadow(found.folder)) is not None:
        copies.append(status(here, found.version))
    for copy in copies:
        cure = f"; {_cure(copy)}" if copy is found and copy.state in (State.OUTDATED, State.MODIFIED) else ""
        print(f"{copy.state.value}: {DISTRIBUTION} {copy.version or '?'} in {copy.folder or '?'}{cure}")
    if len(copies) > 1:
        print(f"In this folder, python -m {PACKAGE}.main takes the second one; openclip-otco train takes the first one")
    return 0 if all(copy.state is State.PATCHED for copy in copies) else 1


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
    if current.state is State.MODIFIED:
        raise PatchError(f"changed by someone else: undo that change, or {_cure(current)}")
    if current.state is State.OUTDATED:
        raise PatchError(f"{current.state.value}: {_cure(current)}")
    return current


def _changes(current: Status, goal: State) -> dict[Path, bytes | None]:
    """The new content of each file that has to change; None stands for no file."""
    assert current.folder is not None
    assert current.version is not None
    contents = {}
    for patch in load_patch(current.version):
        if current.files[patch.path] is not goal:
            path = current.folder / patch.path
            contents[path] = (patch if goal is State.PATCHED else patch.inverse()).apply(_read(path))
    return contents


@contextlib.contextmanager
def _alone(package: Path) -> Iterator[None]:
    """Keeps other processes that patch the same package waiting.

    The lock is on a file of the package that no patch changes: nothing is left behind. Open for writing, although
    nothing is written: NFS locks no other files.
    """
    with (package / "__init__.py").open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _cure(current: Status) -> str:
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


def _find_version(target: Path | None) -> str | None:
    path = sys.path if target is None else [str(target)]
    found = importlib.metadata.distributions(name=DISTRIBUTION, path=path)
    return next((distribution.version for distribution in found), None)


def _file_state(folder: Path, patch: FilePatch) -> State:
    states = {patch.old_id: State.UNPATCHED, patch.new_id: State.PATCHED}
    found = blob_id(_read(folder / patch.path))
    return states.get(found, State.OUTDATED if found in SUPERSEDED else State.MODIFIED)


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


def _apply_hunks(data: bytes, hunks: tuple[Hunk, ...], path: str) -> bytes:
    lines = _split_lines(data)
    result: list[bytes] = []
    position = 0
    for hunk in hunks:
        # Where a hunk has no old lines, its number is that of the line before it.
        start = hunk.old_start - 1 if hunk.old else hunk.old_start
        end = start + len(hunk.old)
        if start < position or tuple(lines[start:end]) != hunk.old:
            raise PatchError(f"{path}: line {hunk.old_start} is not what the patch expects")
        result += lines[position:start]
        result += hunk.new
        position = end
    return b"".join(result + lines[position:])


def _split_lines(data: bytes) -> list[bytes]:
    # bytes.splitlines also splits at a lone carriage return, which diff does not.
    lines = [line + b"\n" for line in data.split(b"\n")]
    lines[-1] = lines[-1][:-1]
    return lines if lines[-1] else lines[:-1]


def _parse_file(section: bytes) -> FilePatch:
    head, *hunks = re.split(rb"^(?=@@ )", section, flags=re.MULTILINE)
    match = _HEAD.fullmatch(head)
    if match is None:
        raise PatchError(f"malformed patch: unknown file header {head!r}")
    old_id, new_id, *names = (group.decode() for group in match.groups())
    paths = {_package_path(name) for name in names if name != "/dev/null"}
    if len(paths) != 1:
        raise PatchError(f"malformed patch: a file named {' and '.join(names)}")
    return FilePatch(paths.pop(), old_id, new_id, tuple(_parse_hunk(hunk) for hunk in hunks))


def _package_path(name: str) -> str:
    match = re.fullmatch(rf"[ab]/(?:.*/)?({PACKAGE}/.+)", name)
    if match is None or ".." in name.split("/"):
        raise PatchError(f"malformed patch: {name} is not in {PACKAGE}")
    return match[1]


def _parse_hunk(text: bytes) -> Hunk:
    header, *body = _split_lines(text)
    match = _HUNK.fullmatch(header)
    if match is None:
        raise PatchError(f"malformed patch: unknown hunk header {header!r}")
    old_start, old_count, new_start, new_count = (1 if group is None else int(group) for group in match.groups())
    old: list[bytes] = []
    new: list[bytes] = []
    sides: dict[bytes, list[list[bytes]]] = {b" ": [old, new], b"-": [old], b"+": [new]}
    last: list[list[bytes]] = []
    for line in body:
        if line.startswith(b"\\ "):
            # "No newline at end of file" is about the line above it.
            for side in last:
                side[-1] = side[-1].removesuffix(b"\n")
        elif line[:1] in sides:
            last = sides[line[:1]]
            for side in last:
                side.append(line[1:])
        else:
            raise PatchError(f"malformed patch: unknown line {line!r}")
    if (len(old), len(new)) != (old_count, new_count):
        raise PatchError(f"malformed patch: the hunk {header!r} does not have the lines that it announces")
    return Hunk(old_start, tuple(old), new_start, tuple(new))
