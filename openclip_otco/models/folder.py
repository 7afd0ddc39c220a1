"""Folders of local towers: where they lie, which of them the package makes, and whether they are whole."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from openclip_otco.files import locked
from openclip_otco.models.bert_tiny import make_bert_tiny, recipe, whole_safetensors
from openclip_otco.models.pretrained import PRETRAINED_TOWERS

HOME = "OPENCLIP_OTCO_HOME"
BERT = "OPENCLIP_OTCO_BERT"
BERT_BASE = "bert-base-uncased"
_TINY = "bert-tiny"


def home() -> Path:
    """The user's folder for files that the package makes: `$OPENCLIP_OTCO_HOME`, or one in the user's cache."""
    if named := os.environ.get(HOME):
        return Path(named).expanduser().absolute()
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home, as in some containers
        cache = Path(tempfile.gettempdir())
    return cache.absolute() / "openclip_otco"


def bert_tiny_folder() -> Path:
    """Where the tiny BERT lies once made; the name changes with its recipe, so an upgrade never meets an old one."""
    return home() / f"{_TINY}-{recipe()}"


def pretrained_folder(tower: str) -> Path:
    """Where a tower of `PRETRAINED_TOWERS` lies once made; the name changes with the wheel that it comes from."""
    return home() / f"{tower}-{PRETRAINED_TOWERS[tower].wheel.sha256[:8]}"


def local_towers() -> dict[str, str]:
    """The folder of each tower that is a local one, there or not, by the name that configurations call it."""
    folders = {_TINY: str(bert_tiny_folder()), **{name: str(pretrained_folder(name)) for name in PRETRAINED_TOWERS}}
    if named := os.environ.get(BERT):
        folders[BERT_BASE] = str(Path(named).expanduser().absolute())
    return folders


def is_folder(tower: str) -> bool:
    """Whether a text tower is a folder. A hub's name is NAME or OWNER/NAME; all else, and whatever exists, is one."""
    return tower.startswith((".", "/", "~")) or tower.count("/") > 1 or "\\" in tower or Path(tower).is_dir()


def is_made_here(folder: str) -> bool:
    """Whether the package makes this folder."""
    return folder in _makers()


def make_if_broken(folder: str, broken: Callable[[str], str | None]) -> None:
    """Makes a folder that the package makes, where it is missing or broken. Of several processes one does.

    Args:
        folder: any; those of others are left alone.
        broken: gives the first file of a folder that is missing or cut short, None for a whole one.

    Raises:
        OSError: the folder cannot be written.
        RuntimeError: pretrained weights cannot be had.
    """
    make = _makers().get(folder)
    if make is None or broken(folder) is None:
        return
    with locked(Path(folder)):
        if broken(folder) is not None:
            make()


def broken_timm_file(folder: str) -> str | None:
    """The first file of a folder with a timm model that is missing or cut short."""
    if not Path(folder, "config.json").is_file():
        return "config.json"
    return None if whole_safetensors(Path(folder, "model.safetensors")) else "model.safetensors"


def _makers() -> dict[str, Callable[[], None]]:
    """By folder, how the package makes it."""
    tiny = bert_tiny_folder()
    makers: dict[str, Callable[[], None]] = {str(tiny): lambda: make_bert_tiny(tiny)}
    for name, tower in PRETRAINED_TOWERS.items():
        folder = pretrained_folder(name)
        makers[str(folder)] = lambda tower=tower, folder=folder: tower.make(folder, home() / "wheels")  # type: ignore[misc]
    return makers
