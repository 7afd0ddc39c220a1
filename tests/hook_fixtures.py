"""Copies of OpenCLIP's training script, with and without the plugin point; the installed one is left alone."""

import importlib.metadata
import shutil
from pathlib import Path

import pytest

from openclip_otco import patching

VERSION = importlib.metadata.version(patching.DISTRIBUTION)


def copy_package(source: Path, folder: Path) -> Path:
    """Copies the package from one folder into another, and returns that."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(source / patching.PACKAGE, folder / patching.PACKAGE, ignore=ignored)
    return folder


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed package as OpenCLIP made it."""
    installed = patching.status()
    assert installed.folder is not None
    folder = copy_package(installed.folder, tmp_path_factory.mktemp("original"))
    patching.revert(folder, VERSION)
    return folder


@pytest.fixture(scope="session")
def patched(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the patched package."""
    folder = copy_package(original, tmp_path_factory.mktemp("patched"))
    patching.apply(folder, VERSION)
    return folder
