"""`inspect`: its numbers against references, a run's files in any state, and the page in a browser."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import ot as pot
import pytest
import torch
import torch.nn.functional as F
from commands import command
from conftest import paired_features
from hypothesis import given, settings
from hypothesis import strategies as st
from page_fixtures import HOSTILE, every_picture_is_there, jpeg
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from openclip_otco import FeatureWindow, OTCOLoss, PlanCache, PlanCacheCallback, PlanSolver
from openclip_otco.inspect.history import read_history
from openclip_otco.inspect.negatives import evenly_by_confidence, hardest_negatives, heat_map_pairs
from openclip_otco.inspect.saved import newest_checkpoint
from openclip_otco.inspect.views import compare_views
from openclip_otco.method.support import own_shares, row_shares, support_confidence
from openclip_otco.models.registry import prepare_model, register_models
from openclip_otco.scenes.shards import Settings, write_scenes
from openclip_otco.train.figures import add_figures, relative_brightness
from openclip_otco.train.plan_log import PlanLog

MODEL, WIDTH = "RN10t-bert-tiny", 256
PARAMS = {"batch_size": 16, "accum_freq": 1, "world_size": 1}


# --- the numbers ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan():
    return PlanSolver(epsilon=0.1, tolerance=1e-6).solve(*paired_features(60))


@pytest.fixture(scope="module")
def dense(plan):
    cost = (1 - plan.image_features.double() @ plan.text_features.double().T).numpy()
    uniform = [1 / 60] * 60
    return pot.sinkhorn(uniform, uniform, cost, 0.1, method="sinkhorn_log", stopThr=1e-12, numItermax=20_000)


def test_shares_are_those_of_pot(plan, dense):
    rows, columns = torch.tensor([3, 50, 7]), torch.tensor([7, 0, 59, 3])
    expected = dense[rows][:, columns] * 60
    assert row_shares(plan, rows, columns).numpy() == pytest.approx(expected, rel=1e-3, abs=1e-9)
    assert own_shares(plan).numpy() == pytest.approx(dense.diagonal() * 60, rel=1e-3, abs=1e-9)
    by_row, by_column = dense / dense.sum(1, keepdims=True), dense / dense.sum(0)
    expected = by_row.diagonal() * by_column.diagonal()
    assert support_confidence(plan).numpy() == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_hardest_negatives_are_those_of_the_dense_plan(plan, dense):
    off = dense.copy()
    np.fill_diagonal(off, -1)
    for sample in hardest_negatives(plan, [4, 31], 5):
        i = sample.index
        assert [negative.index for negative in sample.texts] == np.argsort(-off[i])[:5].tolist()
        assert [negative.index for negative in sample.images] == np.argsort(-off[:, i])[:5].tolist()
        assert sample.texts[0].share == pytest.approx(60 * off[i].max(), rel=1e-3)
        j = sample.images[0].index
        assert sample.images[0].cosine == pytest.approx(float(plan.image_features[j] @ plan.text_features[i]), abs=1e-6)
        assert sample.share == pytest.approx(60 * dense[i, i], rel=1e-3)


def test_all_other_pairs_of_a_small_plan_are_negatives(plan):
    small = PlanSolver().solve(*paired_features(3))
    found = hardest_negatives(small, evenly_by_confidence(small, 6), 4)
    assert len(found) == 3
    assert all(len(sample.texts) == len(sample.images) == 2 for sample in found)


def test_samples_run_from_the_least_to_the_most_confident(plan):
    chosen = evenly_by_confidence(plan, 6)
    trust = support_confidence(plan)
    assert trust[chosen].tolist() == sorted(trust[chosen].tolist())
    assert trust[chosen[0]] == trust.min()
    assert trust[chosen[-1]] == trust.max()
    assert len(set(chosen)) == 6


def test_the_heat_map_has_every_sample_and_no_pair_twice(plan):
    found = hardest_negatives(plan, evenly_by_confidence(plan, 6), 4)
    block = heat_map_pairs(found, 24)
    assert len(block) == len(set(block)) <= 24
    near = {negative.index for sample in found for negative in (*sample.texts, *sample.images)}
    assert {sample.index for sample in found} <= set(block) <= near | {sample.index for sample in found}
    assert block[0] == found[0].index


def test_views_are_compared_plan_by_plan():
    plans = [PlanSolver(epsilon=0.1).solve(*paired_features(40, seed=seed), step=seed) for seed in (0, 1, 1)]
    v, t = paired_features(10, seed=9)
    views = compare_views(plans, v, t)
    assert views is not None
    expected = torch.zeros(3, 3, 10)
    for a, first in enumerate(plans):
        for b, second in enumerate(plans):
            expected[a, b] += F.cosine_similarity(first.transport_image(v, t), second.transport_image(v, t)) / 2
            expected[a, b] += F.cosine_similarity(first.transport_text(t, v), second.transport_text(t, v)) / 2
    assert torch.allclose(views.between_plans, expected.mean(dim=2), atol=1e-5)
    assert torch.allclose(views.per_sample, (expected.sum(dim=(0, 1)) - 3) / 6, atol=1e-5)
    assert views.between_plans[1, 2] == pytest.approx(1, abs=1e-5)  # the same plan twice
    assert views.between_plans[0, 1] < 0.999
    assert compare_views(plans[:1], v, t) is None


def test_brightness_is_logarithmic():
    assert relative_brightness(np.array([1.0, 0.01, 1e-4, 0.0])).tolist() == [1.0, 0.5, 0.0, 0.0]


# --- TensorBoard ---------------------------------------------------------------------------------------------------


def trained(steps: int, writer, coupling: str = "transport", log_every: int = 100) -> PlanCacheCallback:
    """A callback after so many steps of a window of two."""
    loss = OTCOLoss(confidence=1.0)
    solver = PlanSolver(coupling=coupling)
    callback = PlanCacheCallback(
        loss.exchange, FeatureWindow(2), PlanCache(3), solver, warmup=0, log=PlanLog(log_every)
    )
    callback.on_train_start(step=0, total_steps=steps)
    for step in range(steps):
        v, t = paired_features(16, seed=step)
        losses = loss(v, t, torch.tensor(10.0), output_dict=True)
        callback.on_step_end(step=step, epoch=0, losses=losses, writer=writer)
    return callback


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), {"images": 0, "histograms": 0, "scalars": 0})
    found.Reload()
    return found


def test_figures_reach_tensorboard_at_the_log_s_pace(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        callback = trained(12, writer, log_every=4)
    found = events(tmp_path)
    assert [event.step for event in found.Scalars("train/otco_objective")] == [1, 3, 5, 7, 9, 11]
    assert [event.value for event in found.Scalars("train/otco_cache_age")] == [0, 2, 4, 4, 4, 4]
    histograms = found.Histograms("train/otco_confidence")
    assert [event.step for event in histograms] == [1, 5, 9]
    assert histograms[-1].histogram_value.num == 32
    expected = support_confidence(callback.cache[9]).sum().item()
    assert histograms[-1].histogram_value.sum == pytest.approx(expected, rel=1e-5)
    picture = found.Images("train/otco_plan_block")[-1]
    assert (picture.step, picture.width, picture.height) == (9, 128, 128)


def test_the_picture_is_the_plan(plan):
    pictures = {}

    class Writer:
        def add_histogram(self, tag, values, global_step): ...

        def add_image(self, tag, img_tensor, global_step, dataformats):
            pictures[tag] = img_tensor

    add_figures(Writer(), plan)
    brightness = pictures["train/otco_plan_block"][::4, ::4].sum(axis=2)
    shares = row_shares(plan, torch.arange(60), torch.arange(60)).numpy()
    seen = shares > 1e-3
    assert np.corrcoef(brightness[seen], np.log(shares[seen]))[0, 1] > 0.9


def test_a_plan_that_does_not_couple_has_no_figures(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        trained(4, writer, coupling="softmax")
    tags = events(tmp_path).Tags()
    assert "train/otco_seconds" in tags["scalars"]
    assert tags["images"] == tags["histograms"] == []


def test_figures_that_fail_do_not_end_training(caplog):
    class Writer:
        def add_scalar(self, tag, scalar_value, global_step): ...

        def add_histogram(self, tag, values, global_step):
            raise OSError(28, "No space left on device")

    with caplog.at_level(logging.WARNING):
        callback = trained(8, Writer(), log_every=4)
    assert (callback.made, callback.skipped) == (4, 0)
    assert [record.message for record in caplog.records] == [
        f"OTCO plan at step {step}: no figures. OSError: [Errno 28] No space left on device" for step in (1, 5)
    ]


# --- what a run has left so far --------------------------------------------------------------------------------------


LOG = """\
2026-01-01,00:00:00 | INFO | Running with a single process. Device cpu.
2026-01-01,00:00:01 | INFO | Train Epoch: 0 [ 16/160 (10%)] Data (t): 0.4 Batch (t): 3.2, 39.5/s, 39.5/s/gpu LR: 0.000017 Logit Scale: 14.286 Contrastive_loss: 4.9208 (4.9208) Loss: 4.9208 (4.9208)
2026-01-01,00:00:02 | INFO | OTCO Plan: 1 (step 7, N 1024) Additive Error: 0.003788 Iterations: 1 Marginal Error: 3.848e-05 Objective: 0.9492 Own Pair Mass: 0.0009771 Seconds: 0.07788 Cache Age: 0 Skipped: 0
2026-01-01,00:00:03 | INFO | Train Epoch: 1 [ 32/160 (20%)] Data (t): 0.4 Batch (t): 3.2, 39.5/s, 39.5/s/gpu LR: 0.000017 Logit Scale: 14.286 Contrastive_loss: nan (4.5) Loss: 4.25 (4.5)
"""  # noqa: E501


def test_a_log_is_read(tmp_path):
    (tmp_path / "out.log").write_text(LOG)
    (tmp_path / "checkpoints").mkdir()
    recalls = {f"{way}_R@{k}": 0.5 for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    lines = [json.dumps({**recalls, "epoch": 1}), '{"epoch": 2}', '{"image_to_text_R@1": 0.']
    (tmp_path / "checkpoints" / "results.jsonl").write_text("\n".join(lines))
    history = read_history(tmp_path, PARAMS)
    assert history.losses["loss"] == {0: 4.9208, 11: 4.25}
    assert math.isnan(history.losses["contrastive_loss"][11])
    assert history.plans == {
        "additive_error": {7: 0.003788}, "iterations": {7: 1}, "marginal_error": {7: 3.848e-05},
        "objective": {7: 0.9492}, "own_pair_mass": {7: 0.0009771}, "seconds": {7: 0.07788}, "cache_age": {7: 0},
        "skipped": {7: 0},
    }  # fmt: skip
    assert history.rsum == {1: pytest.approx(300)}
    assert history.sources == ["out.log"]


def test_losses_without_the_batch_size_are_left_out(tmp_path):
    (tmp_path / "out.log").write_text(LOG)
    history = read_history(tmp_path, {})
    assert history.losses == {}
    assert history.plans["objective"] == {7: 0.9492}


@settings(max_examples=100, deadline=None)
@given(cut=st.integers(0, len(LOG)))
def test_a_log_cut_anywhere_gives_no_number_that_was_not_logged(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("cut")
    (folder / "out.log").write_text(LOG)
    whole = read_history(folder, PARAMS)
    (folder / "out.log").write_text(LOG[:cut])
    history = read_history(folder, PARAMS)
    for found, all_of_it in ((history.plans, whole.plans), (history.losses, whole.losses)):
        for name, curve in found.items():
            assert {step: repr(value) for step, value in curve.items()}.items() <= {
                step: repr(value) for step, value in all_of_it[name].items()
            }.items()


def test_events_come_first_and_may_be_cut_anywhere(tmp_path):
    (tmp_path / "out.log").write_text(LOG)
    folder = tmp_path / "tensorboard"
    with SummaryWriter(str(folder)) as writer:
        for step in range(20):
            writer.add_scalar("train/otco_objective", step / 4, step)
            writer.add_scalar("train/loss", 8 - step / 4, step)
            writer.add_scalar("val/loss", 1.0, step)
    history = read_history(tmp_path, PARAMS)
    assert history.plans == {"objective": {step: step / 4 for step in range(20)}}
    assert history.losses == {"loss": {step: 8 - step / 4 for step in range(20)}}
    assert history.sources == ["TensorBoard's events"]
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    for cut in (0, 5, 40, len(whole) // 2, len(whole) - 3):
        file.write_bytes(whole[:cut])
        curve = read_history(tmp_path, PARAMS).losses["loss"]
        # The log steps in where there is nothing.
        assert curve == {0: 4.9208, 11: 4.25} or curve.items() <= history.losses["loss"].items()
    torn = bytearray(whole)
    torn[len(whole) // 2] ^= 0xFF
    file.write_bytes(bytes(torn))
    assert len(read_history(tmp_path, PARAMS).losses["loss"]) >= 5


def state(plans: int, width: int = WIDTH) -> dict:
    """What the callback puts into a checkpoint."""
    cache = PlanCache(4)
    for step in range(plans):
        cache.add(PlanSolver().solve(*paired_features(48, d=width, seed=step), step=8 * step + 7))
    callback = PlanCacheCallback(OTCOLoss().exchange, FeatureWindow(8), cache, PlanSolver())
    callback.made, callback.skipped = plans, 1
    return {"otco": callback.on_save_checkpoint()}


def test_the_newest_readable_checkpoint_counts(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    assert newest_checkpoint(tmp_path) is None
    weights = {"state_dict": {"w": torch.zeros(2)}}
    torch.save({"epoch": 1, **weights, "plugins": state(2)}, folder / "epoch_1.pt")
    torch.save({"epoch": 2, **weights}, folder / "epoch_2.pt")
    for age, name in enumerate(("epoch_2.pt", "epoch_1.pt")):
        os.utime(folder / name, (1000 - age, 1000 - age))
    saved = newest_checkpoint(tmp_path)
    assert saved is not None
    assert (saved.checkpoint.name, saved.epoch, saved.plans) == ("epoch_2.pt", 2, ())
    whole = (folder / "epoch_1.pt").read_bytes()
    for cut in (0, 100, len(whole) // 2, len(whole) - 20):
        (folder / "epoch_3.pt").write_bytes(whole[:cut])
        (folder / "epoch_2.pt").unlink(missing_ok=True)
        saved = newest_checkpoint(tmp_path)
        assert saved is not None
        assert (saved.checkpoint.name, saved.made, saved.skipped) == ("epoch_1.pt", 2, 1)
        assert [plan.step for plan in saved.plans] == [7, 15]


def test_a_broken_plan_leaves_out_only_the_plans(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    broken = state(2)
    broken["otco"]["cache"]["plans"][0]["f"][0] = torch.nan
    torch.save({"epoch": 4, "plugins": broken}, tmp_path / "checkpoints" / "epoch_4.pt")
    saved = newest_checkpoint(tmp_path)
    assert saved is not None
    assert (saved.epoch, saved.plans) == (4, ())


# --- the page --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run as OpenCLIP leaves it: params, log, events, a checkpoint with plans, and the shards beside it."""
    import open_clip

    home = tmp_path_factory.mktemp("finished")
    write_scenes(home / "data", Settings(train=60, val=8, mismatch=0.4, shards=2))
    run = home / "runs" / "first"
    (run / "checkpoints").mkdir(parents=True)
    register_models()
    prepare_model(MODEL)
    torch.manual_seed(0)
    model = open_clip.create_model(MODEL, pretrained_text=False)
    content = {"epoch": 2, "name": "first", "state_dict": model.state_dict(), "plugins": state(3)}
    torch.save(content, run / "checkpoints" / "epoch_2.pt")
    shards = f"{home}/data/train/{{0000..0001}}.tar"
    params = {**PARAMS, "epochs": 3, "model": MODEL, "loss": "otco", "name": "first", "train_data": shards}
    (run / "params.txt").write_text("".join(f"{name}: {value}\n" for name, value in sorted(params.items())))
    (run / "out.log").write_text(LOG)
    with SummaryWriter(str(run / "tensorboard")) as writer:
        trained(20, writer)
    return run


