"""The patcher: exact, idempotent, all or nothing."""

import ast
import difflib
import errno
import importlib.util
import multiprocessing
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from forks import start_ranks
from hook_fixtures import VERSION, copy_package, original, patched  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st

from openclip_otco import cli
from openclip_otco.patch import diff, installation
from openclip_otco.patch.diff import NO_FILE, PatchError
from openclip_otco.patch.installation import State

Content = dict[str, bytes]


def content(folder: Path) -> Content:
    """All files of the package but compiled ones, hidden leftovers included."""
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def package(original: Path, tmp_path: Path) -> Path:  # noqa: F811
    return copy_package(original, tmp_path / "package")


@pytest.fixture(scope="session")
def wheels(original: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:  # noqa: F811
    """A folder with the unpatched package for each supported version that can be had."""
    found = {VERSION: original}
    for version in installation.supported_versions():
        if version not in found:
            folder = tmp_path_factory.mktemp(f"wheel-{version}")
            what = f"{installation.DISTRIBUTION}=={version}"
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder), what]
            if subprocess.run(command, capture_output=True, timeout=300).returncode == 0:
                zipfile.ZipFile(next(folder.glob("*.whl"))).extractall(folder)
                found[version] = folder
    return found


@pytest.mark.parametrize("version", installation.supported_versions())
def test_round_trip(version: str, wheels: dict[str, Path], tmp_path: Path) -> None:
    if version not in wheels:
        pytest.skip(f"open_clip_torch {version} can not be downloaded here")
    folder = copy_package(wheels[version], tmp_path / "package")
    before = content(folder)
    assert installation.status(folder, version).state is State.UNPATCHED

    changed = installation.apply(folder, version)
    after = content(folder)
    names = {path.relative_to(folder).as_posix() for path in changed}
    assert names == {name for name in after if after[name] != before.get(name)}
    assert installation.status(folder, version).state is State.PATCHED
    for patch in installation.load_patch(version):
        assert diff.blob_id(before.get(patch.path)) == patch.old_id
        assert diff.blob_id(after[patch.path]) == patch.new_id
        # OpenCLIP supports Python 3.9, and the patch is about plugins in general.
        ast.parse(after[patch.path], feature_version=(3, 9))
        assert b"otco" not in after[patch.path].lower()

    assert installation.apply(folder, version) == []
    assert content(folder) == after
    assert installation.revert(folder, version) == changed
    assert content(folder) == before
    assert installation.revert(folder, version) == []
    installation.apply(folder, version)
    assert content(folder) == after


@pytest.mark.parametrize("version", installation.supported_versions())
def test_git_gives_the_same_bytes(version: str, wheels: dict[str, Path], tmp_path: Path) -> None:
    if version not in wheels or shutil.which("git") is None:
        pytest.skip(f"needs git and open_clip_torch {version}")
    ours = copy_package(wheels[version], tmp_path / "ours")
    theirs = copy_package(wheels[version], tmp_path / "theirs" / "src")
    installation.apply(ours, version)
    file = Path(str(installation.resources.files("openclip_otco.patches"))) / f"open_clip_train-{version}.patch"
    subprocess.run(["git", "apply", str(file.resolve())], cwd=theirs.parent, check=True)
    assert content(ours) == content(theirs)


def test_what_another_version_s_patch_left_behind_is_replaced(package: Path) -> None:
    """An upgrade of OpenCLIP leaves the plugin module of the patch, as pip did not install it."""
    modules = {
        blob: patch.apply(None)
        for version in installation.supported_versions()
        for patch in installation.load_patch(version)
        if patch.old_id == NO_FILE and (blob := patch.new_id)
    }
    (ours,) = (patch for patch in installation.load_patch(VERSION) if patch.old_id == NO_FILE)
    assert len(modules) == 2
    for left_behind in modules.values():
        (package / ours.path).write_bytes(left_behind)
        assert installation.status(package, VERSION).state in (State.UNPATCHED, State.PARTIAL)
        installation.apply(package, VERSION)
        assert installation.status(package, VERSION).state is State.PATCHED
        assert (package / ours.path).read_bytes() == modules[ours.new_id]
        installation.revert(package, VERSION)
        assert not (package / ours.path).exists()


def test_modes_are_kept(package: Path) -> None:
    folder = package / "open_clip_train"
    for path in folder.iterdir():
        path.chmod(0o664)
    installation.apply(package, VERSION)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o664}


def test_partial_is_completed_either_way(package: Path, patched: Path) -> None:  # noqa: F811
    before, after = content(package), content(patched)
    for finish, expected in ((installation.apply, after), (installation.revert, before)):
        for name in ("open_clip_train/main.py", "open_clip_train/plugins.py"):
            (package / name).write_bytes(after[name])
        for name in ("open_clip_train/train.py", "open_clip_train/params.py"):
            (package / name).write_bytes(before[name])
        # what a killed run can leave behind
        left = package / "open_clip_train/.openclip-otco-x1y2"
        left.mkdir()
        (left / "0.new").write_bytes(b"half")
        assert installation.status(package, VERSION).state is State.PARTIAL
        finish(package, VERSION)
        assert content(package) == expected


