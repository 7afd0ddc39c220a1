"""What goes wrong on the way: nothing of it loses a run, the last good plan or the last checkpoint."""

from __future__ import annotations

import hashlib
import io
import random
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import paired_features
from hook_fixtures import Lab
from PIL import Image

from openclip_otco import FeatureWindow, OTCOLoss, PlanCache, PlanCacheCallback, PlanSolver

OTCO = "otco = openclip_otco.plugin:OTCOPlugin"
DYING = "otco = hook_plugin:DyingPlugin"
OPTIONS = ("--loss", "otco", "--otco-window", "3", "--otco-warmup", "0", "--otco-transport-weight", "0.5")
KEEP = ("--save-most-recent", "--delete-previous-checkpoint", "--save-frequency", "1", "--resume", "latest")
KILLS = 20


def latest(folder: Path) -> Path:
    return folder / "checkpoints" / "epoch_latest.pt"


def epoch_of(folder: Path) -> int:
    """Of the last checkpoint, which must be whole, with its plans: finite, and made at steps that were."""
    if not latest(folder).exists():
        return 0
    checkpoint = torch.load(latest(folder), weights_only=True)
    state = checkpoint["plugins"]["otco"]
    for plan in state["cache"]["plans"]:
        assert torch.isfinite(plan["f"]).all()
        assert plan["step"] < 4 * checkpoint["epoch"]
    assert state["made"] == 4 * checkpoint["epoch"] // 3
    return int(checkpoint["epoch"])


def killed(lab: Lab, patched: Path, name: str, seed: int, times: int) -> list[int]:
    """Starts a run and kills it at a random moment of its training, `times` over; the epochs that were saved."""
    generator, epochs = random.Random(seed), [0]
    for _ in range(times):
        run = lab.start(name, patched, OTCO, *OPTIONS, *KEEP, "--epochs", "2000")
        log, begun = run.folder / "out.log", time.monotonic()
        started = log.read_text().count("Start epoch") if log.exists() else 0
        while not log.exists() or log.read_text().count("Start epoch") == started:
            assert run.process.poll() is None, run.process.communicate()[0][-3000:]
            assert time.monotonic() - begun < 120
            time.sleep(0.02)
        time.sleep(generator.uniform(0, 1.5))
        run.process.kill()
        run.process.communicate()
        epochs.append(epoch_of(run.folder))
    return epochs


