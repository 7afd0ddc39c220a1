"""`audit`: confidence against dense plans, the stream, parts and table, and the command on shards of a real model."""

from __future__ import annotations

import errno
import io
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import timm
import torch
import torch.nn.functional as F
import webdataset as wds
from commands import command
from conftest import paired_features
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torchmetrics.functional.classification import binary_auroc

from openclip_otco.audit import table
from openclip_otco.audit.clean import write_clean
from openclip_otco.audit.confidence import PlanJudgement, judge_by_plan
from openclip_otco.audit.encoder import PairEncoder
from openclip_otco.audit.folder import AuditFolder
from openclip_otco.audit.pairs import Cursor, stream
from openclip_otco.audit.score import Truth, auroc
from openclip_otco.audit.source import Shards
from openclip_otco.audit.suspects import Worst
from openclip_otco.audit.towers import load_towers
from openclip_otco.audit.two_groups import WrongShare
from openclip_otco.audit.verdict import judge_window, log_density
from openclip_otco.audit.windows import second_half, windows
from openclip_otco.data import samples
from openclip_otco.errors import UserError
from openclip_otco.method.plan import TransportPlan
from openclip_otco.method.solver import PlanSolver
from openclip_otco.models.folder import bert_tiny_folder
from openclip_otco.models.registry import prepare_model, register_models
from openclip_otco.pages.thumbnail import thumbnail
from openclip_otco.runs import checkpoint

MODEL = "RN10t-bert-tiny"


# --- confidence --------------------------------------------------------------------------------------------------


def couple(images: list[int], captions: list[int], seed: int, epsilon: float = 0.1, d: int = 6) -> TransportPlan:
    """The plan of pairs whose images and captions are these, by number; equal numbers have equal features."""
    generator = torch.Generator().manual_seed(seed)
    both = F.normalize(torch.randn(2, max(images + captions) + 1, d, generator=generator), dim=-1)
    return PlanSolver(epsilon=epsilon, tolerance=1e-5).solve(both[0][images], both[1][captions])


def dense(plan: TransportPlan) -> np.ndarray:
    """The plan as a matrix, in double precision."""
    v, t, f, g = (x.double().numpy() for x in (plan.image_features, plan.text_features, plan.f, plan.g))
    return np.exp((f[:, None] + g - (1 - v @ t.T)) / plan.epsilon) / len(plan) ** 2


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(0, 1000))
def test_without_copies_confidence_is_the_shares_of_row_and_column(n: int, seed: int) -> None:
    plan = couple(list(range(n)), list(range(n)), seed)
    found = judge_by_plan(plan, range(n), range(n))
    mass = dense(plan)
    expected = np.diag(mass) ** 2 / (mass.sum(axis=0) * mass.sum(axis=1))
    assert found.log_confidence.exp().tolist() == pytest.approx(expected.tolist(), rel=1e-3)
    cosine = (plan.image_features * plan.text_features).sum(dim=1)
    assert found.cosine.tolist() == pytest.approx(cosine.tolist(), abs=1e-6)
    others = mass - np.diag(np.diag(mass) + 1)
    assert found.best.tolist() == (others.argmax(axis=1).tolist() if n > 1 else [-1])


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=30), st.integers(0, 1000))
def test_copies_are_one(pairs: list[tuple[int, int]], seed: int) -> None:
    images, captions = (list(each) for each in zip(*pairs, strict=True))
    plan = couple(images, captions, seed)
    found = judge_by_plan(plan, [f"image {i}" for i in images], [f"caption {c}" for c in captions])
    mass = dense(plan)
    for index, (image, caption) in enumerate(pairs):
        rows = [k for k, i in enumerate(images) if i == image]
        columns = [k for k, c in enumerate(captions) if c == caption]
        copies = pairs.count((image, caption))
        own = mass[np.ix_(rows, columns)].sum() / copies
        not_of_image = [k for k, c in enumerate(captions) if (image, c) not in pairs]
        not_of_caption = [k for k, i in enumerate(images) if (i, caption) not in pairs]
        row = own / (own + mass[np.ix_(rows, not_of_image)].sum() / len(rows))
        column = own / (own + mass[np.ix_(not_of_caption, columns)].sum() / len(columns))
        assert found.log_confidence[index].exp().item() == pytest.approx(row * column, rel=1e-3)
        if not_of_image:
            best = max(not_of_image, key=lambda k: mass[index, k])
            assert mass[index, found.best[index]] == pytest.approx(mass[index, best], rel=1e-4)
            assert found.best[index] == captions.index(captions[found.best[index]])
        else:
            assert found.best[index] == -1


def test_an_image_s_other_captions_take_nothing_from_each_other() -> None:
    # Ten images with five captions each, all right: each caption has a fifth of its image's row.
    v = torch.eye(16)[:10].repeat_interleave(5, dim=0)
    t = F.normalize(v + 0.1 * torch.randn(50, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    plan = PlanSolver(epsilon=0.05).solve(v, t)
    images = [index // 5 for index in range(50)]
    assert judge_by_plan(plan, images, range(50)).log_confidence.exp().min() > 0.95
    assert judge_by_plan(plan, range(50), range(50)).log_confidence.exp().max() < 0.1


def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [index % 37 for index in range(90)]
    captions = [index % 53 for index in range(90)]
    plan = couple(images, captions, seed=0)
    whole = judge_by_plan(plan, images, captions)
    monkeypatch.setattr("openclip_otco.audit.confidence.tiles", lambda cost: (slice(i, i + 5) for i in range(0, 37, 5)))
    in_tiles = judge_by_plan(plan, images, captions)
    assert torch.allclose(in_tiles.log_confidence, whole.log_confidence, atol=1e-5)
    assert torch.equal(in_tiles.best, whole.best)


def test_small_masses_do_not_vanish() -> None:
    # exp(-2/0.01) is no float32 number, and still has its place among others.
    v = torch.eye(3)
    t = torch.stack([v[1], v[0], -v[2]])
    plan = TransportPlan(v, t, torch.zeros(3), torch.zeros(3), epsilon=0.01)
    found = judge_by_plan(plan, range(3), range(3))
    assert found.log_confidence.isfinite().all()
    assert found.log_confidence[2] < -math.log(1e38)
    assert found.best.tolist()[:2] == [1, 0]


@pytest.mark.parametrize("wrong", [0.2, 0.4, 0.6])
def test_a_trained_model_and_towers_make_one_verdict(wrong: float) -> None:
    v, t = paired_features(1000, d=64, seed=1)
    count = int(1000 * wrong)
    t[:count] = t[:count].roll(1, 0)
    rotation, _ = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    is_wrong = np.arange(1000) < count
    alone = judge_window(PlanSolver(), (v, t @ rotation), None, range(1000), range(1000))
    both = judge_window(PlanSolver(), (v, t @ rotation), (v, t), range(1000), range(1000))
    assert (alone.log_density, alone.cosine) == (None, None)
    for verdict in (alone, both):
        assert verdict.wrong.value == pytest.approx(wrong, abs=0.12)
        assert auroc(verdict.probability, is_wrong) > 0.97
    assert auroc(both.probability, is_wrong) >= auroc(alone.probability, is_wrong)
    # The caption of an image is that of the pair before it, and the plan of either kind sends most there.
    chosen = np.arange(1, count) - np.array(alone.best)[1:count]
    assert (np.array(both.best)[:count] == (np.arange(count) + 1) % count).mean() > 0.9
    assert (chosen == -1).mean() > 0.5


def test_the_density_is_the_odds_of_the_share_over_chance() -> None:
    n = 50
    plan = couple(list(range(n)), list(range(n)), seed=0, epsilon=0.5)
    mass = dense(plan)
    share = np.sqrt(np.diag(mass) ** 2 / (mass.sum(axis=0) * mass.sum(axis=1)))
    found = log_density(judge_by_plan(plan, range(n), range(n)))
    assert found == pytest.approx(np.log(n * share / (1 - share)), abs=1e-3)
    # A pair that has all of its row and column, and one that has nothing, stay finite.
    extremes = PlanJudgement(torch.tensor([0.0, -400.0]), torch.zeros(2), torch.zeros(2))
    assert np.isfinite(log_density(extremes)).all()


# --- windows, scores, suspects, table ----------------------------------------------------------------------------


batch_lengths = st.lists(st.integers(0, 9), max_size=30)


def numbers_in(lengths: list[int], start: int = 0) -> list[list[int]]:
    """Numbers from `start` on, in batches of these lengths."""
    numbers = itertools.count(start)
    return [[next(numbers) for _ in range(length)] for length in lengths]


@settings(deadline=None)
@given(batch_lengths, st.integers(1, 20))
def test_windows_judge_everything_once_and_none_is_tiny(lengths: list[int], size: int) -> None:
    found, count = list(windows(numbers_in(lengths), size)), sum(lengths)
    assert [number for window in found for number in window.items[window.judged :]] == list(range(count))
    assert [window.is_last for window in found] == [
        number == len(found) - 1 and count % size > 0 for number in range(len(found))
    ]
    for window, after in itertools.pairwise(found):
        assert (len(window.items), window.judged) == (size, 0)
        assert window.following in (None, after.items[after.judged])
    for window in found:
        assert len(window.items) <= size
        assert window.items == list(range(window.items[0], window.items[0] + len(window.items)))
        assert len(found) == 1 or 2 * len(window.items) >= size


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 20))
def test_a_window_is_given_out_before_more_is_read(count: int, batch: int, size: int) -> None:
    read = 0

    def batches() -> Iterator[list[int]]:
        nonlocal read
        for numbers in numbers_in([batch] * (count * size)):
            read += len(numbers)
            yield numbers

    for number, _ in zip(range(1, count + 1), windows(batches(), size), strict=False):
        assert read - batch < number * size <= read


@settings(deadline=None)
@given(batch_lengths, st.integers(1, 20), st.data())
def test_windows_go_on_as_if_they_had_not_stopped(lengths: list[int], size: int, data: st.DataObject) -> None:
    whole = list(windows(numbers_in(lengths), size))
    full = sum(lengths) // size
    done = data.draw(st.integers(1, full) if full else st.just(0))
    rest = numbers_in([sum(lengths) - done * size], start=done * size)
    half = whole[done - 1].items[second_half(size)] if done else []
    found = list(windows(rest, size, lambda: half))
    assert [window.items for window in found] == [window.items for window in whole[done:]]
    assert [window.judged for window in found] == [window.judged for window in whole[done:]]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.9]), st.booleans()), min_size=2, max_size=50).filter(
        lambda pairs: len({wrong for _, wrong in pairs}) == 2
    )
)
def test_auroc_is_that_of_torchmetrics(pairs: list[tuple[float, bool]]) -> None:
    scores, wrong = zip(*pairs, strict=True)
    expected = binary_auroc(torch.tensor(scores), ~torch.tensor(wrong)).item()
    assert auroc(scores, wrong) == pytest.approx(expected, abs=1e-6)


