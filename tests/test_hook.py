"""What the patch does to OpenCLIP's training script, in runs of the script itself."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hook_fixtures import original, patched  # noqa: F401
from hook_plugin import Recorder
from PIL import Image

MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
GOOD = "example = hook_plugin:ExamplePlugin"
BAD = ["ConflictingPlugin", "SiglipPlugin", "TwinPlugin", "UnfinishedPlugin"]
BROKEN = "\n".join([GOOD, "missing = no_such_module:Plugin", *(f"z{name} = hook_plugin:{name}" for name in BAD)])
SHAPES = {"image_features": [8, 16], "text_features": [8, 16]}


@dataclass(frozen=True)
class Run:
    """A training run; `wait` for it before looking at what it left."""

    process: subprocess.Popen[str]
    folder: Path

    def wait(self) -> "Run":
        output, _ = self.process.communicate(timeout=240)
        self.folder.mkdir(exist_ok=True)
        (self.folder / "output.txt").write_text(output)
        assert self.process.returncode == 0, output[-5000:]
        return self

    @property
    def output(self) -> str:
        return (self.folder / "output.txt").read_text()

    @property
    def steps(self) -> list[str]:
        """The logged steps, without the times."""
        lines = (self.folder / "out.log").read_text().splitlines()
        return [re.sub(r".*(Train Epoch.*)Data .* (LR.*)", r"\1\2", line) for line in lines if "Train Epoch" in line]

    def checkpoint(self, epoch: int) -> dict[str, Any]:
        loaded: dict[str, Any] = torch.load(self.folder / "checkpoints" / f"epoch_{epoch}.pt", weights_only=True)
        return loaded

    def events(self, rank: int = 0) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / f"record.{rank}").read_text().splitlines()]


@dataclass(frozen=True)
class Lab:
    """A folder with a tiny model, data and plugins, where the training script runs."""

    folder: Path

    def environment(self, script: Path, entry_points: str | None) -> dict[str, str]:
        """Of a process outside the checkout that finds this copy of the script and these plugins, no other ones."""
        installed = self.folder / f"plugins-{abs(hash(entry_points))}"
        installed.mkdir(exist_ok=True)
        shutil.copy(Path(__file__).with_name("hook_plugin.py"), installed)
        # The first distribution of a name counts, so that this package's own plugin is not there.
        for name, points in (("hook_plugin", entry_points or ""), ("openclip_otco", "")):
            info = installed / f"{name}-1.0.dist-info"
            info.mkdir(exist_ok=True)
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            (info / "entry_points.txt").write_text(f"[open_clip_train.plugins]\n{points}\n")
        paths = os.pathsep.join([str(script), str(installed)])
        return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def start(self, name: str, script: Path, entry_points: str | None, *options: str, ranks: int = 1) -> Run:
        defaults = {
            "model": f"local-dir:{self.folder}",
            "logs": f"{self.folder / name}",
            "name": "run",
            "train-data": f"{self.folder / 'small.csv'}",
            "dataset-type": "csv",
            "csv-separator": ",",
            "batch-size": "8",
            "epochs": "1",
            "workers": "0",
            "warmup": "5",
            "log-every-n-steps": "1",
            "device": "cpu",
            "precision": "fp32",
        }
        command = [sys.executable, "-m", "open_clip_train.main"]
        if ranks > 1:
            # Without the two dashes torchrun would take --logs for an abbreviation of its own options.
            command[2:] = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "--", command[2]]
        command += [part for option, value in defaults.items() for part in (f"--{option}", value)]
        command += [option.replace("RUN", str(self.folder / name / "run")) for option in options]
        environment = self.environment(script, entry_points)
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(command, cwd=self.folder, env=environment, **pipes)
        return Run(process, self.folder / name / "run")

    def parse(self, script: Path, entry_points: str | None, *options: str) -> tuple[int, dict[str, Any], str]:
        """Only parses arguments: exit code, arguments as strings, everything printed."""
        code = "import sys, json; from open_clip_train.params import parse_args; "
        code += "print(json.dumps(vars(parse_args(sys.argv[1:])), default=str))"
        environment = {**self.environment(script, entry_points), "COLUMNS": "200"}
        command = [sys.executable, "-c", code, *options]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        args = json.loads(done.stdout) if done.stdout.startswith("{") else {}
        return done.returncode, args, done.stdout + done.stderr


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = tmp_path_factory.mktemp("lab")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL}))
    generator = np.random.default_rng(0)
    rows = []
    for i in range(32):
        path = folder / f"{i}.png"
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
        rows.append((path, f"picture number {i}"))
    for name, data in (("small", rows), ("large", (rows * 13)[:400])):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("filepath", "title"), *data])
    return Lab(folder)


@pytest.fixture(scope="session")
def plain(lab: Lab, original: Path, patched: Path) -> tuple[Run, Run]:  # noqa: F811
    """50 steps without and with the patch, the latter with plugins that are not used."""
    options = ("--train-data", str(lab.folder / "large.csv"))
    runs = lab.start("original", original, None, *options), lab.start("patched", patched, BROKEN, *options)
    return runs[0].wait(), runs[1].wait()


@pytest.fixture(scope="session")
def example(lab: Lab, patched: Path) -> Run:  # noqa: F811
    """Two epochs with a plugin's loss and callback."""
    validation = ("--val-data", str(lab.folder / "small.csv"))
    options = ("--loss", "example", "--epochs", "2", "--example-record", "RUN/record", "--report-to", "tensorboard")
    return lab.start("example", patched, GOOD, *options, *validation).wait()


