"""Which versions of Python, torch and OpenCLIP the package works with: each cell is an installation and a run of tests.

`python benchmarks/versions.py FILE.jsonl [--cells N] [--openclip CLONE]`. A cell makes a virtual environment in a
temporary folder, installs the last commit of this checkout there with the cell's versions, patches OpenCLIP by
`openclip-otco patch`, and runs tests that touch every seam to torch and OpenCLIP, training by OpenCLIP's script among
them. The tests lie in a folder without the package, so that they see what was installed. All is taken away before the
next cell begins.

A version of OpenCLIP that is a commit of its main (`installation.COMMITS`) is not on PyPI, and is taken from a clone of
OpenCLIP. Its cell runs `tests/test_openclip_main.py`, which compares that commit with the newest release, so that the
release is installed there.

Python is looked for on PATH, as `python3.11`. A cell whose Python or clone is missing is not run. A cell needs about
8 GB of disk and 5 to 10 minutes. Its line is added to FILE.jsonl at once, and a cell that has one is not run again. Its
keys: the cell's `python`, `torch` and `open_clip_torch`; `outcome` (passed, failed, or not run); `passed`, `failed`,
`skipped` (numbers of tests); `failures` (their names); `skips` (the reasons); `commit` of this package; and the
versions that were installed, as `torch_version`. An installation that fails leaves no line, as the network may be to
blame.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from openclip_otco.patch import installation

ROOT = Path(__file__).parents[1]
TESTS = (
    "tests/ot/test_sinkhorn.py",
    "tests/test_solver.py",
    "tests/test_loss.py",
    "tests/test_plugin.py",
    "tests/test_callback.py",
    "tests/test_hook.py",
    "tests/test_training.py::test_with_everything_off_it_is_clip_to_the_bit",
    "tests/test_training.py::test_plans_are_made_logged_and_saved",
    "tests/test_training.py::test_resumes_into_and_out_of_otco",
)
MAIN_TESTS = ("tests/test_openclip_main.py",)
# What those tests, and tests/conftest.py, import beside the package.
TEST_PACKAGES = (
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "hypothesis",
    "allpairspy",
    "torchmetrics",
    "playwright",
)
REPORTED = ("torch", "torchvision", "open_clip_torch", "transformers", "timm", "numpy", "scipy", "POT")


@dataclass(frozen=True)
class Cell:
    """Versions to be installed together; `others` are those of further packages, as `scipy==1.12`."""

    python: str
    torch: str
    open_clip_torch: str
    others: tuple[str, ...] = ()

    @property
    def key(self) -> dict[str, str]:
        """What tells its line from others."""
        return {name: value for name, value in asdict(self).items() if name != "others"}

    @property
    def constraints(self) -> str:
        """For pip, a line each."""
        openclip = () if self.commit else (f"open_clip_torch=={self.open_clip_torch}",)
        return "\n".join((f"torch=={self.torch}", *openclip, *self.others, ""))

    @property
    def commit(self) -> str | None:
        """OpenCLIP's commit, where the version is not a release."""
        return installation.COMMITS.get(self.open_clip_torch)

    @property
    def tests(self) -> tuple[str, ...]:
        return MAIN_TESTS if self.commit else TESTS