def test_truth_knows_samples_of_one_caption(tmp_path: Path) -> None:
    (tmp_path / "truth.csv").write_text("key,caption_key\na,b\nc-7,a\n")
    truth = Truth(tmp_path / "truth.csv")
    found = {key: truth.is_wrong(key) for key in ("a", "a-3", "a-x", "b", "c", "c-7", "c-8", "c-7-1")}
    assert found == {"a": True, "a-3": True, "a-x": False, "b": False, "c": False, "c-7": True, "c-8": False} | {
        "c-7-1": True
    }


def test_a_byte_order_mark_is_no_part_of_the_truth(tmp_path: Path) -> None:
    (tmp_path / "truth.csv").write_text("key,caption_key\na,b\n", encoding="utf-8-sig")
    assert Truth(tmp_path / "truth.csv").is_wrong("a")


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(-5, 5))), st.integers(1, 10))
def test_worst_admits_what_is_among_the_first(scores: list[tuple[float, float]], top: int) -> None:
    worst = Worst(top)
    orders = [(*score, (0, index, 0)) for index, score in enumerate(scores)]
    for index, order in enumerate(orders):
        lower = sum(other < order for other in orders[:index])
        assert worst.admits(order) == (lower < top)


def test_thumbnails_are_small(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("RGBA", (1000, 300), (200, 10, 10, 255)).save(stream, "PNG")
    with Image.open(stream) as image, Image.open(io.BytesIO(thumbnail(image, 256))) as small:
        assert (small.format, small.size) == ("JPEG", (256, 77))


def part_row(score: float, number: int) -> table.Row:
    texts = {name: f"{name} {number}" for name in ("key", "shard", "caption", "best_caption", "best_key")}
    place = {"shard_number": 0, "sample": number, "line": 0}
    scores = {"probability": math.exp(score), "evidence": -score, "structure": 0.0, "log_density": None, "cosine": 0.0}
    return {**texts, **place, **scores, "thumbnail": None}


def test_ranking_of_many_parts(tmp_path: Path) -> None:
    scores = np.random.default_rng(0).choice([-1.5, -1.0, -0.5, -0.25], 110)
    rows = [part_row(float(score), number) for number, score in enumerate(scores)]
    parts = []
    for number in range(0, 110, 10):
        parts.append(tmp_path / f"it's [{number}] *.parquet")
        table.write(parts[-1], sorted(rows[number : number + 10], key=table.order), table.PART)
    (tmp_path / "scratch").mkdir()
    ranking = table.Ranking(parts, tmp_path / "scratch")
    # Python's sort is stable: those alike stay in the order of the data.
    expected = sorted(rows, key=lambda row: row["probability"])
    assert ranking.first(110) == expected
    assert ranking.first(5, skip=20) == expected[20:25]
    ranking.write(tmp_path / "all.parquet")
    columns = [name for name in table.TABLE.names if name != "rank"]
    assert pq.read_table(tmp_path / "all.parquet").to_pylist() == [
        {name: row[name] for name in columns} | {"rank": rank} for rank, row in enumerate(expected, start=1)
    ]
    probabilities = [row["probability"] for row in rows]
    assert ranking.histogram(10) == np.histogram(probabilities, bins=10, range=(0, 1))[0].tolist()
    assert set(tmp_path.iterdir()) == {*parts, tmp_path / "scratch", tmp_path / "all.parquet"}


def test_sure_pairs_are_in_the_last_bin(tmp_path: Path) -> None:
    rows = [part_row(0.0, 0), {**part_row(0.0, 1), "probability": 0.0}]
    table.write(tmp_path / "part.parquet", rows, table.PART)
    assert table.Ranking([tmp_path / "part.parquet"], tmp_path).histogram(4) == [1, 0, 0, 1]


# --- the command -------------------------------------------------------------------------------------------------


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write_shard(path: Path, files: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size, member.mtime, member.mode = len(content), 1_000_000_000, 0o640
            tar.addfile(member, io.BytesIO(content))


def read_shard(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]


WORDS = ("dog", "cat", "bird", "boat", "tree", "house", "car")


@pytest.fixture(scope="module")
def run_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of OpenCLIP's script, of a small model with random weights."""
    register_models()
    prepare_model(MODEL)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run") / "checkpoints/epoch_1.pt"
    path.parent.mkdir()
    (path.parent.parent / "params.txt").write_text(f"model: {MODEL}\nprecision: fp32\ndevice: cpu\notco_epsilon: 0.2\n")
    torch.save({"epoch": 1, "state_dict": open_clip.create_model(MODEL).state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def encoder(run_checkpoint: Path) -> checkpoint.Encoder:
    return checkpoint.load(run_checkpoint)


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Three shards of 45 pairs: samples of one caption, of several in a `json`, and what strangers may put there."""
    folder = tmp_path / "data"
    folder.mkdir()
    for shard in range(3):
        files = []
        for number in range(10):
            key = f"{shard}{number}"
            files += [(f"{key}.png", picture(shard * 10 + number)), (f"{key}.txt", f"a {WORDS[number % 7]}".encode())]
        texts = [f"a {word} of shard {shard}" for word in WORDS[:4]]
        files += [("many.png", picture(100 + shard)), ("many.json", json.dumps({"captions": texts, "w": 64}).encode())]
        files += [("many.txt", texts[0].encode())]
        files += [("../../x.png", picture(200)), ("../../x.txt", b"<script>alert(1)</script>")]
        write_shard(folder / f"{shard}.tar", files)
    return str(folder / "{0..2}.tar")


def audit(*words: object) -> int:
    return command("audit", *words)


@pytest.fixture
def run(
    run_checkpoint: Path, encoder: checkpoint.Encoder, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[dict[str, Any]]]:
    """Audits with these further words, into a folder of the test's; the table's rows. The model is loaded once."""
    monkeypatch.setattr(checkpoint, "load", lambda *given: encoder)

    def audited(out: str, *words: object, of: str = data) -> list[dict[str, Any]]:
        given = ("--checkpoint", run_checkpoint, "--data", of, "--out", tmp_path / out, "--window", 14)
        given += ("--batch-size", 5, "--top", 4, "--workers", 0)
        assert audit(*given, *words) == 0
        return pq.read_table(tmp_path / out / "audit.parquet").to_pylist()

    return audited


def test_the_table_has_what_the_plans_say(
    run: Callable, encoder: checkpoint.Encoder, data: str, tmp_path: Path
) -> None:
    rows = run("out")
    assert [row["rank"] for row in rows] == list(range(1, 46))
    assert [row["probability"] for row in rows] == sorted(row["probability"] for row in rows)

    # The same from what `evaluate` reads, window by window. The last 3 pairs are too few to stand alone, so that the 7
    # before them are judged with them once more.
    found = [sample for batch in samples.batches(data, encoder.preprocess, 45, 0) for sample in batch]
    pairs = [(sample.key, sample.image, caption) for sample in found for caption in sample.captions]
    by_pair = {(row["key"], row["caption"], row["shard"]): row for row in rows}
    assert len(by_pair) == 45
    shards = [sample_shard for sample_shard in samples.shards(data) for _ in range(15)]
    facts = json.loads((tmp_path / "out/audit.json").read_text())
    assert (facts["windows"], facts["epsilon"], facts["pairs"], facts["images"]) == (4, 0.03, 45, 36)
    shares = []
    for start, new, stop in ((0, 0, 14), (14, 14, 28), (28, 28, 42), (35, 42, 45)):
        keys, images, captions = zip(*pairs[start:stop], strict=True)
        # Whatever the `--otco-epsilon` of the run.
        both = encoder.images(images), encoder.texts(captions)
        of_image = [hash(image.numpy().tobytes()) for image in images]
        verdict = judge_window(PlanSolver(epsilon=0.03), both, both, of_image, captions)
        shares.append((stop - new) * verdict.wrong.value / 45)
        judged = judge_by_plan(PlanSolver(epsilon=0.03).solve(*both), of_image, captions)
        for index in range(new - start, stop - start):
            row = by_pair[keys[index], captions[index], shards[start + index]]
            assert row["probability"] == pytest.approx(verdict.probability[index], abs=1e-3)
            assert row["structure"] == pytest.approx(verdict.structure[index], abs=1e-3)
            assert row["log_density"] == pytest.approx(log_density(judged)[index], abs=1e-3)
            assert row["cosine"] == pytest.approx(judged.cosine[index].item(), abs=1e-5)
            best = captions.index(row["best_caption"])
            assert of_image[best] != of_image[index]
            assert row["best_key"] == keys[best]
    assert facts["wrong_share"] == pytest.approx(sum(shares))
    assert facts["wrong_share_low"] <= facts["wrong_share"] <= facts["wrong_share_high"]

    html = (tmp_path / "out/gallery.html").read_text()
    assert html.count("data:image/jpeg;base64,") >= 4
    assert "<script>alert" not in html


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A timm model and a BERT in folders, with random weights, as `--towers` takes them."""
    register_models()
    prepare_model(MODEL)
    folder = tmp_path_factory.mktemp("tower")
    torch.manual_seed(1)
    model = timm.create_model("resnet10t", num_classes=3)
    save_file(model.state_dict(), str(folder / "model.safetensors"), metadata={"format": "pt"})
    known = {"input_size": [3, 64, 64], "num_classes": 3, "classifier": "fc", "first_conv": "conv1.0"}
    config = {"architecture": "resnet10t", "num_classes": 3, "pretrained_cfg": known}
    (folder / "config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}+{bert_tiny_folder()}"


def test_towers_need_no_checkpoint(towers: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    given = ("--data", data, "--out", tmp_path / "out", "--towers", towers, "--window", 14, "--workers", 0)
    assert audit(*given, "--write-clean", tmp_path / "clean", "--drop", 0.4) == 0
    rows = pq.read_table(tmp_path / "out/audit.parquet").to_pylist()
    assert len(rows) == 45
    assert {(row["log_density"], row["cosine"]) for row in rows} == {(None, None)}
    assert all(row["best_caption"] for row in rows)
    assert len((tmp_path / "clean/clean-keys.txt").read_text().splitlines()) < 36
    assert capsys.readouterr().out.startswith(f"{towers}, window 14")
    facts = json.loads((tmp_path / "out/audit.json").read_text())
    assert (facts["checkpoint"], facts["towers"]) == (None, towers)

    found = load_towers(towers)
    sample = next(iter(Shards(data).samples()))
    with Image.open(io.BytesIO(sample.files["png"])) as image:
        pixels = found.preprocess(image.convert("RGB"))
    assert pixels.shape == (3, 64, 64)
    assert found.images(pixels[None]).shape == (1, 512)
    texts = found.texts(["a dog", "a much longer caption of a cat"])
    # Padding changes nothing.
    assert texts[0].tolist() == pytest.approx(found.texts(["a dog"])[0].tolist(), abs=1e-5)


def test_a_text_model_that_cannot_pad_is_refused_before_anything_is_read(
    towers: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = shutil.copytree(bert_tiny_folder(), tmp_path / "text")
    for path in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
        facts = json.loads(path.read_text())
        facts.pop("pad_token", None)
        path.write_text(json.dumps(facts | ({"padding": None} if "padding" in facts else {})))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": None})
    )
    name = f"{towers.partition('+')[0]}+{folder}"
    given = ("--data", data, "--out", tmp_path / "out", "--towers", name, "--window", 14, "--workers", 0)
    assert audit(*given) == 2
    # The bar of transformers aside.
    err = capsys.readouterr().err.split("\r")[-1].strip().splitlines()[-1]
    assert err.startswith(f"openclip-otco audit: --towers {name}: cannot be loaded: ")
    assert "pad" in err
    assert not (tmp_path / "out/audit.parquet").exists()


def test_a_checkpoint_and_towers_are_two_witnesses(run: Callable, towers: str, encoder: checkpoint.Encoder) -> None:
    both = {(row["key"], row["caption"], row["shard"]): row for row in run("both", "--towers", towers)}
    alone = run("alone")
    for row in alone:
        other = both[row["key"], row["caption"], row["shard"]]
        assert other["cosine"] == pytest.approx(row["cosine"], abs=1e-5)
        assert other["log_density"] == pytest.approx(row["log_density"], abs=1e-3)
    assert [row["structure"] for row in alone] != [row["structure"] for row in both.values()]


def test_ranks_share_the_shards(
    run: Callable, run_checkpoint: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Batches and windows as large as a shard: one rank cuts the data as three do.
    whole = run("whole", "--window", 15, "--batch-size", 12, "--write-clean", tmp_path / "clean", "--drop", 0.4)
    given = ("--checkpoint", run_checkpoint, "--data", data, "--out", tmp_path / "out", "--window", 15)
    given += ("--batch-size", 12, "--top", 4, "--workers", 0)
    # As torchrun has it, and by hand; one that is killed before its end goes on.
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "2")
    assert audit(*given) == 0
    assert not (tmp_path / "out/audit.parquet").exists()
    assert audit(*given, "--rank", 1, "--ranks", 3) == 0
    waited = []

    def waiting(seconds: float) -> None:
        waited.append(seconds)
        broken.rename(tmp_path / "out/parts/rank-00002/000000.parquet")

    broken = (tmp_path / "out/parts/rank-00002/000000.parquet").rename(tmp_path / "kept.parquet")
    monkeypatch.setattr("openclip_otco.audit.ranks.time.sleep", waiting)
    words = ("--write-clean", tmp_path / "clean-of-ranks", "--drop", 0.4)
    assert audit(*given, "--rank", 0, *words) == 0
    assert len(waited) == 1
    assert pq.read_table(tmp_path / "out/audit.parquet").to_pylist() == whole
    facts, expected = (json.loads((tmp_path / name / "audit.json").read_text()) for name in ("out", "whole"))
    assert facts == expected
    cleaned = [
        sorted(path.read_bytes() for path in (tmp_path / name).iterdir()) for name in ("clean", "clean-of-ranks")
    ]
    assert cleaned[0] == cleaned[1]


def test_a_rank_that_starts_when_the_clean_data_are_written_has_nothing_to_do(
    rank_words: Callable, tmp_path: Path
) -> None:
    for rank in (2, 1, 0):
        assert audit(*rank_words(rank)) == 0
    words = ("--write-clean", tmp_path / "clean", "--drop", 0.4)
    for rank in (0, 1, 2):
        assert audit(*rank_words(rank), *words) == 0
    assert not AuditFolder(tmp_path / "out", 1, 3).failure()


@pytest.fixture
def rank_words(run: Callable, run_checkpoint: Path, data: str, tmp_path: Path) -> Callable[..., list[str]]:
    """The arguments of one of several ranks, each of which has one shard and cuts it into two windows."""

    def words(rank: int, ranks: int = 3) -> list[str]:
        given = ("--checkpoint", run_checkpoint, "--data", data, "--out", tmp_path / "out", "--window", 7)
        given += ("--batch-size", 12, "--top", 4, "--workers", 0, "--rank", rank, "--ranks", ranks)
        return [str(word) for word in given]

    return words


def run_process(words: list[str], before: str = "") -> subprocess.CompletedProcess:
    """Runs `audit` in a process of its own, after this Python code."""
    code = f"import sys\nfrom openclip_otco import cli\n{before}\nsys.exit(cli.main(['audit', *sys.argv[1:]]))"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)


class Sleeps:
    """Takes the place of `time.sleep`: counts, and calls `then` at sleep number `at`, from 1."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, then: Callable[[], object]) -> None:
        self.count, self.at, self.then = 0, at, then
        monkeypatch.setattr("openclip_otco.audit.ranks.time.sleep", self)

    def __call__(self, seconds: float) -> None:
        assert seconds == 1
        self.count += 1
        assert self.count < 1000, "waits without end"
        if self.count == self.at:
            self.then()


def test_a_rank_without_pairs_is_not_waited_for(
    run: Callable, rank_words: Callable, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = Path(samples.shards(data)[1])
    write_shard(second, [(f"{number}.png", picture(number)) for number in range(12)])
    whole = run("whole", "--window", 7, "--batch-size", 12)
    monkeypatch.setattr("openclip_otco.audit.ranks.time.sleep", lambda seconds: pytest.fail("waits"))
    for rank in (2, 1, 0):
        assert audit(*rank_words(rank)) == 0
    rows = pq.read_table(tmp_path / "out/audit.parquet").to_pylist()
    facts, expected = (json.loads((tmp_path / name / "audit.json").read_text()) for name in ("out", "whole"))
    assert {(row["key"], row["shard"]) for row in rows} == {(row["key"], row["shard"]) for row in whole}
    counts = ("images", "unreadable", "captionless", "pairs")
    assert [facts[name] for name in counts] == [expected[name] for name in counts] == [36, 0, 12, 30]
    assert facts["windows"] == 6


def test_ranks_that_find_no_pairs_at_all_end_with_one_line(
    rank_words: Callable, data: str, capsys: pytest.CaptureFixture
) -> None:
    for shard in samples.shards(data):
        write_shard(Path(shard), [("0.png", picture(0))])
    assert [audit(*rank_words(rank)) for rank in (1, 2)] == [0, 0]
    capsys.readouterr()
    assert audit(*rank_words(0)) == 2
    err = capsys.readouterr().err.strip().split("\r")[-1]
    assert err.splitlines()[-1] == (
        "openclip-otco audit: --data: no pairs of an image and a caption in 3 samples "
        "(0 could not be read, 3 have no caption)"
    )


def test_rank_0_says_which_rank_failed_and_why(
    rank_words: Callable, data: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    second = Path(samples.shards(data)[1])
    second.write_bytes(second.read_bytes()[:20_000])
    assert audit(*rank_words(2)) == 0
    failed = []
    sleeps = Sleeps(monkeypatch, 5, lambda: failed.append(run_process(rank_words(1))))
    assert audit(*rank_words(0)) == 2
    assert failed[0].returncode == 2
    assert f"{second} is no readable tar file" in failed[0].stderr
    assert sleeps.count == 60
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "failed" in line)
    assert line.startswith(f"openclip-otco audit: rank 1 failed: --data: {second} is no readable tar file (")
    assert line.endswith("When this is mended, start rank 1 and then rank 0 again; what is done is kept")


def test_rank_0_tells_every_minute_that_it_waits_for_a_rank_that_was_killed(
    rank_words: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    killer = (
        "import os, signal\nfrom openclip_otco.audit import folder\nadd = folder.AuditFolder.add\n"
        "def add_and_die(*given, **named):\n    add(*given, **named)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "folder.AuditFolder.add = add_and_die"
    )
    assert run_process(rank_words(1, ranks=2), killer).returncode == -signal.SIGKILL
    (part,) = (tmp_path / "out/parts/rank-00001").glob("*.parquet")
    written = part.stat().st_mtime_ns
    told = []

    def start_again() -> None:
        told.append(capsys.readouterr().err)
        assert audit(*rank_words(1, ranks=2)) == 0

    sleeps = Sleeps(monkeypatch, 125, start_again)
    assert audit(*rank_words(0, ranks=2)) == 0
    assert sleeps.count == 125
    message = "rank 0 waits for these ranks: 1. If one of them no longer runs, start it again; what it has done is"
    assert told[0].count(message) == 3
    assert part.stat().st_mtime_ns == written
    assert (tmp_path / "out/audit.parquet").exists()


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (UserError("--epsilon 3: too large"), "--epsilon 3: too large"),
        (ValueError("odd\nvalue"), "ValueError: odd"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
    ],
)
def test_a_rank_that_is_started_again_takes_its_note_away(
    rank_words: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, note: str
) -> None:
    def fail(*given: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr("openclip_otco.audit.judging.judge_window", fail)
        if isinstance(error, UserError):
            assert audit(*rank_words(1, ranks=2)) == 2
        else:
            with pytest.raises(type(error)):
                audit(*rank_words(1, ranks=2))
    rank = AuditFolder(tmp_path / "out", 1, 2)
    assert rank.failure() == note
    # Rank 0 does not take the old note for a new failure.
    Sleeps(monkeypatch, 3, lambda: audit(*rank_words(1, ranks=2)))
    assert audit(*rank_words(0, ranks=2)) == 0
    assert rank.failure() is None


@pytest.mark.parametrize(
    ("words", "note"),
    [
        (("--data", "none.tar"), "--data none.tar: 1 of 1 shards do not exist, first none.tar"),
        (("--checkpoint", "none.pt"), "--checkpoint none.pt: no such file"),
        (("--ranks", 20), "--ranks 20: there are 3 shards; give at most as many ranks"),
    ],
)
def test_a_rank_that_fails_before_it_opens_the_folder_leaves_a_note(
    rank_words: Callable, tmp_path: Path, words: tuple, note: str
) -> None:
    assert audit(*rank_words(2), *words) == 2
    assert AuditFolder(tmp_path / "out", 2, 3).failure() == note
    # What the note lies in is no other audit.
    assert audit(*rank_words(2)) == 0
    assert AuditFolder(tmp_path / "out", 2, 3).failure() is None


def test_a_rank_of_other_settings_leaves_a_note_unless_the_right_one_is_at_work(
    rank_words: Callable, tmp_path: Path
) -> None:
    assert audit(*rank_words(1)) == 0
    rank = AuditFolder(tmp_path / "out", 2, 3)
    settings = json.loads((tmp_path / "out/state.json").read_text())
    settings.pop("version")
    other = (*rank_words(2), "--window", 8)
    with rank.opened(settings):
        assert audit(*other) == 2
        assert rank.failure() is None
    assert audit(*other) == 2
    assert "holds another audit, which differs in --window" in str(rank.failure())


def test_no_note_comes_into_a_folder_of_something_else(rank_words: Callable, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    assert audit(*rank_words(1), "--checkpoint", "none.pt") == 2
    (tmp_path / "out/mine.txt").rename(tmp_path / "out/state.json")
    assert audit(*rank_words(1), "--checkpoint", "none.pt") == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["state.json"]


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(run: Callable, workers: int) -> None:
    assert run("several", "--workers", workers) == run("none")


@pytest.mark.parametrize("stop", range(7))
def test_an_audit_that_was_stopped_goes_on(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    whole = run("whole")
    replace, calls = os.replace, iter(range(10**6))

    def replace_or_stop(*names: Path) -> None:
        if next(calls) == stop:
            raise KeyboardInterrupt
        replace(*names)

    monkeypatch.setattr(os, "replace", replace_or_stop)
    with pytest.raises(KeyboardInterrupt):
        run("stopped")
    assert run("stopped") == whole
    names = ("audit.parquet", "audit.json", "gallery.html")
    assert all((tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names)


def test_an_audit_that_ran_out_of_memory_goes_on_with_smaller_batches(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run("whole", "--batch-size", 30, "--write-clean", tmp_path / "clean", "--drop", 0)
    encode, calls = checkpoint.Encoder.images_and_tower, iter(range(10**6))

    def encode_or_fail(self: checkpoint.Encoder, pixels: Any) -> Any:
        if next(calls) == 1:
            raise MemoryError
        return encode(self, pixels)

    monkeypatch.setattr(checkpoint.Encoder, "images_and_tower", encode_or_fail)
    with pytest.raises(MemoryError):
        run("stopped", "--batch-size", 30)
    # It goes on in the midst of a batch of 30 images.
    assert AuditFolder(tmp_path / "stopped").progress()[0].skip > 2 * 4
    found = run("stopped", "--batch-size", 2, "--write-clean", tmp_path / "clean-after", "--drop", 0)

    def by_pair(rows: list[dict[str, Any]]) -> list[tuple]:
        return sorted((row["shard"], row["key"], row["caption"], row["cosine"]) for row in rows)

    # Each pair once. In batches of another size features differ in their last bits.
    assert [row[:3] for row in by_pair(found)] == [row[:3] for row in by_pair(whole)]
    assert [row[3] for row in by_pair(found)] == pytest.approx([row[3] for row in by_pair(whole)], abs=1e-5)
    cleaned = [
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("clean", "clean-after")
    ]
    assert cleaned[0] == cleaned[1]
    assert len(read_shard(tmp_path / "clean-after/2.tar")) == len(read_shard(tmp_path / "data/2.tar"))


def test_what_is_done_is_not_done_again(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run("out")
    monkeypatch.delattr(checkpoint.Encoder, "images_and_tower")
    assert run("out") == whole


def test_the_last_pairs_take_half_a_window_to_encode_again(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run("out", "--batch-size", 1)
    (tmp_path / "out/parts/000003.parquet").unlink()
    encode, encoded = checkpoint.Encoder.images_and_tower, 0

    def noted(self: checkpoint.Encoder, pixels: Any) -> Any:
        nonlocal encoded
        encoded += len(pixels)
        return encode(self, pixels)

    monkeypatch.setattr(checkpoint.Encoder, "images_and_tower", noted)
    assert run("out", "--batch-size", 1) == whole
    # The last 3 pairs have 2 images. The 7 pairs before have 6; of one of them, all four captions are encoded again.
    assert encoded == 2 + 6


def test_a_killed_process_leaves_what_is_done(run: Callable, run_checkpoint: Path, data: str, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    words = ["audit", "--checkpoint", run_checkpoint, "--data", data, "--out", out, "--window", 2, "--batch-size", 5]
    words += ["--top", 4, "--workers", 2]
    process = subprocess.Popen(
        [sys.executable, "-m", "openclip_otco.cli", *map(str, words)], stderr=subprocess.PIPE, start_new_session=True
    )
    while not list(out.glob("parts/*.parquet")) and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    done = {path: path.stat().st_mtime_ns for path in out.glob("parts/*.parquet")}
    assert 0 < len(done) < 22
    # As a kill in the midst of a file leaves them.
    for folder in (out, out / "parts"):
        (folder / ".partial-x").mkdir()
        (folder / ".partial-x/x.parquet").write_bytes(b"half")
    assert run("killed", "--window", 2) == run("whole", "--window", 2)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert not list(out.rglob(".partial-*"))


def test_the_folder_of_another_audit_is_left_alone(
    run: Callable, run_checkpoint: Path, data: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run("out")
    before = (tmp_path / "out/audit.parquet").read_bytes()
    words = ("--checkpoint", run_checkpoint, "--data", data, "--window", 14, "--top", 4)
    for other, name in ((("--epsilon", 0.3), "--epsilon"), (("--window", 9), "--window"), (("--top", 5), "--top")):
        assert audit(*words, "--out", tmp_path / "out", *other) == 2
        assert f"holds another audit, which differs in {name};" in capsys.readouterr().err
    shard = Path(samples.shards(data)[0])
    write_shard(shard, read_shard(shard)[:6])
    assert audit(*words, "--out", tmp_path / "out") == 2
    assert "differs in --data;" in capsys.readouterr().err
    assert audit(*words, "--out", tmp_path / "data") == 2
    assert "holds something that is no audit" in capsys.readouterr().err
    assert (tmp_path / "out/audit.parquet").read_bytes() == before


def tree(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_clean_shards(run: Callable, data: str, tmp_path: Path) -> None:
    before = tree(tmp_path.parent)
    rows = run("out", "--write-clean", tmp_path / "new/clean", "--drop", 0.4)
    clean = tmp_path / "new/clean"
    written = {path for path in tree(tmp_path.parent) if path not in before}
    assert all(path.is_relative_to(clean) or path.is_relative_to(tmp_path / "out") for path in written)
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(path.name for path in clean.iterdir()) == ["0.tar", "1.tar", "2.tar", "clean-keys.txt", "sizes.json"]

    kept = {(row["shard"], row["key"], row["caption"]) for row in rows if row["rank"] > 18}
    assert len(kept) == 27
    keys, sizes = [], {}
    for shard in samples.shards(data):
        original, copy = read_shard(Path(shard)), read_shard(clean / Path(shard).name)
        names = list(dict.fromkeys(name.rpartition(".")[0] for name, _ in original))
        left = [key for key in names if any(each[:2] == (shard, key) for each in kept)]
        keys += left
        sizes[Path(shard).name] = len(left)
        plain = [file for file in original if file[0].rpartition(".")[0] in left and not file[0].startswith("many")]
        assert [file for file in copy if not file[0].startswith("many")] == plain
        if "many" in left:
            texts = [f"a {word} of shard {Path(shard).stem}" for word in WORDS[:4]]
            texts = [text for text in texts if (shard, "many", text) in kept]
            files = dict(copy)
            assert json.loads(files["many.json"]) == {"captions": texts, "w": 64}
            assert files["many.txt"].decode() == texts[0]
            assert files["many.png"] == dict(original)["many.png"]
        found = list(wds.WebDataset(str(clean / Path(shard).name), shardshuffle=False))
        assert [sample["__key__"] for sample in found] == left
    assert (clean / "clean-keys.txt").read_text().splitlines() == keys
    assert json.loads((clean / "sizes.json").read_text()) == sizes


def test_a_text_of_several_lines_is_one_caption_and_stays_as_it_is(run: Callable, tmp_path: Path) -> None:
    files = []
    for number in range(20):
        text = f"a {WORDS[number % 7]}\r\n\n and {number}\n".encode()
        files += [(f"{number:02}.png", picture(number)), (f"{number:02}.txt", text)]
    write_shard(tmp_path / "lines.tar", files)
    shard = str(tmp_path / "lines.tar")
    rows = run("out", "--write-clean", tmp_path / "clean", "--drop", 0.5, of=shard)
    assert {row["caption"] for row in rows} == {dict(files)[f"{n:02}.txt"].decode().strip() for n in range(20)}
    kept = {row["key"] for row in rows[10:]}
    assert read_shard(tmp_path / "clean/lines.tar") == [file for file in files if file[0][:2] in kept]

    # Where each line is a caption, lines go one by one.
    rows = run("by-line", "--caption-lines", "--write-clean", tmp_path / "lines", "--drop", 0.5, of=shard)
    assert len(rows) == 40
    kept_lines = {(row["key"], row["caption"]) for row in rows[20:]}
    found = {(name[:2], line) for name, text in read_shard(tmp_path / "lines/lines.tar") if name.endswith("txt")
             for line in text.decode().splitlines() if line.strip()}  # fmt: skip
    assert {(key, line.strip()) for key, line in found} == kept_lines


def test_what_is_not_local_is_named_and_the_rest_is_written(
    run_checkpoint: Path,
    run: Callable,
    data: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    first, second, third = samples.shards(data)
    mixed = f"{first}::pipe:cat {second}::{third}"
    words = ("--checkpoint", run_checkpoint, "--data", mixed, "--out", tmp_path / "mixed", "--window", 14)
    words += ("--batch-size", 5, "--top", 4, "--workers", 0, "--write-clean", tmp_path / "clean", "--drop", 0.4)
    assert audit(*words) == 1
    err = capsys.readouterr().err
    assert "1 shards are no local files and are not written, the first is pipe:cat" in err
    run("local", "--write-clean", tmp_path / "all", "--drop", 0.4)
    assert sorted(path.name for path in (tmp_path / "clean").iterdir()) == [
        "0.tar", "2.tar", "clean-keys.txt", "sizes.json"]  # fmt: skip
    for name in ("0.tar", "2.tar", "clean-keys.txt"):
        assert (tmp_path / "clean" / name).read_bytes() == (tmp_path / "all" / name).read_bytes()
    assert json.loads((tmp_path / "mixed/audit.json").read_text())["not_written"] == [f"pipe:cat {second}"]


@pytest.mark.parametrize(("ending", "start"), [("gz", b"\x1f\x8b"), ("bz2", b"BZh"), ("xz", b"\xfd7zXZ")])
def test_a_compressed_shard_stays_compressed(
    run: Callable, data: str, tmp_path: Path, ending: str, start: bytes
) -> None:
    name = f"0.tar.{ending}"
    with tarfile.open(tmp_path / name, f"w:{ending}") as tar, tarfile.open(samples.shards(data)[0]) as plain:
        for member in plain:
            tar.addfile(member, plain.extractfile(member))
    run("out", "--write-clean", tmp_path / "clean", "--drop", 0.4, of=str(tmp_path / name))
    run("plain", "--write-clean", tmp_path / "as-is", "--drop", 0.4, of=samples.shards(data)[0])
    assert (tmp_path / "clean" / name).read_bytes().startswith(start)
    assert read_shard(tmp_path / "clean" / name) == read_shard(tmp_path / "as-is/0.tar")


def test_image_files_do_not_outlive_their_batch(encoder: checkpoint.Encoder, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8)
    large = io.BytesIO()
    Image.fromarray(noise).save(large, "PNG")
    write_shard(tmp_path / "large.tar", [("0.png", large.getvalue()), ("0.txt", b"a dog")])
    ((pairs, _),) = stream(Shards(str(tmp_path / "large.tar")), PairEncoder(encoder, None), 4, 0, Cursor())
    assert len(large.getvalue()) > 10**6
    assert len(pickle.dumps(pairs)) < 50_000
    with Image.open(io.BytesIO(pairs[0].thumbnail)) as small:
        assert small.size == (256, 256)


def break_part(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "empty":
        content = bytearray()
    elif how == "cut off":
        del content[len(content) // 2 :]
    else:
        column = pq.read_metadata(path).row_group(0).column(0)
        content[column.dictionary_page_offset + column.total_compressed_size - 1] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["empty", "cut off", "flipped"])
@pytest.mark.parametrize("broken", [(0,), (1,), (5,), (6,), (1, 3), (5, 6)])
def test_a_broken_part_is_made_again(
    run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture, broken: tuple[int, ...], how: str
) -> None:
    whole = run("out", "--window", 7)
    parts = sorted((tmp_path / "out/parts").glob("*.parquet"))
    assert len(parts) == 7
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in parts}
    for number in broken:
        break_part(parts[number], how)
    capsys.readouterr()
    assert run("out", "--window", 7) == whole
    err = capsys.readouterr().err
    for number, path in enumerate(parts):
        assert path.read_bytes() == before[path][0]
        assert (path.stat().st_mtime_ns == before[path][1]) == (number not in broken)
        assert (f"{path} is broken and will be made again" in err) == (number in broken)


def test_a_part_is_on_the_disk_before_it_has_its_name(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        events.append(("replace", Path(source).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    run("out")
    for index, (what, name) in enumerate(events):
        if what == "replace":
            assert ("fsync", name) in events[:index], name
    assert {name for what, name in events if what == "replace"} >= {
        "000000.parquet", "audit.parquet", "state.json.part"}  # fmt: skip


def test_a_threshold_cuts_at_the_probability(run: Callable, tmp_path: Path) -> None:
    rows = run("out")
    threshold = rows[20]["probability"]
    # The audit is done: only the clean data are made.
    assert run("out", "--write-clean", tmp_path / "clean", "--threshold", repr(threshold)) == rows
    found = [name for path in (tmp_path / "clean").glob("*.tar") for name, _ in read_shard(path)]
    plain = [row for row in rows if row["probability"] >= threshold and row["key"] != "many"]
    assert sum(name.endswith(".txt") and not name.startswith("many") for name in found) == len(plain)


def estimating(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """From now on this share of each window is said to be wrong."""
    monkeypatch.setattr(
        "openclip_otco.audit.witnesses.wrong_share", lambda pairs, decoys, *images: WrongShare(share, 0.1)
    )


@pytest.mark.parametrize("auto", [(), ("--drop", "auto")])
def test_as_many_are_dropped_as_seem_to_be_wrong(
    run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, auto: tuple
) -> None:
    estimating(monkeypatch, 0.0)
    assert run("right", "--write-clean", tmp_path / "all", *auto) == run("right")
    assert "Estimated: 0.0 % of the pairs" in capsys.readouterr().out
    estimating(monkeypatch, 0.4)
    rows = run("out", "--write-clean", tmp_path / "clean", *auto)
    assert json.loads((tmp_path / "out/audit.json").read_text())["wrong_share"] == pytest.approx(0.4)
    kept = {(row["shard"], row["key"]) for row in rows if row["rank"] > round(0.4 * len(rows))}
    everything, clean = ((tmp_path / name / "clean-keys.txt").read_text().splitlines() for name in ("all", "clean"))
    assert len(clean) == len(kept) < len(everything)
    out = capsys.readouterr().out
    # Of windows of 14, 14, 14 and 3 new pairs, the error of the mean.
    assert "Estimated: 40.0 % of the pairs do not belong together (95 % interval: 29.4 to 50.6 %)" in out
    assert f"{len(kept)} of {len(everything)} samples are kept: {tmp_path / 'clean'}" in out


def marks_file(path: Path, *marks: dict[str, str]) -> Path:
    path.write_text("".join(f"{json.dumps(mark)}\n" for mark in marks))
    return path


@pytest.mark.parametrize("how", [("--drop", 0.4), ("--threshold", 0.5), ("--drop", 0), ("--drop", 1)])
def test_marks_decide_before_the_models(
    run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, how: tuple
) -> None:
    rows = run("out")
    monkeypatch.delattr(checkpoint.Encoder, "images")  # nothing is encoded again
    one_of_many = next(row for row in rows if row["key"] == "many")
    chosen = [(rows[0], "keep"), (rows[-1], "drop"), (one_of_many, "keep" if one_of_many["rank"] <= 22 else "drop")]
    names = ("key", "shard", "caption")
    marks = [{"mark": mark, **{name: row[name] for name in names}} for row, mark in chosen]
    path = marks_file(tmp_path / "marks.jsonl", *marks)
    assert run("out", "--write-clean", tmp_path / "clean", *how, "--marks", path) == rows
    value = how[1]
    judged = [row["probability"] >= 0.5 if how[0] == "--threshold" else row["rank"] > round(value * 45) for row in rows]
    expected = dict(zip((tuple(row[name] for name in names) for row in rows), judged, strict=True))
    expected |= {tuple(row[name] for name in names): mark == "keep" for row, mark in chosen}
    kept = set()
    for shard in {row["shard"] for row in rows}:
        for name, content in read_shard(tmp_path / "clean" / Path(shard).name):
            key, _, kind = name.rpartition(".")
            if key == "many" and kind == "json":
                kept |= {(key, shard, caption) for caption in json.loads(content)["captions"]}
            elif key != "many" and kind == "txt":
                kept.add((key, shard, content.decode()))
    assert kept == {names for names, stays in expected.items() if stays}
    facts = json.loads((tmp_path / "out/audit.json").read_text())
    keeps = sum(mark == "keep" for _, mark in chosen)
    assert (facts["marked_keep"], facts["marked_drop"]) == (keeps, 3 - keeps)
    assert f"By their marks, {keeps} pairs are kept and {3 - keeps} are dropped" in capsys.readouterr().out


def test_a_mark_of_a_key_alone_means_all_its_pairs(run: Callable, tmp_path: Path) -> None:
    path = marks_file(tmp_path / "marks.jsonl", {"mark": "drop", "key": "many"})
    # As an editor of Windows saves it.
    path.write_text(path.read_text(encoding="utf-8"), encoding="utf-8-sig")
    run("out", "--write-clean", tmp_path / "clean", "--drop", 0, "--marks", path)
    names = {name for shard in range(3) for name, _ in read_shard(tmp_path / f"clean/{shard}.tar")}
    assert not any(name.startswith("many") for name in names)
    assert {"00.png", "../../x.png"} <= names


DROP, KEEP = ('{"mark": "drop", "key": "00"}', '{"mark": "keep", "key": "00"}')


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "cannot be read: "),
        ("\xff", "cannot be read: "),
        ("00\n11\n", "line 1 is no mark like {"),
        (DROP + '\n\n{"mark": "Keep", "key": "11"}', "line 3 is no mark like {"),
        ('{"mark": "drop", "key": 7}', "line 1 is no mark like {"),
        ('{"mark": "drop", "key": "00", "caption": 7}', "line 1 is no mark like {"),
        (f"{DROP}\n{KEEP.replace('00', '0')}", "1 of 2 marks are of pairs that this audit does not have"),
        ("\n".join(DROP.replace("00", key) for key in "abcd"), "4 of 4 marks are of pairs that this audit "
         "does not have, with the keys 'a', 'b', 'c', ...; give the marks of its own gallery"),
        ('{"mark": "drop", "key": "00", "caption": "a cat"}', "1 of 1 marks are of pairs that this audit does not"),
        (f"{DROP}\n{KEEP}", "'00' is marked both keep and drop; remove one"),
        (DROP + '\n{"mark": "keep", "key": "00", "caption": "a dog"}', "'00' is marked both keep and drop; remove one"),
    ],
)  # fmt: skip
def test_bad_marks_get_one_line(
    run: Callable,
    run_checkpoint: Path,
    data: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    lines: str | None,
    message: str,
) -> None:
    run("out")
    capsys.readouterr()
    if lines is not None:
        (tmp_path / "marks.jsonl").write_bytes(lines.encode("latin-1"))
    words = ("--checkpoint", run_checkpoint, "--data", data, "--out", tmp_path / "out", "--window", 14, "--top", 4)
    words += ("--write-clean", tmp_path / "clean", "--drop", 0.4, "--marks", tmp_path / "marks.jsonl")
    assert audit(*words) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"openclip-otco audit: --marks {tmp_path / 'marks.jsonl'}: ")
    assert message in err
    assert (out, len(err.splitlines())) == ("", 1)
    assert not (tmp_path / "clean").exists()


def test_not_everything_is_dropped_unasked(
    run: Callable,
    run_checkpoint: Path,
    data: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    estimating(monkeypatch, 1.0)
    rows = run("out")
    words = ("--checkpoint", run_checkpoint, "--data", data, "--out", tmp_path / "out", "--window", 14)
    words += ("--batch-size", 5, "--top", 4, "--workers", 0, "--write-clean", tmp_path / "clean")
    assert audit(*words) == 2
    assert "--write-clean: to these models no pair seems right; give" in capsys.readouterr().err
    assert not (tmp_path / "clean").exists()
    # What was computed is kept.
    assert run("out", "--write-clean", tmp_path / "clean", "--drop", 0.4) == rows


def test_what_cannot_be_read_is_counted_and_dropped(run: Callable, tmp_path: Path) -> None:
    files = [("torn.jpg", b"\xff\xd8 no image"), ("torn.txt", b"a dog"), ("bare.png", picture(0)), ("bare.cls", b"1")]
    files += [("odd.png", picture(1)), ("odd.json", b'{"caption": "half \\ud800 a character"}')]
    files += [("bad.png", picture(2)), ("bad.txt", b"\xff\xfe"), ("none.txt", b"a cat")]
    files += [("line\nbreak.png", picture(3)), ("line\nbreak.txt", b"a boat")]
    write_shard(tmp_path / "odd.tar", files)
    rows = run("out", "--write-clean", tmp_path / "clean", "--drop", 0, of=str(tmp_path / "odd.tar"))
    assert {(row["key"], row["caption"]) for row in rows} == {("odd", "half ? a character"), ("line\nbreak", "a boat")}
    facts = json.loads((tmp_path / "out/audit.json").read_text())
    assert (facts["images"], facts["unreadable"], facts["captionless"]) == (6, 3, 1)
    assert (tmp_path / "clean/clean-keys.txt").read_text() == "odd\nline\\nbreak\n"
    assert read_shard(tmp_path / "clean/odd.tar") == [*files[4:6], *files[-2:]]


def test_csv_gives_what_shards_give(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, lines = [], ["filepath;title;extra"]
    for number in range(20):
        files += [(f"{number:02}.png", picture(number // 2)), (f"{number:02}.txt", f"a {WORDS[number % 7]}".encode())]
        (tmp_path / f"{number:02}.png").write_bytes(picture(number // 2))
        lines.append(f"{number:02}.png;a {WORDS[number % 7]};00{number}")
    write_shard(tmp_path / "20.tar", files)
    (tmp_path / "20.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("openclip_otco.audit.source._ROWS_AT_A_TIME", 3)
    words = ("--csv-separator", ";", "--write-clean", "clean", "--drop", 0.25)
    rows = run("csv", *words, of="20.csv")
    same = ("caption", "probability", "structure", "cosine", "best_caption", "rank")
    expected = [{name: row[name] for name in same} for row in run("tar", of=str(tmp_path / "20.tar"))]
    assert [{name: row[name] for name in same} for row in rows] == expected
    dropped = {row["key"] for row in rows[:5]}
    kept = [lines[0], *(line for line in lines[1:] if line.partition(";")[0] not in dropped)]
    assert (tmp_path / "clean/20.csv").read_text().splitlines() == kept


@pytest.mark.parametrize("lacks", ["sample", "shard"])
def test_clean_data_of_other_data_are_not_written(run: Callable, data: str, tmp_path: Path, lacks: str) -> None:
    run("out")
    source, parts = Shards(data), AuditFolder(tmp_path / "out").parts()
    if lacks == "sample":
        last = Path(source.names[2])
        write_shard(last, read_shard(last)[:-2])
    else:
        source = Shards(str(Path(source.names[0]).parent / "{0..1}.tar"))
    with pytest.raises(UserError, match=r"--data is not what was audited: sample \d+ of shard 2 is not where it was"):
        write_clean(source, parts, lambda row: True, tmp_path / "clean")
    assert not (tmp_path / "clean").exists()


def test_auroc_of_a_model_that_knows(run: Callable, data: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "truth.csv").write_text("key\n00\n11\n22\n../../x\n")
    rows = run("out", "--truth", tmp_path / "truth.csv")
    wrong = torch.tensor([row["key"] in ("00", "11", "22", "../../x") for row in rows])
    facts = json.loads((tmp_path / "out/audit.json").read_text())
    assert facts["wrong"] == 6
    names = ("probability", "structure", "log_density", "cosine")
    for name, column in zip((f"auroc_{name}" for name in names), ("rank", *names[1:]), strict=True):
        # Shifted into the range that torchmetrics takes for probabilities.
        scores = torch.tensor([row[column] for row in rows], dtype=torch.float64)
        scores = (scores - scores.min()) / (scores.max() - scores.min())
        assert facts[name] == pytest.approx(binary_auroc(scores, ~wrong).item(), abs=1e-6)
    assert f"| {facts['auroc_probability']:.4f} |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--drop", 0.1), "--drop: says what --write-clean DIR leaves out"),
        (("--threshold", 0.1), "--threshold: says what --write-clean DIR leaves out"),
        (("--marks", "marks.jsonl"), "--marks: says what --write-clean DIR leaves out"),
        (("--write-clean", "data", "--drop", 0.1), "is there and not empty"),
        (("--truth", "none.csv"), "--truth none.csv: cannot be read"),
        (("--truth", "other.csv"), "--truth other.csv: has no column `key`"),
        (("--truth", "head.csv"), "--truth head.csv: has no column `key`"),
        (("--truth", "empty.csv"), "--truth empty.csv: lists 0 of 45 pairs"),
        (("--data", "none.tar"), "--data none.tar: 1 of 1 shards do not exist"),
        (("--data", "torn.tar"), "--data torn.tar: torn.tar is no readable tar file"),
        (("--data", "pipe:cat torn.tar"), "--data: pipe:cat torn.tar is no readable tar file"),
        (("--data", "bare.tar"), "--data: no pairs of an image and a caption in 1 samples"),
        (("--data", "none.csv"), "--data none.csv: is no readable CSV file"),
        (("--data", "other.csv", "--caption-lines"), "--caption-lines: is for shards, and other.csv is a table"),
        (("--data", "{0..", "--top", 3), "--data {0..: cannot be expanded"),
        (("--data", "other.csv"), "--csv-img-key filepath: other.csv has no such column, but keys, other"),
        (
            ("--data", "keyed.csv", "--csv-separator", "\\t", "--write-clean", "DIR"),
            "--csv-separator \\t: --write-clean needs a single character; for a tab, leave it out",
        ),
        (("--data", "data/0.tar::data/0.tar", "--write-clean", "DIR", "--drop", 0.1), "2 shards are named 0.tar"),
        (("--checkpoint", "none.pt"), "--checkpoint none.pt: no such file"),
        (("--ranks", 4), "--ranks 4: there are 3 shards; give at most as many ranks"),
        (("--ranks", 2, "--rank", 2), "--rank 2: must be below --ranks 2"),
        (("--data", "keyed.csv", "--ranks", 2), "--ranks 2: is for shards, and keyed.csv is a table"),
        (("--towers", "RN10"), "--towers RN10: cannot be loaded: there is no such model (give"),
        (("--towers", "resnet10+bert"), "--towers resnet10+bert: cannot be loaded: "),
    ],
)
def test_bad_input_gets_one_line(
    run_checkpoint: Path,
    data: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "torn.tar").write_bytes(Path(samples.shards(data)[0]).read_bytes()[:700])
    (tmp_path / "other.csv").write_text("keys\tother\n1\t2\n")
    (tmp_path / "keyed.csv").write_text("filepath\ttitle\n1\t2\n")
    (tmp_path / "head.csv").write_text("keys,other\n")
    (tmp_path / "empty.csv").write_text("key\nstranger\n")
    write_shard(tmp_path / "bare.tar", [("0.png", picture(0))])
    given = ("--checkpoint", run_checkpoint, "--data", data, "--out", "out", "--workers", 0)
    assert audit(*given, *words) == 2
    out, err = capsys.readouterr()
    assert message in err
    # The bar aside.
    assert len(err.strip().split("\r")[-1].splitlines()) == 1
    assert out == ""


FULL = OSError(errno.ENOSPC, "no space")


@pytest.mark.parametrize(
    ("place", "error", "message"),
    [
        ("source.shard_samples", FULL, "--data: cannot be read: [Errno 28] no space"),
        ("table.write", FULL, "--out out: cannot be used: [Errno 28] no space"),
        ("table.metadata", FULL, "--out out: cannot be used: [Errno 28] no space"),
        ("report.write_text", FULL, "--out out: cannot be used: [Errno 28] no space"),
        ("table.Ranking.write", duckdb.IOException("IO Error: no space\nHint"),
         "--out out: cannot be used: IO Error: no space"),
        ("table.Ranking.first", duckdb.OutOfMemoryException("Out of Memory Error: failed to allocate"),
         "--out out: cannot be used: Out of Memory Error: failed to allocate"),
    ],
)  # fmt: skip
def test_an_error_of_the_disk_names_what_was_read_or_written(
    run_checkpoint: Path,
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    place: str,
    error: Exception,
    message: str,
) -> None:
    def fail(*given: object, **named: object) -> None:
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(f"openclip_otco.audit.{place}", fail)
    assert audit("--checkpoint", run_checkpoint, "--data", data, "--out", "out", "--workers", 0) == 2
    assert capsys.readouterr().err.strip().split("\r")[-1].splitlines()[-1] == f"openclip-otco audit: {message}"


def test_a_shard_that_is_gone_is_no_error_of_the_clean_data(run: Callable, data: str, tmp_path: Path) -> None:
    run("out")
    source, parts = Shards(data), AuditFolder(tmp_path / "out").parts()
    gone = Path(source.names[1])
    gone.unlink()
    with pytest.raises(UserError, match=re.escape(f"--data: {gone} cannot be read: No such file")):
        write_clean(source, parts, lambda row: True, tmp_path / "clean")
    with pytest.raises(UserError, match=re.escape(f"--data: {gone} cannot be read: No such file")):
        source.fingerprint()


def test_somebody_has_to_judge(data: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert audit("--data", data, "--out", tmp_path / "out") == 2
    assert "--towers: name the models that judge the pairs" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_plan_that_does_not_converge(
    run_checkpoint: Path, data: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openclip_otco.method.solver._WORST_ERROR", -1.0)
    words = ("--checkpoint", run_checkpoint, "--data", data, "--out", tmp_path / "out", "--epsilon", 0.05)
    assert audit(*words) == 2
    assert "--epsilon 0.05: Sinkhorn is still" in capsys.readouterr().err


def test_a_folder_in_use(run: Callable, run_checkpoint: Path, data: str, tmp_path: Path) -> None:
    run("out")
    folder = AuditFolder(tmp_path / "out")
    settings = json.loads((tmp_path / "out/state.json").read_text())
    settings.pop("version")
    with (
        folder.opened(settings),
        pytest.raises(UserError, match="another audit is at work in it"),
        AuditFolder(tmp_path / "out").opened(settings),
    ):
        pass


@pytest.mark.parametrize("flag", ["--epsilon", "--threshold", "--drop"])
@pytest.mark.parametrize("value", ["inf", "nan", "-1"])
def test_numbers_that_are_none_end_with_one_line(flag: str, value: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        audit("--checkpoint", "c", "--data", "d", "--out", "o", f"{flag}={value}")
    assert ended.value.code == 2
    assert f"argument {flag}: " in capsys.readouterr().err.splitlines()[-1]
