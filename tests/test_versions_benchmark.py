"""The benchmark of versions: its cells against setup.cfg, its report against pytest's own, and a second start."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest
import versions
from versions import CELLS, Cell, cells_left, outcomes, read_lines, reason_not_to_run, write_commit

from openclip_otco.patch import installation

ROOT = Path(__file__).parents[1]
SUITE = """
import pytest

def test_good(): pass

@pytest.mark.parametrize("number", [1, 2])
def test_bad(number): assert number == 0

@pytest.fixture
def broken(): raise ValueError

def test_error(broken): pass

def test_skipped(): pytest.skip("no GPU")
"""


@pytest.fixture
def options() -> configparser.SectionProxy:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return setup["options"]


def test_the_first_cell_has_the_lower_bounds(options: configparser.SectionProxy) -> None:
    bounds = set(re.findall(r"^(\w+)(?:\[\w+\])?>=([\d.]+)", options["install_requires"], re.MULTILINE))
    oldest = CELLS[0]
    pins = {tuple(line.split("==")) for line in oldest.constraints.split()}
    assert {(name, _padded(version)) for name, version in pins} == {(name, _padded(bound)) for name, bound in bounds}
    assert options["python_requires"] == f">={oldest.python}"


def test_the_second_cell_has_the_newest_that_was_run(options: configparser.SectionProxy) -> None:
    # The last cell of a release is that of the newest Python, for which no interpreter was there.
    *run, last = [cell for cell in CELLS if not cell.commit]
    assert last.key | {"python": run[1].python} == run[1].key
    for name in ("python", "torch", "open_clip_torch"):
        assert getattr(run[1], name) == max((getattr(cell, name) for cell in run), key=_padded)
    assert f"open_clip_torch[training]>=3.2.0,<={run[1].open_clip_torch}" in options["install_requires"]


def test_cells_differ_and_their_tests_are_there() -> None:
    assert len({tuple(cell.key.values()) for cell in CELLS}) == len(CELLS)
    for test in {test for cell in CELLS for test in cell.tests}:
        file, _, name = test.partition("::")
        assert f"def {name}" in (ROOT / file).read_text(encoding="utf-8")


def test_openclip_s_main_runs_with_the_oldest_and_the_newest() -> None:
    main = [cell for cell in CELLS if cell.commit]
    assert {cell.open_clip_torch for cell in main} == set(installation.COMMITS)
    for name in ("python", "torch"):
        every = sorted({getattr(cell, name) for cell in CELLS}, key=_padded)
        assert {getattr(cell, name) for cell in main} == {every[0], every[-1]}


def test_a_cell_of_openclip_s_main_needs_a_clone(tmp_path: Path) -> None:
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    (main,) = installation.COMMITS
    assert reason_not_to_run(Cell(here, "2.6.0", "3.3.0"), None) is None
    assert reason_not_to_run(Cell(here, "2.6.0", main), tmp_path) is None
    assert reason_not_to_run(Cell(here, "2.6.0", main), None) == "--openclip names no clone of OpenCLIP"
    # pip looks for releases alone.
    assert Cell(here, "2.6.0", main).constraints == "torch==2.6.0\n"


def test_a_clone_without_the_commit_is_refused(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("first")
    (tmp_path / "src").mkdir()
    (tmp_path / "src/part").write_text("a part")
    git("add", ".")
    git("commit", "-m", "first")
    (tmp_path / "file").write_text("later")
    written = tmp_path / "written"
    assert write_commit(tmp_path, "HEAD", written)
    assert (written / "file").read_text() == "first"
    assert write_commit(tmp_path, "HEAD", tmp_path / "part", "src")
    assert [path.name for path in (tmp_path / "part").rglob("*")] == ["src", "part"]
    (commit,) = installation.COMMITS.values()
    with pytest.raises(SystemExit, match=commit):
        write_commit(tmp_path, commit, tmp_path / "other")


def test_outcomes_are_those_that_pytest_prints(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(SUITE)
    report = tmp_path / "report.xml"
    words = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", f"--rootdir={tmp_path}", str(tmp_path)]
    printed = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False).stdout
    told = pytest.RunResult.parse_summary_nouns(printed.splitlines())
    found = outcomes(report.read_text())
    assert (found["passed"], found["skipped"]) == (told["passed"], told["skipped"])
    assert found["failed"] == told["failed"] + told["errors"]
    assert found["failures"] == [f"test_some::{name}" for name in ("test_bad[1]", "test_bad[2]", "test_error")]
    assert [reason.endswith("no GPU") for reason in found["skips"]] == [True]
    assert found["outcome"] == "failed"


def test_no_test_at_all_is_a_failure() -> None:
    assert outcomes("<testsuites><testsuite/></testsuites>")["outcome"] == "failed"
    assert outcomes("<testsuite><testcase classname='a' name='b'/></testsuite>")["outcome"] == "passed"


def test_a_second_start_runs_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "versions.jsonl"
    here, missing = Cell(f"{sys.version_info.major}.{sys.version_info.minor}", "2.6.0", "3.2.0"), Cell("9.9", "3", "4")
    begun: list[Cell] = []

    def measured(cell: Cell, clone: Path | None) -> dict[str, str]:
        begun.append(cell)
        return {"outcome": "failed"}

    monkeypatch.setattr(versions, "CELLS", (missing, here))
    monkeypatch.setattr(versions, "measured", measured)
    monkeypatch.setattr(versions.shutil, "which", lambda name: None if "9.9" in name else name)
    monkeypatch.setattr(versions.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["versions.py", str(file)])
    for _ in range(2):
        versions.main()
    assert begun == [here]
    assert [line["outcome"] for line in read_lines(file)] == ["not run", "failed"]
    # Once its Python is there, it is run.
    assert cells_left((missing, here), read_lines(file)) == [missing]


def _padded(version: str) -> tuple[int, ...]:
    """1.12 is 1.12.0."""
    numbers = [int(part) for part in version.split(".")]
    return tuple(numbers + [0] * (3 - len(numbers)))