def inspect(run: Path, *words: str) -> int:
    return command("inspect", run, "--workers", "0", *words)


@pytest.fixture(scope="module")
def inspected(finished, tmp_path_factory) -> Path:
    page = tmp_path_factory.mktemp("page") / "inspect.html"
    assert inspect(finished, "--out", str(page), "--samples", "3", "--negatives", "2") == 0
    return page


def test_the_page_is_beside_the_run(finished, capsys):
    assert inspect(finished, "--pairs", "8") == 0
    assert capsys.readouterr().out.splitlines() == [str(finished / "inspect.html")]
    (finished / "inspect.html").unlink()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_in_a_browser(inspected, visit, theme):
    page = visit(inspected, theme)
    assert page.title() == "Run first"
    # Three samples with two negatives each way.
    assert every_picture_is_there(page) == 3 + 3 * 2 * 2
    headings = page.locator(".chart h3").all_inner_texts()
    assert headings == [
        "Loss", "Plan objective", "Entropy", "Own-pair mass", "Drift", "Cache age", "Solver time", "Solver iterations",
        "Effective share",
    ]  # fmt: skip
    assert "Not recorded by this run: validation rsum" in page.locator("main").inner_text()
    pairs = page.locator(".block image").count()
    assert 3 <= pairs <= 24
    assert page.locator(".block figcaption svg rect").count() == 9
    assert page.locator(".block > svg rect").count() == pairs**2
    assert page.locator(".views > svg rect").count() == 9
    assert "2 of 3" in page.locator(".facts").first.inner_text()
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(246, 246, 243)" if theme == "light" else "rgb(20, 22, 26)")
    assert page.evaluate("[...document.querySelectorAll('[role=img]')].every(e => e.getAttribute('aria-label'))")
    assert page.evaluate("[...document.images].every(image => image.alt)")


