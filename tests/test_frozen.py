"""Frozen features: a remembered tower is the tower itself, whatever was asked before, and nothing else changes."""

import argparse
import copy
import logging
import multiprocessing
import os
import re
from collections import Counter
from multiprocessing.synchronize import Event
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
from forks import Fork
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from openclip_otco.frozen.memory import FeatureMemory, input_keys
from openclip_otco.frozen.plugin import FrozenFeaturesCallback, FrozenFeaturesPlugin
from openclip_otco.frozen.towers import freeze_towers
from openclip_otco.models import registry as models

TINY = "RN10t-bert-tiny"


def encode(inputs: Tensor) -> Tensor:
    """Some features, `(b, 3)`."""
    rows = inputs.flatten(1).double()
    return torch.stack([rows.sum(1), rows.square().sum(1), rows[:, 0]], dim=1).float()


def numbered(*numbers: int) -> Tensor:
    """An input `(2, 2)` for each number, equal for equal numbers."""
    return torch.tensor(numbers).view(-1, 1, 1) + torch.tensor([[0.0, 0.5], [0.25, 0.125]])


class Counting:
    """An encoder that counts what it gets."""

    def __init__(self) -> None:
        self.got: list[Tensor] = []

    def __call__(self, inputs: Tensor) -> Tensor:
        self.got.extend(inputs)
        return encode(inputs)


# --- the memory --------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    batches=st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=8), min_size=1, max_size=12),
    rows=st.integers(1, 15),
)
def test_a_memory_gives_what_the_encoder_gives(batches: list[list[int]], rows: int) -> None:
    memory = FeatureMemory(Path("nowhere"), most_bytes=rows * 12)
    for batch in batches:
        assert torch.equal(memory(numbered(*batch), encode), encode(numbered(*batch)))
        assert len(memory) <= rows
    assert memory.asked == sum(map(len, batches))


def test_each_input_is_encoded_once_while_there_is_room() -> None:
    memory, encoder = FeatureMemory(Path("nowhere")), Counting()
    memory(numbered(1, 2, 2, 1), encoder)
    memory(numbered(2, 3), encoder)
    assert torch.equal(torch.stack(encoder.got).unique(dim=0), numbered(1, 2, 3))
    assert len(encoder.got) == 3
    assert (memory.hits, memory.asked) == (3, 6)


def test_what_was_not_asked_for_the_longest_goes_first() -> None:
    memory, encoder = FeatureMemory(Path("nowhere"), most_bytes=2 * 12), Counting()
    for number in (1, 2, 1, 3):
        memory(numbered(number), encoder)
    encoder.got.clear()
    memory(numbered(1), encoder)
    assert not encoder.got
    memory(numbered(2), encoder)
    assert len(encoder.got) == 1


