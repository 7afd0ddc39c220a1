"""`evaluate`: metrics against torchmetrics and by hand, the samples of shards, and checkpoints of real models."""

from __future__ import annotations

import errno
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from commands import command
from hypothesis import given
from hypothesis import strategies as st
from open_clip_train.train import get_clip_metrics
from PIL import Image
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy
from torchmetrics.functional.retrieval import retrieval_hit_rate

from openclip_otco import CalibratedRetriever, PlanCache, PlanSolver
from openclip_otco.data import samples
from openclip_otco.errors import UserError
from openclip_otco.evaluate import ranks
from openclip_otco.evaluate.metrics import retrieval
from openclip_otco.evaluate.zero_shot import class_features, classification
from openclip_otco.models.registry import prepare_model, register_models
from openclip_otco.runs import checkpoint

MODEL = "RN10t-bert-tiny"


def related(images: int, per_image: Sequence[int], seed: int, d: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Unit features of images and of so many texts for each, which lie near them; and each text's image."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(images, d, generator=generator)
    owner = torch.repeat_interleave(torch.arange(images), torch.tensor(per_image))
    text = image[owner] + torch.randn(len(owner), d, generator=generator)
    return F.normalize(image, dim=1), F.normalize(text, dim=1), owner


# --- metrics -----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 6), min_size=2, max_size=25), st.integers(0, 1000))
def test_recalls_are_those_of_torchmetrics(per_image: list[int], seed: int) -> None:
    images, texts, owner = related(len(per_image), per_image, seed)
    found = retrieval(images, texts, owner)
    scores = images @ texts.T
    own = torch.arange(len(images))[:, None] == owner
    for k in (1, 5, 10):
        for way, rows, targets in (("image_to_text", scores, own), ("text_to_image", scores.T, own.T)):
            hits = [retrieval_hit_rate(row, target, top_k=k) for row, target in zip(rows, targets, strict=True)]
            assert found[f"{way}_R@{k}"] == pytest.approx(torch.stack(hits).mean().item())
    assert found["rsum"] == pytest.approx(100 * sum(value for name, value in found.items() if "_R@" in name))
    assert (found["images"], found["texts"]) == scores.shape


@pytest.mark.parametrize("size", [100, 101])
def test_one_caption_an_image_is_openclip_s_own_validation(size: int) -> None:
    images, texts, owner = related(size, [1] * size, seed=0)
    expected = get_clip_metrics(images, texts, torch.tensor(1.0))
    found = retrieval(images, texts, owner)
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    features = related(40, [5] * 40, seed=1)
    whole = retrieval(*features)
    monkeypatch.setattr(ranks, "_TILE", 450)  # 2 images against 200 texts, 11 texts against 40 images
    assert retrieval(*features) == whole


def test_texts_may_come_in_any_order() -> None:
    images, texts, owner = related(30, [3] * 30, seed=2)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(0))
    assert retrieval(images, texts[order], owner[order]) == pytest.approx(retrieval(images, texts, owner))


@pytest.mark.parametrize("noise", [0.0, 1e-8])
def test_a_model_that_knows_nothing_gets_no_hits(noise: float) -> None:
    # The noise is what another place in a batch makes of equal features.
    generator = torch.Generator().manual_seed(0)
    images, texts = (
        F.normalize(torch.ones(n, 64) + noise * torch.randn(n, 64, generator=generator), dim=1) for n in (50, 250)
    )
    owner = torch.arange(50).repeat_interleave(5)
    found = retrieval(images, texts, owner)
    assert {value for name, value in found.items() if "_R@" in name} == {0.0}
    assert found["text_to_image_mean_rank"] == 50
    labels = torch.arange(50) % 5
    assert classification(images, labels, texts[:5])["acc1"] == 0


def test_a_caption_twice_is_a_tie_for_both_images() -> None:
    images = torch.eye(4)
    texts = torch.stack([F.normalize(images[0] + images[1], dim=0)] * 2 + [images[2], images[3]])
    found = retrieval(images, texts, torch.arange(4))
    assert found["image_to_text_R@1"] == found["text_to_image_R@1"] == 0.5