def test_charts_are_read_by_keyboard_and_pointer(inspected, visit, finished):
    page = visit(inspected)
    curve = read_history(finished, PARAMS).plans["objective"]
    chart = page.locator(".chart", has_text="Plan objective")
    svg, value, at = chart.locator("svg"), chart.locator("output"), chart.locator(".at")
    svg.focus()
    svg.press("Home")
    assert (at.inner_text(), float(value.inner_text())) == ("step 1", pytest.approx(curve[1], rel=1e-3))
    svg.press("ArrowRight")
    assert (at.inner_text(), float(value.inner_text())) == ("step 3", pytest.approx(curve[3], rel=1e-3))
    svg.press("End")
    assert at.inner_text() == "step 19"
    svg.hover(position={"x": 20, "y": 50})
    assert at.inner_text() == "step 1"
    assert svg.locator(".cursor").get_attribute("visibility") == "visible"


def test_captions_in_shards_are_text(finished, tmp_path, visit):
    path = tmp_path / "0000.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(12):
            caption = HOSTILE[number % len(HOSTILE)].encode("utf-8", "replace")
            for kind, content in (("jpg", jpeg((20 * number, 90, 90))), ("txt", caption)):
                member = tarfile.TarInfo(f"<b>{number}.{kind}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    out = tmp_path / "page.html"
    assert inspect(finished, "--data", str(path), "--out", str(out)) == 0
    page = visit(out)
    assert every_picture_is_there(page) > 20
    assert page.locator("script").count() == 1
    assert page.locator("main b").count() == 0
    assert any(caption in page.locator("main").inner_text() for caption in HOSTILE[:2])
    assert "alert(" in page.locator(".sample").first.inner_text()


def run_without(finished: Path, folder: Path, *names: str) -> Path:
    """A copy of the run without some of its files."""
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns(*names, "inspect.html"))
    return folder


