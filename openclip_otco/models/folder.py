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
    """The tiny BERT's folder, made or not. Its name changes with the recipe, so that an upgrade makes a new folder."""
    return home() / f"{_TINY}-{recipe()}"


def pretrained_folder(tower: str) -> Path:
    """The folder of a tower of `PRETRAINED_TOWERS`, made or not. Its name changes with the wheel of the tower."""
    return home() / f"{tower}-{PRETRAINED_TOWERS[tower].wheel.sha256[:8]}"


def local_towers() -> dict[str, str]:
    """The folder of each local tower, made or not, by the name of the tower in configurations."""
    folders = {_TINY: str(bert_tiny_folder()), **{name: str(pretrained_folder(name)) for name in PRETRAINED_TOWERS}}
    if named := os.environ.get(BERT):
        folders[BERT_BASE] = str(Path(named).expanduser().absolute())
    return folders


def is_folder(tower: str) -> bool:
    """Whether `tower` means a folder: it is an existing folder, or it is no name of a hub (NAME or OWNER/NAME)."""
    return tower.startswith((".", "/", "~")) or tower.count("/") > 1 or "\\" in tower or Path(tower).is_dir()


def is_made_here(folder: str) -> bool:
    """Whether the package makes this folder."""
    return folder in _makers()


def make_if_broken(folder: str, broken: Callable[[str], str | None]) -> None:
    """Makes one of the package's own folders, if it is missing or broken. Only one of several processes does so.

    Args:
        folder: any folder; a folder that the package does not make is left as it is.
        broken: gives the first file of a folder that is missing or cut short, None for a whole one.

    Raises:
        OSError: the folder cannot be written.
        RuntimeError: pretrained weights cannot be fetched.
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
    """For each folder that the package makes, the function that makes it."""
    tiny = bert_tiny_folder()
    makers: dict[str, Callable[[], None]] = {str(tiny): lambda: make_bert_tiny(tiny)}
    for name, tower in PRETRAINED_TOWERS.items():
        folder = pretrained_folder(name)
        makers[str(folder)] = lambda tower=tower, folder=folder: tower.make(folder, home() / "wheels")  # type: ignore[misc]
    return makers
