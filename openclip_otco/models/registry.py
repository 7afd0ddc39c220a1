"""Models: the package's model configurations in OpenCLIP's registry, and whether their towers can be loaded."""

import json
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

from openclip_otco.models.bert_tiny import broken_file
from openclip_otco.models.folder import (
    BERT,
    BERT_BASE,
    HOME,
    broken_timm_file,
    is_folder,
    is_made_here,
    local_towers,
    make_if_broken,
)

_TIMM_FOLDER = "local-dir:"  # timm's own prefix of a folder's path


def model_configs() -> dict[str, dict[str, Any]]:
    """The package's configurations by model name. The names of local towers are replaced by their folders."""
    folders, configs = local_towers(), {}
    for source in files("openclip_otco.configs").iterdir():
        if source.name.endswith(".json"):
            config = json.loads(source.read_text(encoding="utf-8"))
            if "text_cfg" not in config:
                continue
            for key in ("hf_model_name", "hf_tokenizer_name"):
                config["text_cfg"][key] = folders.get(config["text_cfg"][key], config["text_cfg"][key])
            prefix, _, tower = config["vision_cfg"].get("timm_model_name", "").rpartition(_TIMM_FOLDER)
            if tower in folders and not prefix:
                config["vision_cfg"]["timm_model_name"] = f"{_TIMM_FOLDER}{folders[tower]}"
            configs[source.name.removesuffix(".json")] = config
    return configs


def register_models() -> None:
    """Makes `--model NAME` work in OpenCLIP for each of the package's configurations; may be called again."""
    import open_clip

    configs = model_configs()
    if all(open_clip.get_model_config(name) == config for name, config in configs.items()):
        return
    # OpenCLIP reads the files now and keeps their content, so the folder can be deleted at once.
    with tempfile.TemporaryDirectory() as folder:
        for name, config in configs.items():
            Path(folder, f"{name}.json").write_text(json.dumps(config), encoding="utf-8")
        open_clip.add_model_config(folder)


def _towers(name: str) -> tuple[str | None, str | None]:
    """The folder of a registered model's image tower, and the folder or hub name of its text tower.

    None for an image tower that is no folder, and for other models.
    """
    import open_clip

    if ":" in name:  # a schema such as `hf-hub:`, for which the configuration would have to be fetched
        return None, None
    config = open_clip.get_model_config(name.replace("/", "-"))
    if not config:
        return None, None
    image = config["vision_cfg"].get("timm_model_name") or ""
    folder = image.removeprefix(_TIMM_FOLDER) if image.startswith(_TIMM_FOLDER) else None
    return folder, config["text_cfg"].get("hf_model_name")


def prepare_model(name: str) -> None:
    """Makes the folders of the towers of model `name`, if the package makes them and they are missing or broken.

    These are the tiny BERT, and pretrained towers, which are fetched. For other models, nothing is done.

    Raises:
        RuntimeError: a folder cannot be written, or pretrained weights cannot be fetched.
    """
    for tower, broken in zip(_towers(name), (broken_timm_file, broken_file), strict=True):
        if tower is None:
            continue
        try:
            make_if_broken(tower, broken)
        except OSError as error:
            raise RuntimeError(
                f"model {name}: its tower cannot be written to {tower} ({error.strerror or error}); "
                f"name a folder that you can write to in the environment variable {HOME}"
            ) from error
        except RuntimeError as error:
            raise RuntimeError(f"model {name}: {error}") from error


def check_model(name: str) -> str | None:
    """Why model `name` cannot load its towers, and the cure, in one line; None if no problem is found.

    This check comes first because OpenCLIP's own message for a missing folder is about a hub, which misleads.
    """
    image, text = _towers(name)
    if image is not None and (missing := broken_timm_file(image)) is not None:
        return _folder_problem(name, "image", image, missing)
    if text is None:
        return None
    if is_folder(text):
        missing = broken_file(text)
        return None if missing is None else _folder_problem(name, "text", text, missing)
    return _check_hub(name, text)


def _folder_problem(name: str, kind: str, tower: str, missing: str) -> str:
    state = f"has no whole {missing}" if Path(tower).is_dir() else "is not there"
    files = "config.json and model.safetensors"
    if kind == "text":
        files = "config.json, the tokenizer's files and model.safetensors"
    if is_made_here(tower):
        code = f"from openclip_otco.models.registry import *; register_models(); prepare_model({name!r})"
        cure = f'make it by python -c "{code}"'
    elif tower == local_towers().get(BERT_BASE):
        cure = f"let {BERT} name a folder with {files}"
    else:
        cure = f"put {files} there, or correct the configuration"
    return f"model {name}: its {kind} tower's folder {tower} {state}; {cure}"


def _check_hub(name: str, tower: str) -> str | None:
    from huggingface_hub import constants, try_to_load_from_cache

    if not constants.HF_HUB_OFFLINE:
        return None
    # It looks only for the configuration: which other files a tower needs, only transformers knows.
    if isinstance(try_to_load_from_cache(tower, "config.json"), str):
        return None
    cure = f"unset HF_HUB_OFFLINE to fetch it once, or let {BERT} name a local BERT folder"
    if tower != BERT_BASE:
        cure = "unset HF_HUB_OFFLINE to fetch it once, or let hf_model_name in the configuration name a folder"
    return f"model {name}: its text tower {tower} is not in the local cache, and the hub is off; {cure}"