def test_without_shards_the_page_shows_the_cached_plan_and_how_to_get_pictures(finished, tmp_path, capsys):
    run = run_without(finished, tmp_path / "run")
    params = (run / "params.txt").read_text().replace("/data/train/", "/gone/")
    (run / "params.txt").write_text(params)
    assert inspect(run) == 0
    text = (run / "inspect.html").read_text()
    assert "No pictures: --data" in text
    assert "do not exist" in text
    assert "name them by --data" in text
    assert "the newest cached plan, of step 23, which couples 48 pairs" in text
    assert "<img" not in text
    assert 'class="diagonal"' in text
    assert "How much the cached plans differ" in text


@pytest.mark.parametrize(
    ("absent", "there"),
    [
        (("checkpoints",), "There is no checkpoint yet"),
        (("tensorboard",), "From out.log"),
        (("tensorboard", "out.log", "checkpoints"), "Nothing is recorded yet"),
        (("params.txt",), "No pictures: The run was not trained on webdataset shards"),
    ],
)
def test_the_page_names_what_is_missing_and_shows_the_rest(finished, tmp_path, absent, there):
    run = run_without(finished, tmp_path / "run", *absent)
    assert inspect(run, "--pairs", "8") == 0
    assert there in (run / "inspect.html").read_text()