# Not the full cross: each version at least once, the lower bounds of setup.cfg together, and the newest together.
CELLS = (
    Cell("3.11", "2.6.0", "3.2.0", ("POT==0.9.4", "scipy==1.12")),
    Cell("3.13", "2.15.0", "3.3.0"),
    Cell("3.12", "2.9.1", "3.3.0"),
    Cell("3.11", "2.15.0", "3.2.0"),
    Cell("3.13", "2.6.0", "3.3.0"),
    Cell("3.14", "2.15.0", "3.3.0"),
    Cell("3.11", "2.6.0", "4.2.0.dev0"),
    Cell("3.14", "2.15.0", "4.2.0.dev0"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jsonl", metavar="FILE.jsonl", type=Path)
    parser.add_argument("--cells", type=int, metavar="N", help="run the first N cells that are left, not all of them")
    parser.add_argument("--openclip", metavar="CLONE", type=Path, help="a clone of OpenCLIP, for the cells of its main")
    args = parser.parse_args()
    # A SIGTERM, too, takes the temporary folder away.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    kept = read_lines(args.jsonl)
    for cell in cells_left(CELLS, kept)[: args.cells]:
        print(f"\n== {cell.key}", flush=True)
        reason = reason_not_to_run(cell, args.openclip)
        line = cell.key | ({"outcome": "not run", "reason": reason} if reason else measured(cell, args.openclip))
        # A second start without that Python has nothing new to tell.
        if line not in kept:
            with args.jsonl.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(line)}\n")
        print(json.dumps(line), flush=True)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines that are there; none if there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def cells_left(cells: Iterable[Cell], kept: list[dict[str, Any]]) -> list[Cell]:
    """The cells that have no line of a run; a cell that could not be run is tried again."""
    done = [line for line in kept if line["outcome"] != "not run"]
    return [cell for cell in cells if not any(cell.key.items() <= line.items() for line in done)]


def reason_not_to_run(cell: Cell, clone: Path | None) -> str | None:
    """What the cell needs and this machine lacks."""
    if not shutil.which(f"python{cell.python}"):
        return f"no python{cell.python} here"
    if cell.commit and not clone:
        return "--openclip names no clone of OpenCLIP"
    return None


def measured(cell: Cell, clone: Path | None) -> dict[str, Any]:
    """Installs the cell, runs the tests, and returns the rest of its line.

    Raises:
        SystemExit: the clone lacks the cell's commit, the installation failed, or pytest ended without a report.
    """
    with tempfile.TemporaryDirectory(prefix="versions-") as name:
        folder = Path(name)
        python = folder / "venv" / "bin" / "python"
        environment = environment_of(folder)
        (folder / "tmp").mkdir()
        (folder / "constraints.txt").write_text(cell.constraints, encoding="utf-8")
        commit = write_commit(ROOT, "HEAD", folder / "source")
        if cell.commit and clone:
            write_commit(clone, cell.commit, folder / "openclip", "src")
            environment["OPENCLIP"] = str(folder / "openclip")

        def step(*words: str | Path) -> str:
            return checked(words, folder, environment)

        step(f"python{cell.python}", "-m", "venv", folder / "venv")
        pip = (python, "-m", "pip", "install", "--quiet", "--no-cache-dir", "--progress-bar", "off")
        step(*pip, folder / "source", *TEST_PACKAGES)
        step(folder / "venv" / "bin" / "openclip-otco", "patch")
        suite = write_suite(folder / "source", folder / "suite")
        report = folder / "report.xml"
        words = [python, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", f"--junitxml={report}", *cell.tests]
        subprocess.run(words, cwd=suite, env=environment, check=False)
        if not report.is_file():
            raise SystemExit("pytest ended without a report; its last lines stand above")
        tests = outcomes(report.read_text(encoding="utf-8"))
        versions = json.loads(step(python, "-c", VERSIONS, *REPORTED))
        return tests | {"commit": commit} | versions


# Run by the cell's own Python.
VERSIONS = """
import importlib.metadata, json, platform, sys
found = {f"{name}_version": importlib.metadata.version(name) for name in sys.argv[1:]}
print(json.dumps({"python_version": platform.python_version()} | found))
"""


def environment_of(folder: Path) -> dict[str, str]:
    """This process's environment, for the programs of a cell: what they leave lies in the folder."""
    # A checkout on PYTHONPATH would come before what is installed.
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(folder / "tmp"),
        # Instead of those that pip's configuration may name.
        "PIP_CONSTRAINT": str(folder / "constraints.txt"),
    }


def checked(words: Iterable[str | Path], folder: Path, environment: dict[str, str]) -> str:
    """The standard output of a program.

    Raises:
        SystemExit: it failed.
    """
    command = [str(word) for word in words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-5000:]}{done.stderr[-5000:]}")
    return done.stdout


def write_commit(repository: Path, commit: str, folder: Path, *paths: str) -> str:
    """Writes the files of a repository's commit, those under `paths` or else all, and returns its short name.

    Raises:
        SystemExit: the repository has no such commit.
    """
    words = ["git", "rev-parse", "--verify", "--short", f"{commit}^{{commit}}"]
    name = checked(words, repository, dict(os.environ)).strip()
    folder.mkdir()
    archive = subprocess.run(["git", "archive", commit, *paths], cwd=repository, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x"], cwd=folder, check=True, input=archive)
    return name


def write_suite(source: Path, suite: Path) -> Path:
    """Copies the tests, and what pytest needs beside them, but not the package."""
    suite.mkdir()
    for name in ("tests", "benchmarks"):
        shutil.copytree(source / name, suite / name)
    shutil.copy(source / "pyproject.toml", suite)
    return suite


def outcomes(report: str) -> dict[str, Any]:
    """What a JUnit report by pytest tells: numbers, names and reasons, see above. An error counts as a failure."""
    cases = list(ElementTree.fromstring(report).iter("testcase"))
    failures = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skips = [str(skipped.get("message")) for case in cases for skipped in case.findall("skipped")]
    passed = len(cases) - len(failures) - len(skips)
    return {
        "outcome": "passed" if passed and not failures else "failed",
        "passed": passed,
        "failed": len(failures),
        "skipped": len(skips),
        "failures": failures,
        "skips": sorted(set(skips)),
    }


if __name__ == "__main__":
    main()
