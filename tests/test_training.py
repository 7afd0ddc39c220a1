"""OTCO through OpenCLIP's own training script."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hook_fixtures import Lab, Run, assert_equal

from openclip_otco.inspect.history import read_history
from openclip_otco.runs.checkpoint import params as read_params

OTCO = "otco = openclip_otco.train.plugin:OTCOPlugin"
FEW_STEPS = ("--otco-window", "3", "--otco-warmup", "0", "--otco-transport-weight", "0.5", "--otco-confidence", "0.5")


@pytest.fixture(scope="module")
def otco(lab: Lab, patched: Path) -> Run:
    """50 steps with plans at work, validated."""
    data = ("--train-data", str(lab.folder / "large.csv"), "--val-data", str(lab.folder / "small.csv"))
    return lab.start("otco", patched, OTCO, "--loss", "otco", *data, *FEW_STEPS, "--report-to", "tensorboard").wait()


@pytest.mark.training
def test_with_everything_off_it_is_clip_to_the_bit(lab: Lab, patched: Path) -> None:
    data = ("--train-data", str(lab.folder / "large.csv"))
    off = ("--loss", "otco", "--otco-confidence", "0", "--otco-negatives", "none", "--otco-window", "4")
    runs = lab.start("clip", patched, OTCO, *data), lab.start("off", patched, OTCO, *off, *data)
    clip, ours = (run.wait() for run in runs)
    assert len(clip.steps) == 50
    assert ours.steps == clip.steps
    plugins = ours.checkpoint(1)
    assert plugins.pop("plugins")["otco"]["made"] == 12
    assert_equal(plugins, clip.checkpoint(1))


@pytest.mark.training
def test_plans_are_made_logged_and_saved(otco: Run) -> None:
    assert "Loss: otco (plugin otco)" in otco.output
    assert re.search(r"OTCO Plan: 1 \(step 2, N 24\) Additive Error: 0\.\S+ Iterations: ", otco.output)
    assert "OTCO Plans: 16 made, 0 skipped" in otco.output
    assert "Transport_loss: " in otco.steps[-1]
    assert "Transport_loss: " not in otco.steps[0]
    state = otco.checkpoint(1)["plugins"]["otco"]
    assert [plan["step"] for plan in state["cache"]["plans"]] == [38, 41, 44, 47]
    assert len(state["window"]["batches"]) == 2
    assert json.loads((otco.folder / "checkpoints" / "results.jsonl").read_text())["epoch"] == 1


@pytest.mark.training
def test_plans_reach_tensorboard_on_open_clips_step_axis(otco: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(otco.folder / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/otco_objective", "train/otco_drift_text", "train/otco_seconds"} <= tags
    assert [event.step for event in events.Scalars("train/otco_own_pair_mass")] == list(range(2, 50, 3))
    assert "train/otco_confidence" in events.Tags()["histograms"]
    assert "train/otco_plan_block" in events.Tags()["images"]


@pytest.mark.training
def test_the_log_tells_the_same_history_as_tensorboard(otco: Run, tmp_path: Path) -> None:
    """What `inspect` reads of a run whose events are gone: the same steps and, as far as they are logged, values."""
    params = read_params(otco.folder / "checkpoints" / "epoch_1.pt")
    events = read_history(otco.folder, params)
    shutil.copy(otco.folder / "out.log", tmp_path)
    log = read_history(tmp_path, params)
    assert (events.sources, log.sources) == (["TensorBoard's events"], ["out.log"])
    assert log.losses.keys() == events.losses.keys() == {"loss", "contrastive_loss", "transport_loss"}
    assert log.plans.keys() >= {"objective", "entropy", "own_pair_mass", "drift_image", "cache_age", "seconds"}
    for mine, theirs in ((log.losses, events.losses), (log.plans, events.plans)):
        for name, curve in mine.items():
            assert curve, name
            assert curve == {step: pytest.approx(theirs[name][step], rel=2e-3, abs=1e-4) for step in curve}


@pytest.mark.training
def test_resumes_into_and_out_of_otco(lab: Lab, patched: Path, otco: Run) -> None:
    file = str(otco.folder / "checkpoints" / "epoch_1.pt")
    data = ("--train-data", str(lab.folder / "large.csv"), "--epochs", "2", "--resume", file)
    runs = (
        lab.start("again", patched, OTCO, "--loss", "otco", *FEW_STEPS, *data),
        lab.start("to-clip", patched, OTCO, *data),
    )
    again, to_clip = (run.wait() for run in runs)
    assert "=> resuming OTCO with 4 cached plans (steps [38, 41, 44, 47])" in again.output
    # Two steps of the window came with the checkpoint: the next plan is due after one more.
    assert [plan["step"] for plan in again.checkpoint(2)["plugins"]["otco"]["cache"]["plans"]] == [89, 92, 95, 98]
    assert len(to_clip.steps) == 50
    assert "plugins" not in to_clip.checkpoint(2)


@pytest.mark.training
def test_an_accumulated_step_enters_the_window_once(lab: Lab, patched: Path) -> None:
    options = ("--loss", "otco", *FEW_STEPS, "--accum-freq", "2", "--otco-window", "1")
    run = lab.start("otco-accum", patched, OTCO, *options).wait()
    state = run.checkpoint(1)["plugins"]["otco"]
    assert state["made"] == 2  # 32 samples: two steps of two batches of 8
    assert all(plan["image_features"].shape == (16, 16) for plan in state["cache"]["plans"])


# Two ranks, enough pairs a window to be shared out, and no random crops: OpenCLIP does not restore their generator.
TWO_RANKS = (
    "--loss", "otco", *FEW_STEPS, "--local-loss", "--gather-with-grad", "--otco-window", "8", "--epochs", "2",
    "--aug-cfg", "scale=(1.0, 1.0)", "ratio=(1.0, 1.0)",
)  # fmt: skip


@pytest.fixture(scope="module")
def two_ranks(lab: Lab, patched: Path) -> Run:
    data = ("--train-data", str(lab.folder / "large.csv"), "--debug")
    return lab.start("otco-ranks", patched, OTCO, *TWO_RANKS, *data, ranks=2, torchrun=True).wait()


@pytest.mark.training
def test_two_ranks_hold_the_same_plans_and_train(two_ranks: Run) -> None:
    assert "OTCO Plans: 6 made, 0 skipped" in two_ranks.output
    plan = two_ranks.checkpoint(2)["plugins"]["otco"]["cache"]["plans"][-1]
    assert plan["image_features"].shape == (128, 16)  # both ranks' batches of 8 in 8 steps
    digests = re.findall(r"digest (\w+) at step (\d+) on rank (\d)", two_ranks.output)
    assert len(digests) == 12
    by_rank = [{step: digest for digest, step, rank in digests if rank == which} for which in "01"]
    assert by_rank[0] == by_rank[1]
    assert len(set(by_rank[0].values())) == 6


@pytest.mark.training
def test_a_resumed_run_ends_as_one_that_was_not_stopped(lab: Lab, patched: Path, two_ranks: Run) -> None:
    """To the bit: plans, weights, optimizer and losses. The window was half full when the run stopped."""
    file = str(two_ranks.folder / "checkpoints" / "epoch_1.pt")
    data = ("--train-data", str(lab.folder / "large.csv"), "--resume", file)
    resumed = lab.start("otco-ranks-resumed", patched, OTCO, *TWO_RANKS, *data, ranks=2).wait()
    assert len(two_ranks.checkpoint(1)["plugins"]["otco"]["window"]["batches"]) == 1
    assert resumed.steps == two_ranks.steps[25:]
    ours, straight = resumed.checkpoint(2), two_ranks.checkpoint(2)
    for checkpoint in (ours, straight):
        for plan in checkpoint["plugins"]["otco"]["cache"]["plans"]:
            assert plan["diagnostics"].pop("seconds") > 0
        checkpoint.pop("name")
    assert_equal(ours, straight)


@pytest.mark.training
def test_resumes_with_another_window_and_number_of_ranks(lab: Lab, patched: Path, two_ranks: Run) -> None:
    file = str(two_ranks.folder / "checkpoints" / "epoch_1.pt")
    options = (*TWO_RANKS, "--otco-window", "5", "--otco-cache-size", "2", "--resume", file)
    run = lab.start("other-window", patched, OTCO, *options, "--train-data", str(lab.folder / "large.csv")).wait()
    # 3 plans, of which the smaller cache takes the newest two; one step of both ranks was in the window.
    assert "=> resuming OTCO with 2 cached plans" in run.output
    assert "OTCO Plans: 13 made, 0 skipped" in run.output
    assert [len(plan["f"]) for plan in run.checkpoint(2)["plugins"]["otco"]["cache"]["plans"]] == [40, 40]


@pytest.mark.training
def test_the_tiny_model_trains_on_scenes_without_a_warning(lab: Lab, patched: Path, tmp_path: Path) -> None:
    """What the quickstart does, small: rendered shards, loader workers, the BERT that the package makes."""
    scenes = tmp_path / "scenes"
    command = [sys.executable, "-m", "openclip_otco.cli", "scenes", str(scenes), "--train", "80", "--val", "16"]
    subprocess.run([*command, "--shards", "2", "--mismatch", "0.4"], check=True, capture_output=True)
    shards = {split: str(scenes / split / "{0000..0001}.tar") for split in ("train", "val")}
    run = lab.start(
        "scenes", patched, OTCO, "--loss", "otco", *FEW_STEPS, "--model", "RN10t-bert-tiny", "--workers", "2",
        "--dataset-type", "webdataset", "--train-data", shards["train"], "--val-data", shards["val"],
        "--batch-size", "16",
    ).wait()  # fmt: skip
    assert len(run.steps) == 6
    assert "OTCO Plans: 2 made, 0 skipped" in run.output
    # OpenCLIP's own line about every model of which only the text tower comes with weights.
    expected = "WARNING | Model RN10t-bert-tiny initialized partially."
    lines = [line for line in run.output.splitlines() if expected not in line]
    assert not [line for line in lines if re.search("warn", line, re.IGNORECASE)]
