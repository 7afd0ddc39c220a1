"""What is installed: setuptools cannot find packages whose folders lie elsewhere, so `setup.cfg` lists all of them."""

from __future__ import annotations

import ast
import configparser
import importlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ELSEWHERE = ("patches", "configs")
BUILD = "from setuptools.build_meta import build_wheel; build_wheel('.')"


def listed() -> set[str]:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return set(setup["options"]["packages"].split())


def test_every_folder_with_modules_is_a_listed_package() -> None:
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "openclip_otco").rglob("*.py")}
    packages = {".".join(folder.parts) for folder in folders} | {f"openclip_otco.{folder}" for folder in ELSEWHERE}
    assert listed() == packages


def test_a_wheel_holds_every_module_patch_and_configuration(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="70.1")  # older ones need the package `wheel` beside them
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("openclip_otco", *ELSEWHERE):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    expected = {path.relative_to(tmp_path).as_posix() for path in (tmp_path / "openclip_otco").rglob("*.*")}
    for folder in ELSEWHERE:
        expected |= {f"openclip_otco/{folder}/{path.name}" for path in (tmp_path / folder).iterdir()}
    subprocess.run([sys.executable, "-c", BUILD], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == expected


@pytest.mark.parametrize("path", sorted(ROOT.glob("benchmarks/*.py")), ids=lambda path: path.stem)
def test_what_a_benchmark_takes_from_the_package_is_there(path: Path) -> None:
    """Nothing else notices: benchmarks are run by hand, and some of them need what is not installed here."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("openclip_otco"):
            module = importlib.import_module(str(node.module))
            for name in node.names:
                assert hasattr(module, name.name) or importlib.import_module(f"{node.module}.{name.name}")