@pytest.mark.training
def test_killed_at_twenty_random_moments(lab: Lab, patched: Path) -> None:
    """Epochs take a fraction of a second here, and each of them writes two checkpoints."""
    with ThreadPoolExecutor(2) as pool:
        lines = pool.map(lambda i: killed(lab, patched, f"killed-{i}", i, KILLS // 2), range(2))
        for index, epochs in enumerate(lines):
            assert epochs == sorted(epochs)  # nothing that was saved is lost
            assert epochs[-1] > 0
            goal = str(epochs[-1] + 1)
            run = lab.start(f"killed-{index}", patched, OTCO, *OPTIONS, *KEEP, "--epochs", goal).wait()
            assert "=> resuming OTCO with" in run.output
            assert epoch_of(run.folder) == epochs[-1] + 1


@pytest.mark.training
def test_a_rank_killed_while_it_makes_a_plan_ends_the_run_and_costs_its_epoch(lab: Lab, patched: Path) -> None:
    """Two plans an epoch. The rank dies in the second epoch; the other one must not wait for it."""
    data = ("--train-data", str(lab.folder / "large.csv"), "--otco-window", "12")
    first = lab.start("dying", patched, OTCO, *OPTIONS, *KEEP, *data, "--epochs", "1", ranks=2).wait()
    assert "OTCO Plans: 2 made" in first.output
    before = hashlib.sha256(latest(first.folder).read_bytes()).digest()
    begun = time.monotonic()
    dead = lab.start("dying", patched, DYING, *OPTIONS, *KEEP, *data, "--epochs", "2", ranks=2).wait(fails=True)
    assert time.monotonic() - begun < 120
    assert "=> resuming OTCO with 2 cached plans" in dead.output
    assert "Start epoch 1" in dead.output
    assert hashlib.sha256(latest(first.folder).read_bytes()).digest() == before
    again = lab.start("dying", patched, OTCO, *OPTIONS, *KEEP, *data, "--epochs", "2", ranks=2).wait()
    assert "OTCO Plans: 4 made, 0 skipped" in again.output
    assert torch.load(latest(first.folder), weights_only=True)["epoch"] == 2


@pytest.mark.training
def test_a_full_disk_costs_the_epochs_since_the_last_checkpoint(lab: Lab, patched: Path) -> None:
    first = lab.start("full", patched, OTCO, *OPTIONS, *KEEP, "--epochs", "1").wait()
    size = latest(first.folder).stat().st_size
    full = lab.start("full", patched, OTCO, *OPTIONS, *KEEP, "--epochs", "3", file_size=size // 2).wait(fails=True)
    assert "torch.save(" in full.output  # what the traceback names
    assert epoch_of(full.folder) == 1
    again = lab.start("full", patched, OTCO, *OPTIONS, *KEEP, "--epochs", "3").wait()
    assert "=> resuming OTCO with 1 cached plans (steps [2])" in again.output
    assert epoch_of(again.folder) == 3


def picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def shard(file: Path, samples: dict[str, bytes]) -> None:
    with tarfile.open(file, "w") as tar:
        for name, data in samples.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def broken_data(tmp_path: Path) -> str:
    """Six shards: good; odd captions and pictures; cut off; no tar at all; not there; good."""
    good = {f"{i}.{kind}": picture(i) if kind == "jpg" else b"a caption" for i in range(24) for kind in ("jpg", "txt")}
    shard(tmp_path / "0.tar", good)
    odd = {
        "empty.txt": b"", "long.txt": b"word " * 10_000, "latin.txt": "caf\u00e9".encode("latin-1"),
        "wide.txt": "wide".encode("utf-16"), "zero.txt": b"a\x00b", "emoji.txt": "\U0001f600".encode(),
        "cut.txt": b"a cut picture", "nothing.txt": b"no bytes", "text.txt": b"no picture", "alone.txt": b"no picture",
        "silent.jpg": picture(1), "cut.jpg": picture(2)[:200], "nothing.jpg": b"", "text.jpg": b"I am no picture",
    }  # fmt: skip
    odd |= {name.replace(".txt", ".jpg"): picture(3) for name in list(odd)[:6]}
    shard(tmp_path / "1.tar", dict(sorted(odd.items())))
    shard(tmp_path / "2.tar", good)
    (tmp_path / "2.tar").write_bytes((tmp_path / "2.tar").read_bytes()[:20_000])
    (tmp_path / "3.tar").write_bytes(random.Random(0).randbytes(5000))
    shard(tmp_path / "5.tar", good)
    return str(tmp_path / "{0..5}.tar")


@pytest.mark.training
@pytest.mark.parametrize("workers", ["0", "1"])
def test_broken_shards_cost_their_samples(lab: Lab, patched: Path, broken_data: str, workers: str) -> None:
    data = ("--dataset-type", "webdataset", "--train-data", broken_data, "--train-num-samples", "80")
    run = lab.start(f"broken-{workers}", patched, OTCO, *OPTIONS, *data, "--epochs", "2", "--workers", workers).wait()
    assert "OTCO Plans: " in run.output
    assert ", 0 skipped, 0 non-finite pairs dropped" in run.output
    assert run.checkpoint(2)["plugins"]["otco"]["made"] >= 4
    assert "Loss: nan" not in run.output


@pytest.mark.training
def test_a_shard_that_disappears_half_way_costs_its_samples(lab: Lab, patched: Path, broken_data: str) -> None:
    data = ("--dataset-type", "webdataset", "--train-data", broken_data, "--train-num-samples", "80")
    run = lab.start("vanishing", patched, OTCO, *OPTIONS, *data, "--epochs", "40")
    log = run.folder / "out.log"
    begun = time.monotonic()
    while not log.exists() or "Start epoch 2" not in log.read_text():
        assert run.process.poll() is None
        assert time.monotonic() - begun < 120
        time.sleep(0.02)
    (Path(broken_data).parent / "5.tar").unlink()
    run.wait()
    assert ", 0 skipped, 0 non-finite pairs dropped" in run.output


def callback(**solver: object) -> PlanCacheCallback:
    loss = OTCOLoss(confidence=1.0, transport_weight=0.5)
    return PlanCacheCallback(loss, FeatureWindow(2), PlanCache(), PlanSolver(**solver), warmup=0.0)  # type: ignore[arg-type]


def steps(hook: PlanCacheCallback, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
    """Losses of the steps of a training on these features."""
    hook.on_train_start(step=0, total_steps=len(batches))
    losses = []
    for step, (v, t) in enumerate(batches):
        terms = hook.loss(v, t, torch.tensor(10.0), output_dict=True)
        losses.append(float(sum(terms.values())))
        features = {"image_features": v, "text_features": t}
        hook.on_step_end(step=step, epoch=0, features=features, losses=terms)
    return losses


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_batch_that_is_not_finite_reaches_no_plan(bad: float) -> None:
    batches = [paired_features(16, seed=seed) for seed in range(6)]
    batches[2][0][3, 5] = bad
    hook = callback()
    steps(hook, batches)
    assert (hook.made, hook.skipped, hook.window.dropped) == (3, 0, 1)
    assert len(hook.cache[3]) == 31
    assert all(bool(torch.isfinite(hook.cache[step].f).all()) for step in hook.cache)


def test_features_that_are_all_equal_give_a_plan_without_preference() -> None:
    same = torch.nn.functional.normalize(torch.ones(16, 24), dim=1)
    hook = callback()
    losses = steps(hook, [(same, same)] * 6)
    assert (hook.made, hook.skipped) == (3, 0)
    assert np.isfinite(losses).all()
    torch.testing.assert_close(hook.cache.newest.confidence(same, same), torch.full((16,), (1 / 33) ** 2))


def test_a_solver_that_does_not_converge_skips_its_plan(caplog: pytest.LogCaptureFixture) -> None:
    hook = callback(epsilon=1e-4, max_iterations=1, initial_plan="none")
    unrelated = [(paired_features(64, seed=seed)[0], paired_features(64, seed=seed + 9)[1]) for seed in range(4)]
    losses = steps(hook, unrelated)
    assert (hook.made, hook.skipped) == (0, 2)
    assert np.isfinite(losses).all()
    assert "from its marginals after 1 iterations at epsilon=0.0001; try a larger epsilon" in caplog.text


def test_batches_of_any_size_down_to_one() -> None:
    hook = callback()
    losses = steps(hook, [paired_features(size, seed=size) for size in (16, 3, 1, 1, 16, 7)])
    assert (hook.made, hook.skipped) == (3, 0)
    assert [len(hook.cache[step]) for step in hook.cache] == [19, 2, 23]
    assert np.isfinite(losses).all()
    one = PlanSolver().solve(*paired_features(1))
    assert float(one.log_mass(one.image_features, one.text_features)) == pytest.approx(0, abs=1e-5)
