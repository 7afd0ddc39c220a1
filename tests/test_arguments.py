"""The numbers that arguments take: each type takes exactly those that its docstring says."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import pytest
from commands import command
from hypothesis import example, given
from hypothesis import strategies as st

from openclip_otco.runs.arguments import count, positive, positive_number, share


def taken(kind: Callable[[str], float], text: str) -> float | None:
    """What the type makes of the text, None where it says no."""
    try:
        return kind(text)
    except (argparse.ArgumentTypeError, ValueError):
        return None


@given(st.integers())
@example(0)
def test_whole_numbers(number: int) -> None:
    assert taken(positive, str(number)) == (number if number >= 1 else None)
    assert taken(count, str(number)) == (number if number >= 0 else None)


@given(st.floats())
@example(0.0)
@example(1.0)
@example(math.nan)
@example(math.inf)
def test_numbers(number: float) -> None:
    assert taken(positive_number, repr(number)) == (number if number > 0 and math.isfinite(number) else None)
    assert taken(share, repr(number)) == (number if 0 <= number <= 1 else None)


@pytest.mark.parametrize("words", [("evaluate", "epoch_1.pt", "--data", "0.tar"), ("inspect", "run")])
def test_workers_are_counted(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command(*words, "--workers", "-1")
    assert ended.value.code == 2
    assert "argument --workers: must be 0 or more" in capsys.readouterr().err
