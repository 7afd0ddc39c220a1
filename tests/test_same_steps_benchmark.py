"""The benchmark that compares the training of two commits: what it calls equal, and what it calls different."""

from __future__ import annotations

import math

import pytest
import torch
from same_steps import compare, told


def checkpoint() -> dict:
    return {
        "name": "run",
        "state_dict": {"weight": torch.tensor([1.0, -0.0]), "half": torch.ones(2, dtype=torch.bfloat16)},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}, 12: {"step": torch.tensor(3.0)}}},
        "plugins": {"otco": {"plans": [{"f": torch.zeros(3), "diagnostics": {"seconds": 0.1, "cost": 0.5}}]}},
    }


def test_equal_checkpoints_are_equal() -> None:
    one, other = checkpoint(), checkpoint()
    other["name"] = "other run"
    other["plugins"]["otco"]["plans"][0]["diagnostics"]["seconds"] = 7.0
    found = compare(one, other)
    assert (found.equal, found.differ, found.alone) == (5, [], [])


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([1.0, 0.0]),  # another bit, though equal as numbers
        torch.tensor([math.nextafter(1.0, 2.0), -0.0], dtype=torch.float64),
        torch.tensor([[1.0, -0.0]]),
        torch.tensor([1.0 + 2**-23, -0.0]),
    ],
)
def test_another_bit_another_shape_and_another_type_differ(value: torch.Tensor) -> None:
    other = checkpoint()
    other["state_dict"]["weight"] = value
    found = compare(checkpoint(), other)
    assert (found.equal, found.differ) == (4, ["/state_dict/weight"])


def test_numbers_differ_and_what_one_lacks_is_told() -> None:
    other = checkpoint()
    other["plugins"]["otco"]["plans"][0]["diagnostics"]["cost"] = 0.6
    other["plugins"]["otco"]["next_step"] = 4
    found = compare(checkpoint(), other)
    assert found.differ == ["/plugins/otco/plans/0/diagnostics/cost"]
    assert found.alone == ["/plugins/otco/next_step"]


def test_paths_are_told_once() -> None:
    assert told(["/state/12/step", "/state/0/step", "/a1"]) == "/a1, /state/*/step"
    assert told([]) == "nothing"
