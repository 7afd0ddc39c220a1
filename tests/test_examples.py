"""The examples: a loss against its formula in float64 and through OpenCLIP's own script, a plan against POT's."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import tomllib
from pathlib import Path
from typing import Any

import ot
import pytest
import torch
from conftest import paired_features
from hook_fixtures import Lab
from open_clip.loss import ClipLoss
from PIL import Image
from torch import Tensor

from openclip_otco.method.solver import PlanSolver

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def my_loss() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / "my_loss.py"))


@pytest.fixture(scope="module")
def entry_point(lab: Lab, patched: Path) -> str:
    """That of examples/pyproject.toml; the module lies where the runs of the laboratory look for it."""
    project = tomllib.loads((EXAMPLES / "pyproject.toml").read_text())["project"]
    ((name, value),) = project["entry-points"]["open_clip_train.plugins"].items()
    point = f"{name} = {value}"
    folder = lab.environment(patched, point)["PYTHONPATH"].split(os.pathsep)[-1]
    shutil.copy(EXAMPLES / "my_loss.py", folder)
    return point


def smoothed(images: Tensor, texts: Tensor, scale: float, share: float) -> Tensor:
    """By its definition."""
    n = len(images)
    target = (1 - share) * torch.eye(n, dtype=torch.float64) + share / n
    logits = scale * images.double() @ texts.double().T
    return -(target * (logits.log_softmax(1) + logits.T.log_softmax(1))).sum(1).mean() / 2


@pytest.mark.parametrize("share", [0.0, 0.1, 0.7])
def test_my_loss(my_loss: dict[str, Any], share: float) -> None:
    images, texts = paired_features(12)
    scale = torch.tensor(20.0)
    found = my_loss["SmoothedClipLoss"](share)(images, texts, scale)
    assert found.item() == pytest.approx(smoothed(images, texts, 20.0, share).item(), rel=1e-5)
    if share == 0:
        assert torch.equal(found, ClipLoss()(images, texts, scale))


def test_my_loss_refuses_a_bad_share(lab: Lab, patched: Path, entry_point: str) -> None:
    code, args, _ = lab.parse(patched, entry_point, "--loss", "smoothed")
    assert (code, args["smoothing"]) == (0, 0.1)
    code, _, output = lab.parse(patched, entry_point, "--loss", "smoothed", "--smoothing", "1")
    assert code == 2
    assert output.splitlines()[-1].endswith("argument --smoothing: must be in [0, 1), got 1.0")


@pytest.mark.training
def test_my_loss_trains(lab: Lab, patched: Path, entry_point: str) -> None:
    both = [lab.start(f"smoothed-{share}", patched, entry_point, "--loss", "smoothed", "--smoothing", share).wait()
            for share in ("0", "0.3")]  # fmt: skip
    clip = lab.start("not-smoothed", patched, entry_point).wait()
    found = [[float(loss) for line in run.steps for loss in re.findall(r" Loss: (\S+)", line)]
             for run in (clip, *both)]  # fmt: skip
    assert [len(losses) for losses in found] == [4, 4, 4]
    assert "Loss: smoothed (plugin my-loss)" in both[0].output
    assert found[1] == found[0]
    assert found[2] != found[0]


@pytest.fixture(scope="module")
def ten_pictures() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / "plan_of_ten_pictures.py"))


def test_masses_are_those_of_pot(ten_pictures: dict[str, Any]) -> None:
    images, texts = paired_features(10)
    mass = ten_pictures["masses"](PlanSolver(epsilon=0.1, tolerance=1e-6).solve(images, texts))
    cost = 1 - images.double() @ texts.double().T
    assert mass == pytest.approx(ot.sinkhorn([], [], cost.numpy(), 0.1, method="sinkhorn_log"), abs=1e-5)


def test_four_captions_change_places(ten_pictures: dict[str, Any]) -> None:
    right, wrong = (ten_pictures["captioned"](10, share, "any") for share in (0.0, 0.4))
    assert right.owner == list(range(10))
    assert sorted(wrong.owner) == right.owner
    assert sum(owner != number for number, owner in enumerate(wrong.owner)) == 4
    assert wrong.captions == [right.captions[owner] for owner in wrong.owner]


def test_the_plan_of_ten_pictures(
    ten_pictures: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.png"
    ten_pictures["main"](["--out", str(out)])
    *printed, last = capsys.readouterr().out.splitlines()
    assert last == f"The plan as a picture: {out}"
    rows = [line.split() for line in printed[2:]]
    likely = {line[1] == "right": [float(row[-1]) for row in rows if row[1] == line[1]] for line in rows}
    assert [len(likely[right]) for right in (True, False)] == [6, 4]
    assert max(likely[False]) < 0.5 < min(likely[True])
    # The page shows what the example says; another machine may round otherwise.
    told = re.search(r"```\n(Each picture gives.*?)\nThe plan as", (ROOT / "docs" / "plan.md").read_text(), re.S)
    assert told is not None
    number = r"(\d+(?:\.\d+)?)(%?)"
    both = ["\n".join(printed), told[1]]
    words = [re.sub(number, "N", text).split() for text in both]
    assert words[0] == words[1]
    found, shown = ([float(each) / (100 if of else 1) for each, of in re.findall(number, text)] for text in both)
    assert found == pytest.approx(shown, abs=0.02)
    with Image.open(out) as made, Image.open(ROOT / "docs" / "plan.png") as committed:
        assert made.size == committed.size