def test_the_file_keeps_what_was_asked_for_twice(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "image.safetensors"
    memory = FeatureMemory(path)
    memory(numbered(1, 2, 3), encode)
    memory.save()
    assert not path.exists()  # nothing that was worth it
    memory(numbered(2, 3), encode)
    memory.save()
    again, encoder = FeatureMemory(path), Counting()
    assert torch.equal(again(numbered(1, 2, 3), encoder), encode(numbered(1, 2, 3)))
    assert torch.equal(torch.stack(encoder.got), numbered(1))
    again.save(everything=True)
    assert len(FeatureMemory(path)) == 3


def test_two_runs_add_to_one_file_and_the_file_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "image.safetensors"
    memories = [FeatureMemory(path) for _ in range(2)]
    for memory, numbers in zip(memories, ((1, 2), (3, 4)), strict=True):
        for _ in range(2):
            memory(numbered(*numbers), encode)
    for memory in memories:
        memory.save()
    assert len(FeatureMemory(path)) == 4
    small = FeatureMemory(path, most_bytes=3 * 12)
    for _ in range(2):
        small(numbered(7, 8), encode)
    small.save()
    assert len(FeatureMemory(path)) == 3
    encoder = Counting()
    FeatureMemory(path)(numbered(7, 8), encoder)
    assert not encoder.got


def test_a_full_memory_saves_rows_that_took_the_place_of_others(tmp_path: Path) -> None:
    path = tmp_path / "image.safetensors"
    memory = FeatureMemory(path, most_bytes=12)
    for number in (1, 2):
        for _ in range(2):
            memory(numbered(number), encode)
        memory.save()
    encoder = Counting()
    FeatureMemory(path)(numbered(2), encoder)
    assert not encoder.got


def _save_some(path: Path, numbers: list[int]) -> None:
    memory = FeatureMemory(path)
    for number in numbers:
        for _ in range(2):
            memory(numbered(number), encode)
        memory.save()


def test_processes_may_save_at_once(tmp_path: Path) -> None:
    path = tmp_path / "image.safetensors"
    context = multiprocessing.get_context("fork")
    shares = [list(range(start, 30, 3)) for start in range(3)]
    processes = [context.Process(target=_save_some, args=(path, share)) for share in shares]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    memory, encoder = FeatureMemory(path), Counting()
    assert torch.equal(memory(numbered(*range(30)), encoder), encode(numbered(*range(30))))
    assert not encoder.got


def _replace_again_and_again(path: Path, stop: Event) -> None:
    """Files of one row and of many take each other's place."""
    while not stop.is_set():
        for numbers in (range(1), range(40)):
            memory = FeatureMemory(path.with_name("other"))
            memory(numbered(*numbers), encode)
            memory.save(everything=True)
            memory.path.replace(path)


def test_a_file_that_is_replaced_while_it_is_read_is_one_of_the_two(tmp_path: Path) -> None:
    path, context = tmp_path / "image.safetensors", multiprocessing.get_context("fork")
    stop = context.Event()
    writer = context.Process(target=_replace_again_and_again, args=(path, stop), daemon=True)
    writer.start()
    lengths, expected = Counter(), encode(numbered(*range(40)))
    try:
        while len(lengths) < 2 or sum(lengths.values()) < 1000:
            assert writer.is_alive()
            memory = FeatureMemory(path)
            if n := len(memory):
                lengths[n] += 1
                assert torch.equal(memory(numbered(*range(n)), encode), expected[:n])
    finally:
        stop.set()
        writer.join(60)
    assert lengths.keys() == {1, 40}


@pytest.mark.parametrize("content", [b"", b"no tensors"])
def test_a_broken_file_costs_a_warning(tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "image.safetensors"
    path.write_bytes(content)
    memory = FeatureMemory(path)
    assert str(path) in caplog.text
    for _ in range(2):
        memory(numbered(1), encode)
    memory.save()
    assert len(FeatureMemory(path)) == 1


def test_features_from_evaluation_may_be_trained_on() -> None:
    memory = FeatureMemory(Path("nowhere"))
    head = nn.Linear(3, 1)
    with torch.inference_mode():
        memory(numbered(1, 2), encode)
    head(memory(numbered(1, 2), encode)).sum().backward()
    assert torch.equal(head.weight.grad, encode(numbered(1, 2)).sum(0, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_keys_tell_any_two_inputs_apart(dtype: torch.dtype) -> None:
    inputs = torch.zeros(5, 3, 4, dtype=dtype)
    for index in range(1, 5):
        inputs[index, index % 3, index % 4] = 1
    inputs = torch.cat([inputs, inputs[:1]])
    keys = input_keys(inputs)
    assert len(set(keys)) == 5
    assert keys[0] == keys[5] == input_keys(inputs.transpose(0, 1).contiguous().transpose(0, 1))[0]


# --- the towers --------------------------------------------------------------------------------------------------


def batch(n: int = 6) -> tuple[Tensor, Tensor]:
    images = torch.randn(n, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    words = ["a", "dog", "runs", "in", "the", "snow"]
    return images, open_clip.get_tokenizer(TINY)([" ".join(words[: 2 + i % 5]) + f" {i}" for i in range(n)])


@pytest.fixture
def model() -> nn.Module:
    """Locked, with batch norms that have seen something."""
    models.register_models()
    models.prepare_model(TINY)
    torch.manual_seed(0)
    made = open_clip.create_model(TINY, output_dict=True)
    for part in made.visual.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.uniform_(-0.2, 0.2)
            part.running_var.uniform_(0.8, 1.2)
    made.lock_image_tower()
    made.lock_text_tower(freeze_layer_norm=True)
    return made


def test_remembered_towers_give_what_the_towers_give(model: nn.Module, tmp_path: Path) -> None:
    images, texts = batch()
    plain = copy.deepcopy(model).eval()
    assert [tower.kind for tower in freeze_towers(model, tmp_path, "fp32")] == ["image", "text"]
    assert list(model.state_dict()) == list(plain.state_dict())
    model.train()  # as the training script does each epoch
    for rows in ([0, 1, 2], [5, 1, 4], [0, 1, 2, 3, 4, 5]):
        ours, theirs = model(images[rows], texts[rows]), plain(images[rows], texts[rows])
        for key in ("image_features", "text_features"):
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=1e-6)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name]), name  # running statistics too


def test_gradients_are_those_of_the_plain_model(model: nn.Module, tmp_path: Path) -> None:
    images, texts = batch()
    plain = copy.deepcopy(model).eval()
    freeze_towers(model, tmp_path, "fp32")
    model.train()
    for each in (model, plain):
        out = each(images, texts)
        open_clip.ClipLoss()(out["image_features"], out["text_features"], out["logit_scale"]).backward()
    theirs = dict(plain.named_parameters())
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {"logit_scale", "visual.head.proj.weight", "text.proj.weight"}
    for name, parameter in model.named_parameters():
        if name in trained:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-6)


def test_a_copy_has_the_memory_and_its_own_head(model: nn.Module, tmp_path: Path) -> None:
    images, texts = batch()
    towers = freeze_towers(model, tmp_path, "fp32")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.visual.head.proj.weight.zero_()
        twin.text.proj.weight.zero_()
        twin(images, texts)
        assert not twin.visual(images).any()
        assert not twin.text(texts).any()
        assert model.visual(images).any()
        assert model.text(texts).any()
    assert [len(tower.memory) for tower in towers] == [len(images)] * 2


def test_a_tower_never_gets_anothers_features(model: nn.Module, tmp_path: Path) -> None:
    twins = [copy.deepcopy(model) for _ in range(4)]
    with torch.no_grad():
        next(iter(twins[1].visual.trunk.parameters())).view(-1)[0] += 1e-3
        twins[2].visual.trunk.get_buffer("bn1.running_mean")[0] += 1e-3
    precisions = ["fp32", "fp32", "fp32", "bf16"]
    digests = [freeze_towers(twin, tmp_path, p)[0].digest() for twin, p in zip(twins, precisions, strict=True)]
    assert len(set(digests)) == 4
    assert freeze_towers(model, tmp_path, "fp32")[0].digest() == digests[0]


def test_images_are_enlarged_for_the_locked_tower_alone(model: nn.Module, tmp_path: Path) -> None:
    images, _ = batch()
    plain = copy.deepcopy(model).eval()
    same = freeze_towers(copy.deepcopy(model), tmp_path, "fp32")[0].digest()
    image, _ = freeze_towers(model, tmp_path, "fp32", image_size=96)
    large = torch.nn.functional.interpolate(images, (96, 96), mode="bicubic", antialias=True)
    torch.testing.assert_close(model.encode_image(images), plain.encode_image(large), rtol=1e-5, atol=1e-6)
    assert image.digest() != same


def test_weights_that_come_after_the_hook_count(model: nn.Module, tmp_path: Path) -> None:
    """As with `--resume`."""
    images, texts = batch()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    freeze_towers(model, tmp_path, "fp32")
    model.load_state_dict(other.state_dict())
    out, expected = model(images, texts), other.eval()(images, texts)
    torch.testing.assert_close(out["image_features"], expected["image_features"], rtol=1e-5, atol=1e-6)


def test_only_what_is_locked_is_remembered(model: nn.Module, tmp_path: Path) -> None:
    next(iter(model.visual.trunk.parameters())).requires_grad = True
    assert [tower.kind for tower in freeze_towers(model, tmp_path, "fp32")] == ["text"]
    assert freeze_towers(open_clip.create_model("ViT-S-32-alt"), tmp_path, "fp32") == []


# --- the plugin --------------------------------------------------------------------------------------------------


def parsed(tmp_path: Path, *words: str) -> argparse.Namespace:
    from open_clip_train.params import parse_args

    return parse_args(["--model", TINY, "--frozen-features", str(tmp_path / "features"), *words])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "add --lock-image"),
        (("--lock-image", "--lock-image-unlocked-groups", "1"), "no tower is locked"),
        (("--lock-text",), "add --lock-text-freeze-layer-norm"),
        (("--lock-image", "--lock-image-freeze-bn-stats"), "drop --lock-image-freeze-bn-stats"),
        (("--lock-image", "--torchscript"), "--torchscript"),
    ],
)
def test_what_cannot_be_remembered_ends_with_one_line(
    words: tuple[str, ...], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser, plugin = argparse.ArgumentParser(prog="main.py"), FrozenFeaturesPlugin()
    for flag in ("lock-image", "lock-text", "lock-image-freeze-bn-stats", "lock-text-freeze-layer-norm", "torchscript"):
        parser.add_argument(f"--{flag}", action="store_true")
    for flag in ("lock-image-unlocked-groups", "lock-text-unlocked-layers"):
        parser.add_argument(f"--{flag}", type=int, default=0)
    parser.add_argument("--trace", action="store_true")
    plugin.add_arguments(parser.add_argument_group("plugin"))
    args = parser.parse_args(["--frozen-features", str(tmp_path / "features"), *words])
    with pytest.raises(SystemExit) as caught:
        plugin.check_args(parser, args)
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("main.py: error: argument --frozen-features: ")
    assert told in lines[0]


def test_an_unknown_tower_is_refused(tmp_path: Path) -> None:
    args = SimpleNamespace(
        frozen_features=str(tmp_path),
        frozen_image_size=None,
        precision="fp32",
        lock_image=True,
        lock_text=False,
        model="ViT-S-32-alt",
    )
    model = open_clip.create_model("ViT-S-32-alt")
    model.lock_image_tower()
    with pytest.raises(RuntimeError, match="image tower of ViT-S-32-alt"):
        FrozenFeaturesPlugin().prepare_model(args, model)


def test_inputs_that_never_come_again_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tower: Any = SimpleNamespace(kind="image", memory=FeatureMemory(tmp_path / "image.safetensors"))
    callback = FrozenFeaturesCallback([tower])
    with caplog.at_level(logging.INFO):
        for epoch in range(1, 4):
            tower.memory(numbered(*range(10 * epoch, 10 * epoch + 10)), encode)
            callback.on_epoch_end(epoch=epoch, step=epoch, writer=None)
            warned = [record for record in caplog.records if record.levelno == logging.WARNING]
            assert len(warned) == epoch - 1  # the first epoch fills the memory
    assert "--aug-cfg" in warned[0].getMessage()
    assert "Image Remembered: 0.0000 (10 kept)" in caplog.text


@pytest.mark.training
def test_a_run_that_remembers_is_the_run_that_encoded(tmp_path: Path) -> None:
    rows = ["filepath,title"]
    for index, image in enumerate(batch(24)[0]):
        path = tmp_path / f"{index}.png"
        Image.fromarray((image.permute(1, 2, 0).sigmoid() * 255).byte().numpy()).save(path)
        rows.append(f"{path},a dog near {index} men")
    (tmp_path / "data.csv").write_text("\n".join(rows))
    data = str(tmp_path / "data.csv")
    # Not WebDataset: OpenCLIP's order of its samples is another one in each run.
    words = ["--model", TINY, "--train-data", data, "--val-data", data,
             "--dataset-type", "csv", "--csv-separator", ",", "--batch-size", "8", "--epochs", "2", "--workers", "0",
             "--warmup", "2", "--lr", "1e-2", "--log-every-n-steps", "1", "--device", "cpu", "--precision", "fp32",
             "--aug-cfg", "scale=(1.0, 1.0)", "--logs", str(tmp_path), "--lock-image", "--lock-text",
             "--lock-text-freeze-layer-norm", "--frozen-features", str(tmp_path / "features")]  # fmt: skip
    steps, shares = [], []
    for name in ("cold", "warm"):
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        output = tmp_path / f"{name}.txt"
        run = Fork("open_clip_train.main", [*words, "--name", name], tmp_path, environment, output)
        assert run.wait() == 0, output.read_text()[-4000:]
        log = (tmp_path / name / "out.log").read_text()
        steps.append(re.findall(r"Train Epoch.*?\[.*?\]|LR: .*", log))
        shares.append(re.findall(r"(Image|Text) Remembered: ([\d.]+) \((\d+) kept\)", log))
    assert len(steps[0]) == 12
    assert steps[0] == steps[1]
    # 24 in training and the same 24 in validation, for each of two epochs.
    assert [float(share) for _, share, _ in shares[0][:2]] == [pytest.approx(0.5, abs=0.01)] * 2
    assert shares[1] == [(kind, "1.0000", "24") for _ in range(2) for kind in ("Image", "Text")]
