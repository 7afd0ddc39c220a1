"""Models: the package's model configurations in OpenCLIP's registry, and the text towers they need."""

import json
import os
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

from openclip_otco.bert_tiny import broken_file, make_bert_tiny, recipe

HOME = "OPENCLIP_OTCO_HOME"
BERT = "OPENCLIP_OTCO_BERT"
_TINY, _BASE = "bert-tiny", "bert-base-uncased"


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


def model_configs() -> dict[str, dict[str, Any]]:
    """The package's configurations by model name, with the text tower's folder filled in where it is a local one."""
    folders = {_TINY: str(bert_tiny_folder())}
    if named := os.environ.get(BERT):
        folders[_BASE] = str(Path(named).expanduser().absolute())
    configs = {}
    for source in files("openclip_otco.configs").iterdir():
        if source.name.endswith(".json"):
            config = json.loads(source.read_text(encoding="utf-8"))
            if "text_cfg" not in config:
                continue
            for key in ("hf_model_name", "hf_tokenizer_name"):
                config["text_cfg"][key] = folders.get(config["text_cfg"][key], config["text_cfg"][key])
            configs[source.name.removesuffix(".json")] = config
    return configs


def register_models() -> None:
    """Makes `--model NAME` work in OpenCLIP for each of the package's configurations; may be called again."""
    import open_clip

    configs = model_configs()
    if all(open_clip.get_model_config(name) == config for name, config in configs.items()):
        return
    # OpenCLIP keeps what it read, so the files with this user's folders filled in need not outlive the call.
    with tempfile.TemporaryDirectory() as folder:
        for name, config in configs.items():
            Path(folder, f"{name}.json").write_text(json.dumps(config), encoding="utf-8")
        open_clip.add_model_config(folder)


def _text_tower(name: str) -> str | None:
    """The folder or hub name of a registered model's text tower, None for other models."""
    import open_clip

    if ":" in name:  # a schema such as hf-hub: whose configuration would have to be fetched
        return None
    config = open_clip.get_model_config(name.replace("/", "-"))
    return config["text_cfg"].get("hf_model_name") if config else None


def prepare_model(name: str) -> None:
    """Makes the tiny BERT's folder where model `name` needs it and it is missing or broken; else does nothing.

    Raises:
        RuntimeError: the folder cannot be written.
    """
    folder = bert_tiny_folder()
    if _text_tower(name) != str(folder) or broken_file(folder) is None:
        return
    try:
        make_bert_tiny(folder)
    except OSError as error:
        raise RuntimeError(
            f"model {name}: its text tower cannot be written to {folder} ({error.strerror or error}); "
            f"name a folder that you can write to in the environment variable {HOME}"
        ) from error


def _is_folder(tower: str) -> bool:
    """A hub's name is NAME or OWNER/NAME; all else, and whatever exists, is a folder."""
    return tower.startswith((".", "/", "~")) or tower.count("/") > 1 or "\\" in tower or Path(tower).is_dir()


def check_model(name: str) -> str | None:
    """One line about why model `name` cannot load its text tower, and the cure; None when nothing speaks against it.

    OpenCLIP's own message for a missing folder speaks of a hub that the folder never came from.
    """
    tower = _text_tower(name)
    if tower is None:
        return None
    if _is_folder(tower):
        if (missing := broken_file(tower)) is None:
            return None
        state = f"has no whole {missing}" if Path(tower).is_dir() else "is not there"
        if tower == str(bert_tiny_folder()):
            cure = (
                f'make it by python -c "from openclip_otco.models import *; register_models(); prepare_model({name!r})"'
            )
        elif os.environ.get(BERT) and tower == str(Path(os.environ[BERT]).expanduser().absolute()):
            cure = f"let {BERT} name a folder with config.json, the tokenizer's files and model.safetensors"
        else:
            cure = "put config.json, the tokenizer's files and model.safetensors there, or correct the configuration"
        return f"model {name}: its text tower's folder {tower} {state}; {cure}"
    return _check_hub(name, tower)


def _check_hub(name: str, tower: str) -> str | None:
    from huggingface_hub import constants, try_to_load_from_cache

    if not constants.HF_HUB_OFFLINE:
        return None
    # The configuration alone: which other files a tower needs is for transformers to know.
    if isinstance(try_to_load_from_cache(tower, "config.json"), str):
        return None
    cure = f"unset HF_HUB_OFFLINE to fetch it once, or let {BERT} name a local BERT folder"
    if tower != _BASE:
        cure = "unset HF_HUB_OFFLINE to fetch it once, or let hf_model_name in the configuration name a folder"
    return f"model {name}: its text tower {tower} is not in the local cache, and the hub is off; {cure}"
