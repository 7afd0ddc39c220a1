"""OpenCLIP's main, which trains with tasks: the same losses as the installed version, and OpenCLIP's own to the bit.

`OPENCLIP` names a checkout of the commit that `installation.COMMITS` has.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import resources
from pathlib import Path

import pytest
import torch
from forks import PATIENCE
from hook_fixtures import Lab, assert_equal, lab  # noqa: F401
from same_steps import write_data

from openclip_otco.patch import diff, installation
from openclip_otco.patch.installation import State

CHECKOUT = os.environ.get("OPENCLIP")
VERSION = "4.2.0.dev0"
PLANS = ("--loss", "otco", "--otco-window", "2")

# FSDP2 calls `record_event` of the device's stream in each forward pass. In torch 2.6 a CPU's stream has none.
needs_sharding = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of this version of torch does not run on a CPU"
)

pytestmark = [
    pytest.mark.training,
    pytest.mark.skipif(not CHECKOUT, reason="OPENCLIP names no checkout of OpenCLIP's main"),
]


def copy_sources(folder: Path) -> Path:
    assert CHECKOUT
    for package in diff.PACKAGES:
        shutil.copytree(Path(CHECKOUT, "src", package), folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_sources(tmp_path_factory.mktemp("main"))
    if installation.status(folder).state is State.PATCHED:
        installation.revert(folder)
    return folder


@pytest.fixture(scope="module")
def patched(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("patched") / "src"
    shutil.copytree(original, folder)
    installation.apply(folder)
    return folder


def train(lab: Lab, script: Path | None, name: str, *options: str, ranks: int = 1, fails: bool = False) -> str:  # noqa: F811
    """What a training prints; its folder is `lab.folder / name / "run"`. Without `script` the installed one trains."""
    words = {
        "model": f"local-dir:{lab.folder}", "logs": str(lab.folder / name), "name": "run",
        "train-data": str(lab.folder / "small.csv"), "dataset-type": "csv", "csv-separator": ",",
        "batch-size": str(8 // ranks), "epochs": "2", "workers": "0", "warmup": "3", "log-every-n-steps": "1",
        "device": "cpu", "precision": "fp32", "lr": "1e-3",
    }  # fmt: skip
    python = [sys.executable, "-m"]
    if ranks > 1:
        python += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "--"]
    command = [*python, "open_clip_train.main", *(part for k, v in words.items() for part in (f"--{k}", v)), *options]
    paths = [str(script)] if script else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, *sys.path]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=lab.folder, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    output = done.stdout + done.stderr
    assert (done.returncode != 0) == fails, output[-5000:]
    return output


def losses(lab: Lab, name: str) -> list[float]:  # noqa: F811
    """The loss of each step, as it is logged."""
    lines = (lab.folder / name / "run/out.log").read_text().splitlines()
    return [float(re.findall(r" Loss: (\S+) ", line)[0]) for line in lines if "Train Epoch" in line]


def checkpoint(lab: Lab, name: str) -> dict:  # noqa: F811
    return torch.load(lab.folder / name / "run/checkpoints/epoch_2.pt", weights_only=True)


def test_there_and_back(original: Path, tmp_path: Path) -> None:
    folder = tmp_path / "src"
    shutil.copytree(original, folder)
    assert installation.status(folder).version == VERSION
    files = [patch.path for patch in installation.load_patch(VERSION)]
    installation.apply(folder)
    assert installation.status(folder).state is State.PATCHED
    installation.revert(folder)
    for file in files:
        assert installation._read(folder / file) == installation._read(original / file)


def test_what_a_kill_left_half_patched_is_finished(original: Path, tmp_path: Path) -> None:
    folder = tmp_path / "src"
    shutil.copytree(original, folder)
    first, *_ = installation.load_patch(VERSION)
    (folder / first.path).write_bytes(first.apply((folder / first.path).read_bytes()) or b"")
    assert installation.status(folder).state is State.PARTIAL
    installation.apply(folder)
    assert installation.status(folder).state is State.PATCHED


def test_another_commit_is_named(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "src"
    shutil.copytree(original, folder)
    (folder / "open_clip_train/train.py").write_text("another commit's")
    with pytest.raises(diff.PatchError, match=installation.COMMITS[VERSION]):
        installation.apply(folder)


def test_without_a_plugin_s_loss_nothing_changes(lab: Lab, original: Path, patched: Path) -> None:  # noqa: F811
    for name, script in (("ours", patched), ("theirs", original)):
        train(lab, script, name)
    ours, theirs = checkpoint(lab, "ours"), checkpoint(lab, "theirs")
    assert ours.pop("plugins", {}) == {}
    for key in ("state_dict", "optimizer", "global_step", "samples_seen"):
        assert_equal(ours[key], theirs[key])


@pytest.mark.parametrize("loss", ["clip", "otco", "moco", "simclr", "otter", "rcl"])
def test_both_generations_train_alike(lab: Lab, patched: Path, loss: str) -> None:  # noqa: F811
    options = PLANS if loss == "otco" else ("--loss", loss)
    outputs = [
        train(lab, script, f"{loss}-{name}", *options) for name, script in (("installed", None), ("main", patched))
    ]
    installed, main = (losses(lab, f"{loss}-{name}") for name in ("installed", "main"))
    assert len(main) == 8
    # The logs have four digits.
    assert main == pytest.approx(installed, rel=1e-3, abs=2e-4)
    if loss == "otco":
        ends = [re.findall("OTCO Plans: (.*)", output) for output in outputs]
        assert ends[0] == ends[1] == ["4 made, 0 skipped, 0 non-finite pairs dropped; plans acted in 6 of 8 steps"]


def test_the_quickstart_trains_alike(lab: Lab, patched: Path, tmp_path: Path) -> None:  # noqa: F811
    """Its scenes, model and flags; a CSV in place of shards, whose order would not follow the seed."""
    listed = write_data(tmp_path, pairs=640)
    study = tomllib.loads((resources.files("openclip_otco.configs") / "quickstart.toml").read_text())
    flags = {**study["flags"], **study["loss"]["otco"], "train-data": str(listed), "otco-window": 2,
             "workers": 0, "epochs": 2, "warmup": 4, "batch-size": 64, "log-every-n-steps": 1}  # fmt: skip
    words = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    for name, script in (("quickstart-installed", None), ("quickstart-main", patched)):
        train(lab, script, name, *words)
    assert len(losses(lab, "quickstart-main")) == 20
    assert losses(lab, "quickstart-main") == pytest.approx(losses(lab, "quickstart-installed"), rel=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("--fsdp",), marks=needs_sharding),
        pytest.param(("--fsdp", "--fsdp-checkpoint", "sharded"), marks=needs_sharding),
        ("--local-loss", "--gather-with-grad"),
    ],
)
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_train_as_one(lab: Lab, patched: Path, ranks: int, options: tuple[str, ...]) -> None:  # noqa: F811
    """Against DDP with as many ranks: the sampler deals pairs out in another order where there are more."""
    name = f"{ranks}{''.join(options)}"
    output = train(lab, patched, name, *PLANS, "--debug", *options, ranks=ranks)
    digests = re.findall(r"digest (\w+) at step (\d+) on rank (\d+)", output)
    assert len(digests) == 4 * ranks
    assert len({(digest, step) for digest, step, _ in digests}) == 4
    plain = f"{ranks}-plain"
    if not (lab.folder / plain).exists():
        train(lab, patched, plain, *PLANS, ranks=ranks)
    assert losses(lab, name) == pytest.approx(losses(lab, plain), rel=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        (),
        pytest.param(("--fsdp",), marks=needs_sharding),
        pytest.param(("--fsdp", "--fsdp-checkpoint", "sharded"), marks=needs_sharding),
    ],
)
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_train_as_a_single_one(lab: Lab, patched: Path, ranks: int, options: tuple[str, ...]) -> None:  # noqa: F811
    """A batch is the whole data, and nothing is augmented: the order of pairs and the random numbers of a rank, which
    depend on the number of ranks, say nothing then.
    """
    listed = lab.folder / "one-batch.csv"
    listed.write_text("".join((lab.folder / "small.csv").read_text().splitlines(keepends=True)[:9]))
    same = (
        "--train-data",
        str(listed),
        "--epochs",
        "10",
        "--aug-cfg",
        "use_timm=True",
        "scale=(1., 1.)",
        "ratio=(1., 1.)",
    )
    name = f"all-{ranks}{''.join(options)}"
    train(lab, patched, name, *PLANS, *options, *same, ranks=ranks)
    if not (lab.folder / "all-1").exists():
        train(lab, patched, "all-1", *PLANS, *same)
    assert len(losses(lab, "all-1")) == 10
    assert losses(lab, name) == pytest.approx(losses(lab, "all-1"), rel=1e-3)


@pytest.mark.parametrize(
    "options", [(), pytest.param(("--fsdp", "--fsdp-checkpoint", "sharded"), marks=needs_sharding)]
)
def test_a_resumed_run_goes_on_with_its_plans(lab: Lab, patched: Path, options: tuple[str, ...]) -> None:  # noqa: F811
    ranks, kind = (2, "sharded") if options else (1, "full")
    train(lab, patched, f"half-{kind}", *PLANS, *options, "--save-frequency", "1", ranks=ranks)
    saved = lab.folder / f"half-{kind}/run/checkpoints" / ("epoch_1" if options else "epoch_1.pt")
    output = train(lab, patched, f"rest-{kind}", *PLANS, *options, "--resume", str(saved), ranks=ranks)
    assert "resuming OTCO with 2 cached plans (steps [1, 3])" in output
    # All of the run's plans and steps are counted, also those before.
    assert "OTCO Plans: 4 made, 0 skipped, 0 non-finite pairs dropped; plans acted in 6 of 8 steps" in output
    assert len(losses(lab, f"rest-{kind}")) == 4


@pytest.mark.parametrize("strategy", ["model", "task", "step"])
def test_compiled_runs_train_alike(lab: Lab, patched: Path, strategy: str) -> None:  # noqa: F811
    compiled = ("--torchcompile", "--torchcompile-backend", "eager", "--torchcompile-strategy", strategy)
    train(lab, patched, f"compiled-{strategy}", *PLANS, *compiled)
    if not (lab.folder / "plain").exists():
        train(lab, patched, "plain", *PLANS)
    assert losses(lab, f"compiled-{strategy}") == pytest.approx(losses(lab, "plain"), rel=1e-3)


def test_accumulated_batches_train_alike(lab: Lab, patched: Path) -> None:  # noqa: F811
    options = (*PLANS, "--accum-freq", "2", "--batch-size", "4")
    for name, script in (("accumulated-installed", None), ("accumulated-main", patched)):
        train(lab, script, name, *options)
    assert losses(lab, "accumulated-main") == pytest.approx(losses(lab, "accumulated-installed"), rel=1e-3)


def test_the_tests_of_the_pull_request_pass(patched: Path, tmp_path: Path) -> None:
    """They are in OpenCLIP's own style, and know nothing of this package."""
    tests = Path(str(resources.files("openclip_otco.patches"))) / f"open_clip-{VERSION}-tests.patch"
    subprocess.run(["git", "apply", str(tests.resolve())], cwd=tmp_path, check=True)
    environment = {**os.environ, "PYTHONPATH": str(patched), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_plugins.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "9 passed" in done.stdout


def test_the_legacy_script_refuses_a_plugin_s_loss(lab: Lab, patched: Path) -> None:  # noqa: F811
    words = ["-m", "open_clip_train.legacy_main", "--model", f"local-dir:{lab.folder}", "--loss", "otco"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(patched), *sys.path])}
    done = subprocess.run(
        [sys.executable, *words], cwd=lab.folder, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode
    assert "legacy_main does not know" in done.stderr
