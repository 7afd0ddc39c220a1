"""Checkpoints of OpenCLIP's training script: the model that a checkpoint is of, and its weights.

A run's folder may come from a stranger, so its files are only read as data. No code in them is run. They cannot choose
an address from which something is fetched, or a folder in which something is written. They can name a model that
OpenCLIP or this package knows; towers, configuration and tokenizer of this model are fetched if they are not here.
"""

import ast
import contextlib
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from openclip_otco.errors import UserError, first_line
from openclip_otco.frozen.towers import FrozenTower, freeze_towers
from openclip_otco.method.plan import TransportPlan
from openclip_otco.runs.encoder import Encoder

# What DistributedDataParallel and torch.compile put before the names of weights.
_WRAPPERS = ("module.", "_orig_mod.")
# Flags of the training that decide how the model is made or how images are prepared for validation.
_MODEL_FLAGS = (
    "force_quick_gelu",
    "force_custom_text",
    "force_image_size",
    "force_context_length",
    "image_mean",
    "image_std",
    "image_interpolation",
    "image_resize_mode",
)


def params(checkpoint: Path) -> dict[str, Any]:
    """The run's settings by name, read from its `params.txt`; {} without this file.

    For `runs/NAME/checkpoints/epoch_N.pt`, it is `runs/NAME/params.txt`.
    """
    try:
        lines = (checkpoint.parent.parent / "params.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        name, _, text = line.partition(": ")
        try:
            found[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            found[name] = text
    return found


def read(checkpoint: Path) -> dict[str, Any]:
    """All that is in a checkpoint; no code in the file is run (`weights_only`).

    Raises:
        UserError: the file is missing, broken, not written to its end, or no checkpoint.
    """
    if not checkpoint.is_file():
        raise UserError(f"CHECKPOINT {checkpoint}: no such file")
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"CHECKPOINT {checkpoint}: cannot be read: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"CHECKPOINT {checkpoint}: holds no weights of a model under `state_dict`")
    return content


def state_dict(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The model's weights in a checkpoint.

    Raises:
        UserError: the file cannot be read, or holds no weights.
    """
    content = read(checkpoint)
    weights = content.get("state_dict", content)
    if not weights or not all(isinstance(weight, torch.Tensor) for weight in weights.values()):
        raise UserError(f"CHECKPOINT {checkpoint}: holds no weights of a model under `state_dict`")
    return {_bare(name): weight for name, weight in weights.items()}


def cached_plans(checkpoint: Path) -> list[TransportPlan]:
    """The transport plans that `--loss otco` left in a checkpoint, oldest first; none where another loss trained it.

    Raises:
        UserError: the file is missing, or its plans cannot be used.
    """
    plugins = read(checkpoint).get("plugins")
    if not isinstance(plugins, dict) or "otco" not in plugins:
        return []
    try:
        return [TransportPlan.from_state_dict(plan) for plan in plugins["otco"]["cache"]["plans"]]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"CHECKPOINT {checkpoint}: its cached plans cannot be used: {error}") from error


def load(
    checkpoint: Path,
    model: str | None = None,
    precision: str | None = None,
    device: str | None = None,
    frozen_features: Path | None = None,
) -> Encoder:
    """The model of a checkpoint. Arguments that are not given are taken from the run's `params.txt`.

    Args:
        checkpoint: written by `open_clip_train.main`, or weights alone.
        model: OpenCLIP's name of the model.
        precision: as `--precision` of the training; fp32 if `params.txt` does not say it.
        device: a device of torch. By default the run's; the CPU if that is a GPU and this machine has none. If the run
            is unknown, a GPU if there is one.
        frozen_features: folder in which locked towers remember features, as `--frozen-features` of the training; the
            one that `params.txt` names is not touched.

    Raises:
        UserError: the checkpoint, the model or the device cannot be used.
    """
    run = params(checkpoint)
    weights = state_dict(checkpoint)
    name = model or run.get("model")
    if name is None:
        where = checkpoint.parent.parent / "params.txt"
        raise UserError(f"CHECKPOINT {checkpoint}: {where} does not tell its model; name it by --model")
    if model is None and ":" in str(name):  # a schema of OpenCLIP's, such as hf-hub:
        raise UserError(f"CHECKPOINT {checkpoint}: its run loaded the model {name}; to load it here, give --model")
    precision = precision or str(run.get("precision", "fp32"))
    place = _device(device, run.get("device"))
    made, preprocess, tokenizer = _make(str(name), precision, place, run, "logit_bias" in weights)
    try:
        made.load_state_dict(weights)
    except RuntimeError as error:
        # The rest of the message names each weight on a line of its own.
        first = str(error).splitlines()[1].strip()
        hint = first if len(first) < 200 else f"{first[:200]}..."
        raise UserError(f"CHECKPOINT {checkpoint}: is not of model {name} (--model): {hint}") from error
    made.eval()

    from open_clip import get_input_dtype
    from open_clip_train.precision import get_autocast

    autocast = get_autocast(precision, device_type=place.type)
    return Encoder(
        str(name),
        made,
        tokenizer,
        preprocess,
        place,
        precision,
        autocast,
        get_input_dtype(precision),
        _frozen(made, run, precision, frozen_features),
    )


def _frozen(model: Any, run: dict[str, Any], precision: str, folder: Path | None) -> list[FrozenTower]:
    """The locked towers of a run with `--frozen-features`, which remember their features if there is a `folder`."""
    if not isinstance(run.get("frozen_features"), str):
        if folder is not None:
            raise UserError(f"--frozen-features {folder}: the run was trained without; drop the flag")
        return []
    if run.get("lock_image"):
        model.lock_image_tower()
    if run.get("lock_text"):
        model.lock_text_tower(0, True)
    size = run.get("frozen_image_size")
    return freeze_towers(model, folder, precision, size if isinstance(size, int) else None)


def _make(name: str, precision: str, device: torch.device, run: dict[str, Any], bias: bool) -> tuple[Any, Any, Any]:
    import open_clip

    from openclip_otco.models.registry import check_model, prepare_model, register_models

    register_models()
    options = {flag: run[flag] for flag in _MODEL_FLAGS if run.get(flag) is not None}
    if bias:
        options["init_logit_bias"] = 0.0  # makes the parameter, which SigLIP's checkpoints have
    try:
        prepare_model(name)
        if problem := check_model(name):
            raise UserError(f"--model {problem}")
        with _no_talk_of_weights():
            model, _, preprocess = open_clip.create_model_and_transforms(
                name, precision=precision, device=device, pretrained_text=False, **options
            )
        tokenizer = open_clip.get_tokenizer(name, context_length=run.get("force_context_length"))
    except UserError:
        raise
    except Exception as error:  # whatever the flags in `params.txt` make OpenCLIP stumble over
        raise UserError(f"--model {name}: {first_line(error)}") from error
    return model, preprocess, tokenizer


def _device(given: str | None, of_run: Any) -> torch.device:
    cuda = torch.cuda.is_available()
    for name in (given, of_run if isinstance(of_run, str) else None):
        if name is None:
            continue
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise UserError(f"--device {name}: {first_line(error)}") from error
        if device.type != "cuda" or cuda:
            return device
        if given:
            raise UserError(f"--device {name}: CUDA is not available here; give --device cpu")
    return torch.device("cuda" if cuda else "cpu")


def _bare(name: str) -> str:
    while name.startswith(_WRAPPERS):
        name = name.partition(".")[2]
    return name


@contextlib.contextmanager
def _no_talk_of_weights() -> Iterator[None]:
    """Turns off a warning of OpenCLIP that no weights were loaded: here they are loaded a moment later."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