def assert_equal(ours: Any, theirs: Any) -> None:
    """To the bit, whatever is nested in it."""
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for key in ours:
            assert_equal(ours[key], theirs[key])
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for our, their in zip(ours, theirs, strict=True):
            assert_equal(our, their)
    else:
        assert ours == theirs


def test_arguments(lab: Lab, patched: Path) -> None:  # noqa: F811
    def parse(*options: str) -> tuple[int, dict[str, Any], str]:
        return lab.parse(patched, GOOD, *options)

    code, args, output = parse()
    assert (code, args["loss"], args["siglip"], args["example_scale"]) == (0, "clip", False, 1.0)
    assert "Warning" not in output

    code, args, _ = parse("--loss", "siglip", "--loss-dist-impl", "gather")
    assert (code, args["siglip"], args["loss_dist_impl"]) == (0, True, "gather")
    code, args, _ = parse("--siglip", "--loss", "clip")
    assert (code, args["siglip"]) == (0, True)

    code, _, output = parse("--loss", "nonsense")
    assert code == 2
    assert re.search("clip.*siglip.*example", output)
    code, _, output = parse("--siglip", "--loss", "example")
    assert code == 2
    assert "--siglip" in output.splitlines()[-1]
    code, _, output = parse("--example-scale", "-1")
    assert code == 2
    assert "must not be negative" in output

    code, _, output = parse("--help")
    assert code == 0
    assert "--loss {clip,siglip,example}" in output
    assert re.search(r"\nexample plugin:\n +--example-scale EXAMPLE_SCALE\s+Factor of the loss", output)


def test_plugins_that_fail_are_left_out(lab: Lab, patched: Path) -> None:  # noqa: F811
    code, args, output = lab.parse(patched, BROKEN, "--loss", "example")
    assert code == 0
    assert not {"conflicting_first", "thief"} & set(args)
    warned = Counter(re.findall(r"UserWarning: Plugin (\w+) ", output))
    assert warned == dict.fromkeys(["missing", *(f"z{name}" for name in BAD)], 1)
    for reason in ("no_such_module", "--lr", "siglip already", "example already", "not today"):
        assert reason in output
    assert "{clip,siglip,example}" in lab.parse(patched, BROKEN, "--help")[2]


def test_no_plugin(lab: Lab, patched: Path) -> None:  # noqa: F811
    code, args, output = lab.parse(patched, None, "--loss", "siglip")
    assert (code, args["siglip"]) == (0, True)
    assert "Warning" not in output


@pytest.mark.training
def test_clip_is_as_before(plain: tuple[Run, Run]) -> None:
    before, after = plain
    assert len(before.steps) == 50
    assert after.steps == before.steps
    assert_equal(after.checkpoint(1), before.checkpoint(1))
    assert after.output.count("UserWarning: Plugin missing ") == 1
    assert before.output.count("Start epoch 0") == after.output.count("Start epoch 0")