def test_potentials_are_added_to_candidates() -> None:
    images, texts, owner = related(20, [2] * 20, seed=3)
    image, text = torch.rand(20), torch.rand(40)
    found = retrieval(images, texts, owner, image, text)
    # The same as one more coordinate, the other side's being one.
    ones = torch.ones(40, 1)
    to_text = retrieval(torch.cat([images, ones[:20]], 1), torch.cat([texts, text[:, None]], 1), owner)
    to_image = retrieval(torch.cat([images, image[:, None]], 1), torch.cat([texts, ones], 1), owner)
    for name, value in found.items():
        if name.startswith(("image_to_text", "text_to_image")):
            assert value == pytest.approx((to_text if name.startswith("image") else to_image)[name])
    assert found["rsum"] != retrieval(images, texts, owner)["rsum"]


def test_recalls_with_potentials_are_those_of_search() -> None:
    images, texts, owner = related(30, [3] * 30, seed=4)
    train = related(50, [1] * 50, seed=5)
    retriever = CalibratedRetriever.from_features(*train[:2])
    found = retrieval(images, texts, owner, retriever.potentials(images, "text_to_image"), retriever.potentials(texts))
    to_text = owner[retriever.search(images, texts, 10).indices] == torch.arange(30)[:, None]
    to_image = retriever.search(texts, images, 10, "text_to_image").indices == owner[:, None]
    for way, own in (("image_to_text", to_text), ("text_to_image", to_image)):
        for k in (1, 5, 10):
            assert found[f"{way}_R@{k}"] == pytest.approx(own[:, :k].any(dim=1).double().mean().item())