ROUNDS = 50


def _all_patch_then_all_revert(rank: int, world: int, package: Path, expected: list[Content], barrier: Any) -> None:
    lost = 0
    for _ in range(ROUNDS):
        for goal, files in zip((installation.apply, installation.revert), expected, strict=True):
            barrier.wait()
            goal(package, VERSION)
            barrier.wait()
            lost += rank == 0 and content(package) != files
    assert lost == 0, f"{lost} of {2 * ROUNDS} times files were lost, left over or not changed"


def _some_patch_while_others_revert(
    rank: int, world: int, package: Path, expected: list[Content], barrier: Any
) -> None:
    for _ in range(ROUNDS):
        barrier.wait()
        (installation.apply, installation.revert)[rank % 2](package, VERSION)
        barrier.wait()
        assert rank or content(package) in expected


@pytest.mark.parametrize("work", [_all_patch_then_all_revert, _some_patch_while_others_revert])
@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_at_once(
    original: Path,  # noqa: F811
    patched: Path,  # noqa: F811
    tmp_path: Path,
    world: int,
    work: Any,
) -> None:
    package = copy_package(original, tmp_path / "package")
    barrier = multiprocessing.get_context("forkserver").Barrier(world)
    start_ranks(work, world, package, [content(patched), content(original)], barrier)


@pytest.mark.parametrize("goal", ["apply", "revert"])
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_failure_changes_nothing(package: Path, monkeypatch: pytest.MonkeyPatch, goal: str, failing: int) -> None:
    if goal == "revert":
        installation.apply(package, VERSION)
    before = content(package)
    replace, calls = os.replace, []

    def failing_replace(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) - 1 == failing:
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing_replace)
    with pytest.raises(OSError, match="No space left"):
        getattr(installation, goal)(package, VERSION)
    assert len(calls) > failing
    assert content(package) == before


