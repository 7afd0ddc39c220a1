"""What goes wrong on the way: nothing of it loses a run, the last good plan or the last checkpoint."""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import tarfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import paired_features
from hook_fixtures import MODEL, Lab, Run
from PIL import Image

from openclip_otco import FeatureWindow, OTCOLoss, PlanCache, PlanCacheCallback, PlanSolver

OTCO = "otco = openclip_otco.train.plugin:OTCOPlugin"
DYING = "otco = hook_plugin:DyingPlugin"
LISTENING = "otco = hook_plugin:ListeningPlugin"
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
        lines = generator.randint(1, 12)  # an epoch logs four of them
        run.until(lambda log, lines=lines: log.count("Train Epoch") >= lines)
        time.sleep(generator.uniform(0, 0.05))  # between two lines as well
        run.kill()
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
    dead = lab.start("dying", patched, DYING, *OPTIONS, *KEEP, *data, "--epochs", "2", ranks=2, torchrun=True)
    dead.wait(fails=True)
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


def caption(number: int, sample: int) -> str:
    return f"picture {sample} of shard {number}"


def good(number: int) -> dict[str, bytes]:
    """The files of 24 samples, each with a caption of its own."""
    files = {}
    for sample in range(24):
        files |= {f"{sample}.jpg": picture(sample), f"{sample}.txt": caption(number, sample).encode()}
    return files


# Of the shard that is cut off, so many samples are whole.
WHOLE = 4
# Ten batches of eight: the 56 samples that can be read fill seven, so that an epoch has one pass over all of them.
EPOCH = 80
ODD_BUT_READABLE = {"empty": "", "long": "word " * 10_000, "zero": "a\x00b", "emoji": "\U0001f600"}
ODD_PICTURES = {"cut": picture(2)[:200], "nothing": b"", "text": b"I am no picture"}


@dataclass(frozen=True)
class BrokenData:
    """Shards as `--train-data` takes them, and the captions of all samples that can be read."""

    shards: str
    captions: list[str]


@pytest.fixture
def broken_data(tmp_path: Path) -> BrokenData:
    """Six shards: good; odd captions and pictures; cut off; no tar at all; not there; good."""
    shard(tmp_path / "0.tar", good(0))
    odd = {f"{name}.txt": text.encode() for name, text in ODD_BUT_READABLE.items()}
    odd |= {"latin.txt": "caf\u00e9".encode("latin-1"), "wide.txt": "wide".encode("utf-16")}
    odd |= {f"{name}.jpg": picture(3) for name in (*ODD_BUT_READABLE, "latin", "wide")}
    odd |= {f"{name}.jpg": data for name, data in ODD_PICTURES.items()}
    odd |= {f"{name}.txt": b"a caption" for name in ODD_PICTURES}
    odd |= {"alone.txt": b"no picture", "silent.jpg": picture(1)}
    shard(tmp_path / "1.tar", dict(sorted(odd.items())))
    shard(tmp_path / "2.tar", good(2))
    with tarfile.open(tmp_path / "2.tar") as tar:
        middle = tar.getmember(f"{WHOLE}.jpg").offset_data + 10
    (tmp_path / "2.tar").write_bytes((tmp_path / "2.tar").read_bytes()[:middle])
    (tmp_path / "3.tar").write_bytes(random.Random(0).randbytes(5000))
    shard(tmp_path / "5.tar", good(5))
    captions = [caption(number, sample) for number, count in ((0, 24), (2, WHOLE), (5, 24)) for sample in range(count)]
    return BrokenData(str(tmp_path / "{0..5}.tar"), captions + list(ODD_BUT_READABLE.values()))