def test_a_run_that_is_being_written(finished, tmp_path):
    """Every file is cut at half of its length."""
    run = run_without(finished, tmp_path / "run")
    for file in [path for path in run.rglob("*") if path.is_file()]:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert inspect(run) == 0
    assert "There is no checkpoint yet" in (run / "inspect.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--data", "nowhere/{0000..0003}.tar"), "4 of 4 shards do not exist, first nowhere/0000.tar"),
        (("--out", "/proc/inspect.html"), "--out /proc/inspect.html: cannot be written"),
    ],
)
def test_flags_that_name_what_is_not_there_are_one_line(finished, capsys, words, message):
    assert inspect(finished, "--pairs", "4", *words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("openclip-otco inspect: ")]
    assert message in line


def test_a_folder_without_a_run_is_one_line(tmp_path, capsys):
    assert inspect(tmp_path) == 2
    assert "no run of OpenCLIP: name the folder that holds its params.txt" in capsys.readouterr().err


# --- a run from a stranger -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["pipe:touch {trap}", "{own}::pipe:touch {trap}", "file:{trap}"])
def test_no_command_and_no_url_of_a_run_is_opened(finished, tmp_path, source):
    run, trap = run_without(finished, tmp_path / "run"), tmp_path / "trap"
    own = finished.parent.parent / "data/train/0000.tar"
    params = [line for line in (run / "params.txt").read_text().splitlines() if not line.startswith("train_data")]
    (run / "params.txt").write_text("\n".join([*params, f"train_data: {source.format(own=own, trap=trap)}", ""]))
    assert inspect(run, "--pairs", "4") == 0
    assert "is no local file. Name shards to show by --data" in (run / "inspect.html").read_text()
    assert not trap.exists()
    # On the command line a user may well give one.
    assert inspect(run, "--pairs", "4", "--data", f"pipe:touch {trap}; cat {own}") == 0
    assert trap.exists()