@given(st.integers(2, 12), st.integers(1, 60), st.integers(0, 1000))
def test_accuracy_is_that_of_torchmetrics(classes: int, images: int, seed: int) -> None:
    weights, features, labels = related(classes, [images // classes + 1] * classes, seed)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    features, labels = features[order], labels[order]
    found = classification(features, labels, weights)
    scores = features @ weights.T
    options = {"num_classes": classes}
    assert found["acc1"] == pytest.approx(multiclass_accuracy(scores, labels, average="micro", **options).item())
    macro = multiclass_accuracy(scores, labels, average="macro", **options)
    assert found["mean_per_class_recall"] == pytest.approx(macro.item())
    if classes > 5:
        top = multiclass_accuracy(scores, labels, average="micro", top_k=5, **options)
        assert found["acc5"] == pytest.approx(top.item())
    else:
        assert "acc5" not in found


# --- samples -----------------------------------------------------------------------------------------------------


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def picture(seed: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels(seed)).save(stream, "PNG")
    return stream.getvalue()


def write_shard(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def captioned(tmp_path: Path) -> str:
    """Two shards of 9 images with three captions each."""
    for shard in range(2):
        files = {}
        for number in range(shard, 9, 2):
            texts = [f"the {word} number {number}" for word in ("picture", "photo", "drawing")]
            files[f"{number}.png"] = picture(number)
            files[f"{number}.txt"] = texts[0].encode()
            files[f"{number}.json"] = json.dumps({"captions": texts}).encode()
        write_shard(tmp_path / f"{shard}.tar", files)
    return str(tmp_path / "{0..1}.tar")


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        ({"txt": b" a dog\n"}, ["a dog"]),
        ({"txt": b"a dog\na cat \n\n"}, ["a dog\na cat"]),
        ({"txt": b" \n"}, []),
        ({"txt": b"first", "json": b'{"captions": ["one", "two"]}'}, ["one", "two"]),
        ({"txt": b"first", "json": b'{"caption": "other", "width": 3}'}, ["first"]),
        ({"1.txt": b"second", "0.txt": b"first"}, ["first", "second"]),
        ({"cls": b"3"}, []),
    ],
)
def test_captions(sample: dict[str, bytes], expected: list[str]) -> None:
    assert samples.captions(sample) == expected


def test_captions_on_lines_of_their_own() -> None:
    assert samples.captions({"txt": b"a dog\na cat \n\n", "1.txt": b"a hat"}, by_line=True) == [
        "a hat",
        "a dog",
        "a cat",
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_are_read(captioned: str, workers: int) -> None:
    found = [each for batch in samples.batches(captioned, np.asarray, 4, workers) for each in batch]
    assert samples.images(captioned) == 9
    assert sorted(sample.key for sample in found) == [str(number) for number in range(9)]
    for sample in found:
        number = int(sample.key)
        assert sample.captions == [f"the {word} number {number}" for word in ("picture", "photo", "drawing")]
        assert np.array_equal(sample.image, pixels(number))
        assert sample.label is None


def test_several_captions(captioned: str, tmp_path: Path) -> None:
    write_shard(tmp_path / "one.tar", {"a.png": picture(0), "a.txt": b"a dog", "b.png": picture(1), "b.txt": b"a cat"})
    (tmp_path / "torn.tar").write_bytes(b"no tar")
    assert samples.several_captions(captioned)
    for other in ("one.tar", "torn.tar", "nowhere.tar"):
        assert not samples.several_captions(str(tmp_path / other))
    assert not samples.several_captions("pipe:cat shard.tar")


# --- checkpoints -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    register_models()
    prepare_model(MODEL)
    torch.manual_seed(0)
    made = open_clip.create_model(MODEL)
    # Statistics of its own: evaluation mode has to show.
    for name, buffer in made.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
    return made.eval()


def save(model: torch.nn.Module, folder: Path, prefix: str = "", **params: object) -> Path:
    """A run's folder as OpenCLIP leaves it; its checkpoint."""
    path = folder / "runs/a/checkpoints/epoch_1.pt"
    path.parent.mkdir(parents=True)
    lines = {"model": MODEL, "precision": "fp32", "device": "cpu", "force_image_size": None, **params}
    (path.parent.parent / "params.txt").write_text("".join(f"{name}: {value}\n" for name, value in lines.items()))
    weights = {f"{prefix}{name}": weight for name, weight in model.state_dict().items()}
    torch.save({"epoch": 1, "name": "a", "state_dict": weights}, path)
    return path


def evaluate(*words: object) -> int:
    return command("evaluate", *words)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_checkpoint_gives_the_model_back(model: torch.nn.Module, tmp_path: Path, prefix: str) -> None:
    encoder = checkpoint.load(save(model, tmp_path, prefix))
    assert (encoder.name, encoder.precision, encoder.device.type) == (MODEL, "fp32", "cpu")
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.allclose(encoder.images(list(images)), model.encode_image(images, normalize=True), atol=1e-6)
        tokens = open_clip.get_tokenizer(MODEL)(["a dog", "two cats"])
        expected = model.encode_text(tokens, normalize=True)
    assert torch.allclose(encoder.texts(["a dog", "two cats"]), expected, atol=1e-6)


def test_checkpoint_of_siglip_and_other_flags_of_the_run(tmp_path: Path) -> None:
    made = open_clip.create_model(MODEL, init_logit_bias=-10.0)
    flags = {"precision": "amp_bf16", "image_mean": [0.1, 0.2, 0.3], "image_interpolation": "bilinear"}
    encoder = checkpoint.load(save(made, tmp_path, **flags))
    assert encoder.model.logit_bias.item() == -10
    assert "mean=[0.1, 0.2, 0.3]" in str(encoder.preprocess)
    assert "bilinear" in str(encoder.preprocess)
    features = encoder.images([torch.ones(3, 64, 64)])
    assert features.dtype == torch.float32
    assert features.norm().item() == pytest.approx(1, abs=1e-6)


def test_weights_alone_need_a_name(model: torch.nn.Module, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"params\.txt does not tell its model; name it by --model"):
        checkpoint.load(tmp_path / "weights.pt")
    assert checkpoint.load(tmp_path / "weights.pt", model=MODEL).precision == "fp32"


class Touch:
    """Code in a pickle."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "trap": Touch(tmp_path / "trap")}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load(tmp_path / "evil.pt", model=MODEL)
    assert not (tmp_path / "trap").exists()


# --- the command -------------------------------------------------------------------------------------------------


def test_a_text_is_one_caption_unless_lines_are_asked_for(
    model: torch.nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = (save(model, tmp_path), "--data", training_shard(tmp_path / "lines.tar"), "--out", tmp_path / "found.json")
    for flags, texts, told in (((), 12, "12 captions have several lines"), (("--caption-lines",), 24, "")):
        assert evaluate(*words, *flags) == 0
        assert json.loads((tmp_path / "found.json").read_text())["retrieval"]["texts"] == texts
        assert told in (err := capsys.readouterr().err)
        assert ("--caption-lines" in err) == bool(told)


def test_a_full_disk_does_not_lose_the_figures(
    model: torch.nn.Module,
    captioned: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("openclip_otco.files.write_text", full)
    assert evaluate(save(model, tmp_path), "--data", captioned, "--out", tmp_path / "found.json") == 2
    out, err = capsys.readouterr()
    assert "rsum" in out
    assert f"--out {tmp_path / 'found.json'}: cannot be written: No space left on device" in err


def test_a_folder_that_is_not_there_is_told_before_anything_is_encoded(
    model: torch.nn.Module, captioned: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert evaluate(save(model, tmp_path), "--data", captioned, "--out", tmp_path / "none/found.json") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"cannot be written: there is no folder {tmp_path / 'none'}; make it first" in err


def test_nothing_is_written_where_a_run_says(model: torch.nn.Module, captioned: str, tmp_path: Path) -> None:
    foreign, own = tmp_path / "foreign", tmp_path / "own"
    foreign.mkdir()
    flags = {"lock_image": True, "lock_text": True, "frozen_features": str(foreign), "frozen_image_size": 96}
    words = (save(model, tmp_path, **flags), "--data", captioned, "--batch-size", 4)
    metrics = []
    for frozen in ((), ("--frozen-features", own), ("--frozen-features", own)):
        assert evaluate(*words, *frozen, "--out", tmp_path / "found.json") == 0
        metrics.append(json.loads((tmp_path / "found.json").read_text())["retrieval"])
    assert not list(foreign.iterdir())
    assert sorted(path.name.partition("-")[0] for path in own.glob("*.safetensors")) == ["image", "text"]
    # Enlarged by the run's --frozen-image-size, remembered or not.
    assert metrics[0] == pytest.approx(metrics[1])
    assert metrics[1] == metrics[2]


def test_retrieval_of_a_checkpoint(
    model: torch.nn.Module, captioned: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = save(model, tmp_path)
    words = (path, "--data", captioned, "--batch-size", 4)
    assert evaluate(*words, "--out", tmp_path / "found.json") == 0
    out, err = capsys.readouterr()
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["model"] == MODEL
    assert "classification" not in found
    assert "| image to text | " in out
    assert f"rsum {found['retrieval']['rsum']:.1f}" in out
    assert "No pretrained weights" not in err

    _, _, preprocess = open_clip.create_model_and_transforms(MODEL)
    order = [*range(0, 9, 2), *range(1, 9, 2)]
    pictures = [preprocess(Image.open(io.BytesIO(picture(number)))) for number in order]
    texts = [f"the {word} number {number}" for number in order for word in ("picture", "photo", "drawing")]
    with torch.inference_mode():
        images = model.encode_image(torch.stack(pictures), normalize=True)
        text_features = model.encode_text(open_clip.get_tokenizer(MODEL)(texts), normalize=True)
    expected = retrieval(images, text_features, torch.arange(9).repeat_interleave(3))
    assert found["retrieval"] == pytest.approx(expected)

    assert evaluate(*words, "--workers", 0, "--out", tmp_path / "again.json") == 0
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "found.json").read_bytes()


def training_shard(path: Path) -> str:
    """Twelve images of two captions each."""
    files = {}
    for number in range(12):
        files[f"{number}.png"] = picture(100 + number)
        files[f"{number}.txt"] = f"a thing of kind {number}\nmore of {number}".encode()
    write_shard(path, files)
    return str(path)


def encoded(path: Path, data: str) -> tuple[Tensor, Tensor, Tensor]:
    encoder = checkpoint.load(path)
    found = [sample for batch in samples.batches(data, encoder.preprocess, 4, 0, by_line=True) for sample in batch]
    images = encoder.images([sample.image for sample in found])
    texts = encoder.texts([text for sample in found for text in sample.captions])
    return images, texts, torch.tensor([row for row, sample in enumerate(found) for _ in sample.captions])


def calibrated(images: Tensor, texts: Tensor, owner: Tensor, retriever: CalibratedRetriever) -> dict[str, float]:
    potentials = retriever.potentials(images, "text_to_image"), retriever.potentials(texts, "image_to_text")
    return retrieval(images, texts, owner, *potentials)


@pytest.mark.parametrize("pairs", [7, 100])
def test_retrieval_calibrated_by_shards(
    model: torch.nn.Module, captioned: str, tmp_path: Path, capsys: pytest.CaptureFixture, pairs: int
) -> None:
    path, train = save(model, tmp_path), training_shard(tmp_path / "train.tar")
    words = (path, "--data", captioned, "--batch-size", 4, "--out", tmp_path / "found.json")
    assert evaluate(*words) == 0
    plain = json.loads((tmp_path / "found.json").read_text())
    calibrate = ("--calibrate", "--calibrate-data", train, "--calibrate-pairs", pairs, "--caption-lines")
    assert evaluate(*words, *calibrate) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert {name: found[name] for name in plain} == plain
    count = min(pairs, 24)
    assert found["calibration"] == {"data": train, "plans": [{"step": 0, "pairs": count, "epsilon": 0.1}]}
    rsum, gain = (
        found["calibrated_retrieval"]["rsum"],
        found["calibrated_retrieval"]["rsum"] - plain["retrieval"]["rsum"],
    )
    out = capsys.readouterr().out
    assert f"Calibrated by {count} training pairs, epsilon 0.1: rsum {rsum:.1f} ({gain:+.1f})" in out
    assert "| image to text | " in out
    assert "| text to image, calibrated | " in out

    images, texts, owner = encoded(path, train)
    retriever = CalibratedRetriever.from_features(images[owner][:pairs], texts[:pairs])
    assert found["calibrated_retrieval"] == calibrated(*encoded(path, captioned), retriever)


def test_retrieval_calibrated_by_cached_plans(
    model: torch.nn.Module, captioned: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = save(model, tmp_path)
    images, texts, owner = encoded(path, training_shard(tmp_path / "train.tar"))
    cache = PlanCache()
    for step, part in enumerate((slice(0, 12), slice(12, 24))):
        cache.add(PlanSolver(epsilon=0.07).solve(images[owner][part], texts[part], step=step))
    content = torch.load(path)
    torch.save({**content, "plugins": {"otco": {"cache": cache.state_dict()}}}, path)
    words = (path, "--data", captioned, "--calibrate", "--out", tmp_path / "found.json")
    for epsilon in (0.1, 0.2):
        assert evaluate(*words, *(("--calibrate-epsilon", epsilon) if epsilon != 0.1 else ())) == 0
        assert f"2 cached plans of 12 pairs, epsilon {epsilon}" in capsys.readouterr().out
        found = json.loads((tmp_path / "found.json").read_text())
        retriever = CalibratedRetriever.from_checkpoint(path, epsilon)
        assert found["calibrated_retrieval"] == calibrated(*encoded(path, captioned), retriever)
        steps = [{"step": step, "pairs": 12, "epsilon": epsilon} for step in range(2)]
        assert found["calibration"] == {"data": None, "plans": steps}


def test_nothing_is_calibrated_on_what_it_is_measured_on(
    model: torch.nn.Module, captioned: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = save(model, tmp_path)
    (tmp_path / "link.tar").symlink_to(tmp_path / "1.tar")
    train = training_shard(tmp_path / "train.tar")
    for data in (captioned, str(tmp_path / "0.tar"), f"{train}::{tmp_path / 'link.tar'}"):
        assert evaluate(path, "--data", captioned, "--calibrate", "--calibrate-data", data) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"openclip-otco evaluate: --calibrate-data {data}: ")
        assert "belongs to --data; calibrate on training shards" in err
        assert len(err.splitlines()) == 1


def test_classification_of_a_checkpoint(model: torch.nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = save(model, tmp_path)
    labels = [2, 0, 1, 1, 0, 2, 2]
    files = {}
    for number, label in enumerate(labels):
        files |= {f"{number}.png": picture(number), f"{number}.cls": str(label).encode()}
    write_shard(tmp_path / "classes.tar", files)
    (tmp_path / "names.txt").write_text(
        "cat\nred dog\nbird\n", encoding="utf-8-sig"
    )  # as an editor of Windows saves it
    (tmp_path / "templates.txt").write_text("a photo of a {c}.\nsome {} {here}\n")
    words = (path, "--data", tmp_path / "classes.tar")
    named = (*words, "--classes", tmp_path / "names.txt")
    assert evaluate(*named, "--templates", tmp_path / "templates.txt", "--out", tmp_path / "out.json") == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert "retrieval" not in found

    encoder = checkpoint.load(path)
    prompts = [[f"a photo of a {name}.", f"some {name} {{here}}"] for name in ("cat", "red dog", "bird")]
    weights = torch.stack([F.normalize(encoder.texts(each).mean(dim=0), dim=0) for each in prompts])
    made = class_features(encoder, ["cat", "red dog", "bird"], ["a photo of a {}.", "some {} {here}"])
    assert torch.allclose(made, weights, atol=1e-6)
    images = encoder.images([encoder.preprocess(Image.open(io.BytesIO(picture(n)))) for n in range(len(labels))])
    assert found["classification"] == pytest.approx(classification(images, torch.tensor(labels), weights))

    # Without names there is nothing to compare with, which is said.
    capsys.readouterr()
    assert evaluate(*words) == 0
    assert "name them by --classes" in capsys.readouterr().err
    assert evaluate(*named) == 0
    assert "Zero-shot classification: 7 images, 3 classes" in capsys.readouterr().out


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("files", "words", "message"),
    [
        ({"a.txt": b"a dog"}, (), "no images (jpg, png, jpeg, webp)"),
        ({"a.png": b"PNG", "a.txt": b"a dog"}, (), "sample a of data.tar cannot be read: "),
        ({"a.png": picture(0)}, (), "neither captions (.txt, .json) nor classes (.cls)"),
        ({"a.png": picture(0), "a.json": b'{"captions": 3}'}, (), "`captions` in its .json is no list of texts"),
        ({"a.png": picture(0), "a.txt": b"x", "b.png": picture(1)}, (), "1 of 2 images have no caption"),
        ({"a.png": picture(0), "a.cls": b"1", "b.png": picture(1)}, (), "1 of 2 images have no class"),
        ({"a.png": picture(0), "a.cls": b"dog"}, (), "sample a of data.tar cannot be read: "),
        ({"a.png": picture(0), "a.cls": b"2"}, ("--classes", "names.txt"), "has 2 names, for labels of 2 to 2"),
        ({"a.png": picture(0), "a.txt": b"x"}, ("--classes", "names.txt"), "the shards hold no classes (.cls)"),
        ({}, ("--classes", "nowhere.txt"), "--classes nowhere.txt: cannot be read"),
        ({}, ("--templates", "names.txt"), "--templates: needs --classes"),
        ({}, ("--calibrate-data", "bare.tar"), "--calibrate-data: needs --calibrate"),
        ({}, ("--calibrate-epsilon", "0.2"), "--calibrate-epsilon: needs --calibrate"),
        ({}, ("--calibrate",), "epoch_1.pt: holds no cached plans"),
        ({}, ("--calibrate",), "name training shards by --calibrate-data"),
        ({}, ("--calibrate", "--calibrate-data", "no.tar"), "--calibrate-data no.tar: 1 of 1 shards do not exist"),
        ({}, ("--calibrate", "--calibrate-data", "names.txt"), "--calibrate-data names.txt: "),
        ({}, ("--calibrate", "--calibrate-data", "bare.tar"), "--calibrate-data bare.tar: no captions (.txt, .json)"),
        (
            {"a.png": picture(0), "a.cls": b"0"},
            ("--calibrate", "--calibrate-data", "train.tar"),
            "--calibrate: --data data.tar holds no captions (.txt, .json) to retrieve",
        ),
        ({}, ("--classes", "names.txt", "--templates", "names.txt"), "'dog' needs one {c} where the class name goes"),
        ({}, ("--model", "ViT-0"), "--model ViT-0: "),
        ({}, ("--model", "RN50"), "is not of model RN50 (--model): Missing key(s)"),
        ({}, ("--device", "quantum"), "--device quantum: "),
        ({}, ("--out", "names.txt/x.json"), "--out names.txt/x.json: cannot be written"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(
    model: torch.nn.Module,
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, bytes],
    words: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("names.txt").write_text("dog\ncat\n")
    write_shard(Path("bare.tar"), {"a.png": picture(0), "a.cls": b"0"})
    training_shard(Path("train.tar"))
    write_shard(Path("data.tar"), files or {"a.png": picture(0), "a.txt": b"a dog"})
    path = save(model, Path())
    assert evaluate(path, "--data", "data.tar", "--workers", 0, *words) == 2
    err = capfd.readouterr().err
    assert err.startswith("openclip-otco evaluate: ")
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_broken_sample_is_named_through_a_worker(
    model: torch.nn.Module, captioned: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_shard(tmp_path / "1.tar", {"bad.png": b"PNG", "bad.txt": b"a dog"})
    assert evaluate(save(model, tmp_path), "--data", captioned, "--workers", 2) == 2
    err = capsys.readouterr().err
    assert "sample bad of " in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("break_it", [Path.unlink, torn, lambda path: path.write_bytes(b"")])
def test_checkpoint_that_cannot_be_read(
    model: torch.nn.Module, captioned: str, tmp_path: Path, capsys: pytest.CaptureFixture, break_it: Callable
) -> None:
    path = save(model, tmp_path)
    break_it(path)
    assert evaluate(path, "--data", captioned) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"openclip-otco evaluate: CHECKPOINT {path}: ")
    assert len(err.splitlines()) == 1


def test_shards_that_are_not_there(
    model: torch.nn.Module, captioned: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "1.tar").unlink()
    assert evaluate(save(model, tmp_path), "--data", captioned) == 2
    assert f"1 of 2 shards do not exist, first {tmp_path / '1.tar'}" in capsys.readouterr().err
    (tmp_path / "1.tar").write_bytes(b"no tar")
    assert evaluate(tmp_path / "runs/a/checkpoints/epoch_1.pt", "--data", captioned) == 2
    assert "1.tar is no readable tar file" in capsys.readouterr().err


def test_a_model_that_diverged_is_refused(
    model: torch.nn.Module, captioned: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = save(model, tmp_path)
    content = torch.load(path)
    content["state_dict"] = {name: weight * torch.nan for name, weight in content["state_dict"].items()}
    torch.save(content, path)
    assert evaluate(path, "--data", captioned) == 2
    assert "features are not finite" in capsys.readouterr().err
