"""What the patch does to OpenCLIP's training script, in runs of the script itself."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hook_fixtures import Lab, Run, assert_equal
from hook_plugin import Recorder

GOOD = "example = hook_plugin:ExamplePlugin"
BAD = ["ConflictingPlugin", "SiglipPlugin", "TwinPlugin", "UnfinishedPlugin"]
BROKEN = "\n".join([GOOD, "missing = no_such_module:Plugin", *(f"z{name} = hook_plugin:{name}" for name in BAD)])
PREPARED = {"event": "prepare_model", "kind": "CLIP", "locked": False}
SHAPES = {"image_features": [8, 16], "text_features": [8, 16]}


@pytest.fixture(scope="session")
def plain(lab: Lab, original: Path, patched: Path) -> tuple[Run, Run]:
    """50 steps without and with the patch, the latter with plugins that are not used."""
    options = ("--train-data", str(lab.folder / "large.csv"))
    runs = lab.start("original", original, None, *options), lab.start("patched", patched, BROKEN, *options)
    return runs[0].wait(), runs[1].wait()


@pytest.fixture(scope="session")
def example(lab: Lab, patched: Path) -> Run:
    """Two epochs with a plugin's loss and callback."""
    validation = ("--val-data", str(lab.folder / "small.csv"))
    options = ("--loss", "example", "--epochs", "2", "--example-record", "RUN/record", "--report-to", "tensorboard")
    return lab.start("example", patched, GOOD, *options, *validation).wait()


def test_arguments(lab: Lab, patched: Path) -> None:
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


def test_plugins_that_fail_are_left_out(lab: Lab, patched: Path) -> None:
    code, args, output = lab.parse(patched, BROKEN, "--loss", "example")
    assert code == 0
    assert not {"conflicting_first", "thief"} & set(args)
    warned = Counter(re.findall(r"UserWarning: Plugin (\w+) ", output))
    assert warned == dict.fromkeys(["missing", *(f"z{name}" for name in BAD)], 1)
    for reason in ("no_such_module", "--lr", "siglip already", "example already", "not today"):
        assert reason in output
    assert "{clip,siglip,example}" in lab.parse(patched, BROKEN, "--help")[2]


def test_no_plugin(lab: Lab, patched: Path) -> None:
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
def test_siglip_is_as_before(lab: Lab, original: Path, patched: Path) -> None:
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
    assert [event["event"] for event in events] == ["prepare_model", "train_start", *epoch, *epoch, "train_end"]
    assert all(event["writer"] for event in events if "writer" in event)
    assert events[0] == PREPARED
    assert events[1] == {"event": "train_start", "loss": "ScaledClipLoss", "step": 0, "total_steps": 8, "writer": True}
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
def test_resume(lab: Lab, patched: Path, plain: tuple[Run, Run], example: Run) -> None:
    def start(name: str, checkpoint: Run, *options: str) -> Run:
        file = checkpoint.folder / "checkpoints" / "epoch_1.pt"
        record = ("--epochs", "2", "--example-record", "RUN/record")
        return lab.start(name, patched, GOOD, "--resume", str(file), *record, *options)

    runs = start("resume", example, "--loss", "example"), start("resume-plain", plain[0], "--accum-freq", "2")
    resumed, from_plain = (run.wait() for run in runs)

    events = resumed.events()
    assert events[:2] == [PREPARED, {"event": "load", "state": {"steps": 4, "tensor": [0, 1, 2, 3]}}]
    assert (events[2]["event"], events[2]["step"], events[2]["total_steps"]) == ("train_start", 4, 8)
    assert [event["step"] for event in events if event["event"] == "step_end"] == [4, 5, 6, 7]
    assert resumed.checkpoint(2)["plugins"]["recorder"]["steps"] == 8

    events = from_plain.events()
    assert events[:2] == [PREPARED, {"event": "load", "state": None}]
    assert events[2] == {"event": "train_start", "loss": "ClipLoss", "step": 2, "total_steps": 4, "writer": False}
    steps = [event for event in events if event["event"] == "step_end"]
    assert [event["step"] for event in steps] == [2, 3]
    assert all(event["shapes"] == {name: [16, 16] for name in SHAPES} for event in steps)


@pytest.mark.training
def test_two_ranks(lab: Lab, patched: Path) -> None:
    options = ("--loss", "example", "--example-record", "RUN/record", "--report-to", "tensorboard", "--lock-image")
    run = lab.start("ranks", patched, GOOD, *options, ranks=2).wait()
    first, second = run.events(0), run.events(1)
    steps = ["step_end"] * 2
    names = ["prepare_model", "train_start", *steps, "epoch_end", "save", "train_end"]
    assert [event["event"] for event in first] == names
    # Locked, and not yet wrapped by DDP.
    assert first[0] == second[0] == {**PREPARED, "locked": True}
    assert [event["event"] for event in second] == [event["event"] for event in first if event["event"] != "save"]
    assert {event["writer"] for event in first if "writer" in event} == {True}
    assert {event["writer"] for event in second if "writer" in event} == {False}
    assert all(event["shapes"] == SHAPES for event in first + second if event["event"] == "step_end")
    assert run.checkpoint(1)["plugins"]["recorder"]["steps"] == 2
