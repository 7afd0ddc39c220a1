"""The examples: a loss against its formula in float64 and through OpenCLIP's own script."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import paired_features
from hook_fixtures import Lab
from open_clip.loss import ClipLoss
from torch import Tensor

EXAMPLES = Path(__file__).parents[1] / "examples"


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