@pytest.mark.training
def test_siglip_is_as_before(lab: Lab, original: Path, patched: Path) -> None:  # noqa: F811
    runs = (
        lab.start("siglip-original", original, None, "--siglip"),
        lab.start("siglip-patched", patched, GOOD, "--loss", "siglip"),
    )
    before, after = (run.wait() for run in runs)
    assert len(before.steps) == 4
    assert after.steps == before.steps
    assert "logit_bias" in after.checkpoint(1)["state_dict"]
    assert_equal(after.checkpoint(1), before.checkpoint(1))


@pytest.mark.training
def test_callbacks(example: Run) -> None:
    events = example.events()
    epoch = ["step_end"] * 4 + ["epoch_end", "save"]
    assert [event["event"] for event in events] == ["train_start", *epoch, *epoch, "train_end"]
    assert all(event["writer"] for event in events if "writer" in event)
    assert events[0] == {"event": "train_start", "loss": "ScaledClipLoss", "step": 0, "total_steps": 8, "writer": True}
    steps = [event for event in events if event["event"] == "step_end"]
    assert [(event["step"], event["epoch"]) for event in steps] == [(i, i // 4) for i in range(8)]
    for event, line in zip(steps, example.steps, strict=True):
        assert event["shapes"] == SHAPES
        assert list(event["losses"]) == ["scaled_loss", "loss"]
        assert f"Loss: {event['losses']['loss']:#.5g} " in line
    ends = [event for event in events if event["event"] == "epoch_end"]
    assert [(event["epoch"], event["step"]) for event in ends] == [(1, 4), (2, 8)]
    assert [(event["evaluations"], event["saved"]) for event in ends] == [(1, False), (2, False)]
    assert events[-1] == {"event": "train_end", "step": 8, "writer": True}

    assert "Loss: example (plugin example)" in example.output
    seconds = re.findall(r"Batch \(t\): ([\d.]+)", (example.folder / "out.log").read_text())
    assert min(map(float, seconds)) >= Recorder.SECONDS
    for epochs in (1, 2):
        state = {"recorder": {"steps": 4 * epochs, "tensor": torch.arange(4 * epochs)}}
        assert_equal(example.checkpoint(epochs)["plugins"], state)


@pytest.mark.training
def test_resume(lab: Lab, patched: Path, plain: tuple[Run, Run], example: Run) -> None:  # noqa: F811
    def start(name: str, checkpoint: Run, *options: str) -> Run:
        file = checkpoint.folder / "checkpoints" / "epoch_1.pt"
        record = ("--epochs", "2", "--example-record", "RUN/record")
        return lab.start(name, patched, GOOD, "--resume", str(file), *record, *options)

    runs = start("resume", example, "--loss", "example"), start("resume-plain", plain[0], "--accum-freq", "2")
    resumed, from_plain = (run.wait() for run in runs)

    events = resumed.events()
    assert events[0] == {"event": "load", "state": {"steps": 4, "tensor": [0, 1, 2, 3]}}
    assert (events[1]["event"], events[1]["step"], events[1]["total_steps"]) == ("train_start", 4, 8)
    assert [event["step"] for event in events if event["event"] == "step_end"] == [4, 5, 6, 7]
    assert resumed.checkpoint(2)["plugins"]["recorder"]["steps"] == 8

    events = from_plain.events()
    assert events[0] == {"event": "load", "state": None}
    assert events[1] == {"event": "train_start", "loss": "ClipLoss", "step": 2, "total_steps": 4, "writer": False}
    steps = [event for event in events if event["event"] == "step_end"]
    assert [event["step"] for event in steps] == [2, 3]
    assert all(event["shapes"] == {name: [16, 16] for name in SHAPES} for event in steps)


@pytest.mark.training
def test_two_ranks(lab: Lab, patched: Path) -> None:  # noqa: F811
    options = ("--loss", "example", "--example-record", "RUN/record", "--report-to", "tensorboard")
    run = lab.start("ranks", patched, GOOD, *options, ranks=2).wait()
    first, second = run.events(0), run.events(1)
    assert [event["event"] for event in first] == ["train_start", *["step_end"] * 2, "epoch_end", "save", "train_end"]
    assert [event["event"] for event in second] == [event["event"] for event in first if event["event"] != "save"]
    assert {event["writer"] for event in first if "writer" in event} == {True}
    assert {event["writer"] for event in second if "writer" in event} == {False}
    assert all(event["shapes"] == SHAPES for event in first + second if event["event"] == "step_end")
    assert run.checkpoint(1)["plugins"]["recorder"]["steps"] == 2