def test_read_only_folder(package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    before, open_file = content(package), Path.open

    def read_only_open(self: Path, mode: str = "r", *args: object, **kwargs: object) -> object:
        if mode != "rb" and "open_clip_train" in self.parts:
            raise PermissionError(13, "Permission denied", str(self))
        return open_file(self, mode, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", read_only_open)
    assert cli.main(["patch", "--target", str(package), "--version", VERSION]) == 1
    error = capsys.readouterr().err
    assert "Permission denied; nothing was changed: make it writable, or install into a virtual environment" in error
    assert error.count("\n") == 1
    assert content(package) == before

    def full(self: Path, mode: str = "r", *args: object, **kwargs: object) -> object:
        if mode != "rb" and "open_clip_train" in self.parts:
            raise OSError(errno.ENOSPC, "No space left on device")
        return open_file(self, mode, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", full)
    assert cli.main(["patch", "--target", str(package), "--version", VERSION]) == 1
    assert "OpenCLIP's folder: No space left on device; nothing was changed: free some space" in capsys.readouterr().err
    assert content(package) == before


def test_errors(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*arguments: str) -> str:
        before = content(package)
        assert cli.main(["patch", *arguments]) == 1
        assert content(package) == before
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.count("\n") == 1
        return printed.err

    target = ("--target", str(package))
    unsupported = fails(*target, "--version", "2.0.0")
    assert all(word in unsupported for word in ("2.0.0", *installation.supported_versions()))
    assert "--version" in fails(*target)
    assert "not installed" in fails("--target", str(tmp_path / "nowhere"))

    file = package / "open_clip_train" / "train.py"
    file.write_bytes(file.read_bytes() + b"# mine\n")
    for action in ([], ["--revert"], ["--dry-run"]):
        error = fails(*target, "--version", VERSION, *action)
        assert str(file) in error
        assert f"open_clip_torch=={VERSION}" in error
    with pytest.raises(SystemExit) as misuse:
        cli.main(["patch", "--status", "--revert"])
    assert misuse.value.code == 2


def test_an_older_form_of_the_patch_is_told_from_other_changes(
    package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installation.apply(package, VERSION)
    older = package / "open_clip_train/plugins.py"
    older.write_bytes(older.read_bytes() + b"# older\n")
    monkeypatch.setattr(installation, "SUPERSEDED", {diff.blob_id(older.read_bytes())})
    before = content(package)
    target = ("--target", str(package), "--version", VERSION)
    for action in ((), ("--dry-run",), ("--revert",), ("--status",)):
        assert cli.main(["patch", *target, *action]) == 1
        assert content(package) == before
        printed = "".join(capsys.readouterr())
        assert "patched by an older openclip-otco" in printed
        assert printed.count("\n") == 1
        # The cure, word for word: what is named goes, and OpenCLIP's own files come back.
        assert (
            f"delete {older}; run pip install --force-reinstall --no-deps open_clip_torch=={VERSION}; then" in printed
        )
    (package / "open_clip_train/main.py").write_bytes(b"mine")
    assert installation.status(package, VERSION).state is State.MODIFIED
    (package / "open_clip_train/main.py").write_bytes(before["open_clip_train/main.py"])
    older.unlink()
    installation.revert(package, VERSION)
    assert installation.status(package, VERSION).state is State.UNPATCHED


def test_no_form_of_today_is_superseded() -> None:
    ids = {
        id for v in installation.supported_versions() for p in installation.load_patch(v) for id in (p.old_id, p.new_id)
    }
    assert not ids & installation.SUPERSEDED


def test_not_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert installation.status().state is State.NOT_INSTALLED
    assert cli.main(["patch"]) == 1
    assert "pip install" in capsys.readouterr().err


def test_commands(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metadata = package / f"open_clip_torch-{VERSION}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: open_clip_torch\nVersion: {VERSION}\n")
    before = content(package)

    def prints(code: int, *arguments: str) -> str:
        assert cli.main(["patch", "--target", str(package), *arguments]) == code
        return capsys.readouterr().out

    assert prints(1, "--status").startswith(f"unpatched: open_clip_torch {VERSION} in {package}")
    assert "open_clip_train/plugins.py" in prints(0, "--dry-run")
    assert content(package) == before
    assert "is now patched" in prints(0)
    assert prints(0, "--status").startswith("patched: ")
    assert "already patched" in prints(0)
    assert "is now unpatched" in prints(0, "--revert")
    assert "already unpatched" in prints(0, "--revert")
    assert content(package) == before


def test_patching_does_not_import_torch(package: Path) -> None:
    arguments = ["patch", "--target", str(package), "--version", VERSION]
    code = f"import sys; from openclip_otco.cli import main; main({arguments}); main(['patch', '--status']); "
    code += "sys.exit('torch' in sys.modules or 'open_clip_train' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert installation.status(package, VERSION).state is State.PATCHED


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main([name, "--help"])
    assert done.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: openclip-otco {name} ")


def git_diff(old: bytes, new: bytes, context: int) -> bytes:
    """What git would print for a file of the package, from difflib."""
    name = b"open_clip_train/x.py"
    sides = ([line for line in re.split(rb"(?<=\n)", side) if line] for side in (old, new))
    lines = difflib.diff_bytes(difflib.unified_diff, *sides, b"a/" + name, b"b/" + name, n=context)
    head = b"diff --git a/%s b/%s\nindex %s..%s 100644\n"
    ids = (diff.blob_id(side).encode() for side in (old, new))
    marked = (line if line.endswith(b"\n") else line + b"\n\\ No newline at end of file\n" for line in lines)
    return head % (name, name, *ids) + b"".join(marked)


TEXTS = st.lists(st.sampled_from([b"a\n", b"b\n", b"\n", b"c\r\n", b"-- x\n", b"@@ -1 +1 @@\n", b"\\ y\n", b"d\x0c\r"]))


@given(TEXTS, TEXTS, st.integers(0, 3))
def test_any_diff_applies_and_reverts(old_lines: list[bytes], new_lines: list[bytes], context: int) -> None:
    old, new = b"".join(old_lines), b"".join(new_lines)
    if old == new:
        return
    [patch] = diff.parse_patch(git_diff(old, new, context))
    assert patch.apply(old) == new
    assert patch.inverse().apply(new) == old
    assert patch.inverse().inverse() == patch
    with pytest.raises(PatchError, match="not the content"):
        patch.apply(old + b"x")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"@@ -1 +1 @@", b"@@ -2 +1 @@"),
        (b"@@ -1 +1 @@", b"@@ -1,2 +1 @@"),
        (b"@@ -1 +1 @@", b"@@ @@"),
        (b"-a\n", b"-b\n"),
        (b"+b\n", b"+c\n"),
        (b"+b\n", b"+b\n?\n"),
        (b"index ", b"similarity index 90%\nindex "),
        (b"diff --git", b"junk\ndiff --git"),
        (b"open_clip_train/", b"elsewhere/"),
        (b"open_clip_train/", b"open_clip_train/../"),
    ],
)
def test_a_bad_patch_is_refused(old: bytes, new: bytes) -> None:
    text = git_diff(b"a\n", b"b\n", 3)
    assert old in text
    with pytest.raises(PatchError):
        [patch.apply(b"a\n") for patch in diff.parse_patch(text.replace(old, new))]