def test_a_link_in_a_run_s_folder_leads_nowhere(finished, tmp_path):
    run, precious = run_without(finished, tmp_path / "run"), tmp_path / "precious"
    precious.write_text("precious")
    for name in ("inspect.html", "inspect.html.part"):
        (run / name).symlink_to(precious)
    assert inspect(run, "--pairs", "4") == 0
    assert precious.read_text() == "precious"
    assert "<html" in (run / "inspect.html").read_text()


@pytest.mark.parametrize(
    "line",
    [
        "model: hf-hub:a-stranger/model",
        "model: (" + 5000 * "(",
        "model: \udcff\udcfe",
        "image_mean: 'no numbers'",
        "force_image_size: [[]]",
        "precision: [1]",
        "device: {}",
        "train_data: {0..",
        "train_data: 7",
        "otco_epsilon: nan",
        "batch_size: -1",
        "epochs: []",
    ],
)
def test_senseless_params_leave_out_only_what_needs_them(finished, tmp_path, line):
    run = run_without(finished, tmp_path / "run")
    name = line.partition(":")[0]
    params = [old for old in (run / "params.txt").read_text().splitlines() if not old.startswith(f"{name}:")]
    (run / "params.txt").write_bytes("\n".join([*params, line, ""]).encode("utf-8", "surrogateescape"))
    assert inspect(run, "--pairs", "4") == 0
    text = (run / "inspect.html").read_text()
    assert 'class="diagonal"' in text