def trained_on(run: Run, captions: list[str]) -> list[Counter[str]]:
    """How often each of the captions was in a batch, epoch by epoch; any other one counts as a row of numbers."""
    from open_clip.tokenizer import SimpleTokenizer

    rows = SimpleTokenizer(context_length=MODEL["text_cfg"]["context_length"])(captions).tolist()
    names = {json.dumps(row): text for row, text in zip(rows, captions, strict=True)}
    seen = [names.get(line, line) for line in (run.folder / "captions.jsonl").read_text().splitlines()]
    return [Counter(seen[start : start + EPOCH]) for start in range(0, len(seen), EPOCH)]


def left_out(run: Run) -> Counter[str]:
    """How often OpenCLIP logged an error of its data, by the shard that it names or by what a sample lacked."""
    errors = re.findall(r"Handling webdataset error \((.*)\)\. Ignoring\.", run.output)
    return Counter(re.findall(r"\d\.tar|Truncated File|cannot identify image|utf-8", error)[0] for error in errors)


@pytest.mark.training
@pytest.mark.parametrize("workers", ["0", "1"])
def test_broken_shards_cost_their_samples(lab: Lab, patched: Path, broken_data: BrokenData, workers: str) -> None:
    data = ("--dataset-type", "webdataset", "--train-data", broken_data.shards, "--train-num-samples", str(EPOCH))
    words = (*OPTIONS, *data, "--epochs", "2", "--workers", workers)
    run = lab.start(f"broken-{workers}", patched, LISTENING, *words).wait()
    assert [set(epoch) for epoch in trained_on(run, broken_data.captions)] == [set(broken_data.captions)] * 2
    told = left_out(run)
    # In each epoch: the three shards, two captions that are no UTF-8, one picture cut off, and two that are none.
    least = {"2.tar": 2, "3.tar": 2, "4.tar": 2, "utf-8": 4, "Truncated File": 2, "cannot identify image": 4}
    assert told.keys() == least.keys()
    assert all(told[kind] >= count for kind, count in least.items())
    assert "OTCO Plans: 6 made, 0 skipped, 0 non-finite pairs dropped" in run.output
    assert "Loss: nan" not in run.output


@pytest.mark.training
def test_a_shard_that_disappears_half_way_costs_its_samples(lab: Lab, patched: Path, broken_data: BrokenData) -> None:
    data = ("--dataset-type", "webdataset", "--train-data", broken_data.shards, "--train-num-samples", str(EPOCH))
    lost_shard = str(Path(broken_data.shards).parent / "5.tar")
    in_the_third_epoch = ("--remove", lost_shard, "--remove-at", "25")
    run = lab.start("vanishing", patched, LISTENING, *OPTIONS, *data, *in_the_third_epoch, "--epochs", "5").wait()
    epochs = trained_on(run, broken_data.captions)
    lost = [text for text in broken_data.captions if text.endswith("shard 5")]
    assert set(epochs[1]) == set(broken_data.captions)
    assert not any(epochs[-1][text] for text in lost)
    # The epoch has as many steps as before: of the others some come twice.
    assert set(epochs[-1]) == set(broken_data.captions) - set(lost)
    assert left_out(run)["5.tar"] >= 2  # in each of the last two epochs
    assert ", 0 skipped, 0 non-finite pairs dropped" in run.output


def callback(**solver: object) -> PlanCacheCallback:
    """A callback; `callback.loss` is the loss whose plans it sets."""
    loss = OTCOLoss(confidence=1.0, transport_weight=0.5)
    made = PlanCacheCallback(loss.exchange, FeatureWindow(2), PlanCache(), PlanSolver(**solver), warmup=0.0)
    made.loss = loss
    return made


def steps(hook: PlanCacheCallback, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
    """Losses of the steps of a training on these features."""
    hook.on_train_start(step=0, total_steps=len(batches))
    losses = []
    for step, (v, t) in enumerate(batches):
        terms = hook.loss(v, t, torch.tensor(10.0), output_dict=True)
        losses.append(float(sum(terms.values())))
        hook.on_step_end(step=step, epoch=0, losses=terms)
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
