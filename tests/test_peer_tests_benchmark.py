"""The benchmark of peers' tests: what it makes of pytest's report, and that its translations say the same thing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import ot as pot
import pytest
import torch
from peer_pot import ADDITIVE_ERROR, pot_empirical_sinkhorn, pot_sinkhorn, pot_sinkhorn2, replaced, squared_distances
from peer_tests import (
    FAILED,
    JUDGEMENTS,
    NOT_APPLICABLE,
    OTHER,
    PASSED,
    UNANSWERED,
    Case,
    cases_of,
    checkout_of,
    first_line,
    missing,
    summed,
)
from peer_turns import Turns
from torch import Tensor

from openclip_otco.ot.cost import all_rows

REPORT = """<testsuites><testsuite>
<testcase name="test_a[numpy]"><properties><property name="calls" value="3" /></properties></testcase>
<testcase name="test_a[torch]"><properties><property name="calls" value="2" /></properties>
  <failure message="AssertionError: &#10;Not equal to tolerance&#10; Mismatched: 3">long</failure></testcase>
<testcase name="test_b"><skipped message="tf not installed">x</skipped></testcase>
<testcase name="test_c"></testcase>
<testcase name="test_d"><properties><property name="calls" value="1" />
  <property name="given_up" value="4" /></properties></testcase>
</testsuite></testsuites>"""


def test_cases_of_a_report() -> None:
    assert cases_of(REPORT) == [
        Case("test_a", PASSED, "", 3),
        Case("test_a", FAILED, "Not equal to tolerance", 2),
        Case("test_b", OTHER, "tf not installed", 0),
        Case("test_c", OTHER, UNANSWERED, 0),  # it passed, but says nothing of this package
        Case("test_d", PASSED, "", 1, 4),
    ]


def test_a_function_has_failed_where_one_case_has() -> None:
    lines = summed(cases_of(REPORT), JUDGEMENTS[0], "torch 2")
    assert [(line.test, line.outcome, line.cases, line.calls, line.given_up) for line in lines] == [
        ("test_a", FAILED, 2, 5, 0), ("test_b", OTHER, 1, 0, 0),
        ("test_c", OTHER, 1, 0, 0), ("test_d", PASSED, 1, 1, 4),
    ]  # fmt: skip
    assert json.loads(json.dumps(vars(lines[0])))["why"] == "Not equal to tolerance"


def test_a_function_of_which_a_case_was_skipped_has_passed() -> None:
    cases = [Case("test_a", OTHER, "no tf", 0), Case("test_a", PASSED, "", 1)]
    assert summed(cases, JUDGEMENTS[0], "")[0].outcome == PASSED


@pytest.mark.parametrize(
    ("message", "line"),
    [("AssertionError: \nNot equal\nx", "Not equal"), ("one", "one"), ("AssertionError:", "AssertionError:"), ("", "")],
)
def test_first_line(message: str, line: str) -> None:
    assert first_line(message) == line


def test_what_is_missing_is_said_and_nothing_else_is_left_out() -> None:
    assert "barycenters" in str(missing("POT", "test_free_support_barycenter_backends"))
    assert "missing entries" in str(missing("POT", "test_emd2_sparse_vs_dense"))
    for test in ("test_sinkhorn", "test_emd_emd2", "test_emd2_lazy_returns_sparse_plan", "test_dual_variables"):
        assert missing("POT", test) is None
    assert all(why and not why.endswith(".") for reasons in NOT_APPLICABLE.values() for why in reasons.values())


def test_turns() -> None:
    def asked(every: int) -> tuple[str, int]:
        turns = Turns(every)
        answer = turns.between(lambda: "t", lambda: "o")
        return "".join(answer() for _ in range(4)), turns.ours

    assert asked(1) == ("oooo", 4)
    assert asked(2) == ("toto", 2)


def test_a_call_from_within_goes_to_the_peer() -> None:
    turns = Turns(1)
    inner = turns.between(lambda: "peer", lambda: "ours")
    outer = turns.between(lambda: "peer", lambda: "ours by " + inner())
    assert outer() == "ours by peer"
    assert turns.ours == 1


@pytest.fixture
def problem() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x, y, a, b = rng.normal(size=(6, 3)), rng.normal(size=(8, 3)), rng.random(6) + 0.1, rng.random(8) + 0.1
    return x, y, a / a.sum(), b / b.sum()


def test_squared_distances(problem: tuple[np.ndarray, ...]) -> None:
    x, y = problem[:2]
    found = all_rows(squared_distances(torch.from_numpy(x), torch.from_numpy(y)))
    np.testing.assert_allclose(found.numpy(), pot.dist(x, y), atol=1e-12)


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_answers_are_pots(problem: tuple[np.ndarray, ...], backend: str) -> None:
    x, y, a, b = problem
    matrix = pot.dist(x, y)

    def given(*arrays: np.ndarray) -> list[np.ndarray | Tensor]:
        return [torch.from_numpy(array) if backend == "torch" else array for array in arrays]

    p, q, cost, xs, ys = given(a, b, matrix, x, y)
    setting = {"stopThr": 1e-12, "numItermax": 20_000}
    plan = pot.sinkhorn(a, b, matrix, 1.0, **setting)
    found, ours = pot_sinkhorn(p, q, cost, 1.0, log=True, **setting)
    assert type(found) is type(cost)
    np.testing.assert_allclose(found, plan, atol=1e-10)
    scalings = np.asarray(ours["u"])[:, None] * np.asarray(ours["v"]) * np.exp(-matrix)
    np.testing.assert_allclose(scalings, plan, atol=1e-10)
    assert float(pot_sinkhorn2(p, q, cost, 1.0, **setting)) == pytest.approx((plan * matrix).sum(), abs=1e-9)
    f, g = pot_empirical_sinkhorn(xs, ys, 1.0, p, q, stopThr=1e-12, isLazy=True)
    np.testing.assert_allclose(np.exp(np.asarray(f)[:, None] + np.asarray(g) - matrix), plan, atol=1e-10)


@pytest.mark.parametrize("planner", ["exact_plan", "combinatorial_plan"])
def test_emd_answers_are_pots(problem: tuple[np.ndarray, ...], planner: str) -> None:
    x, y, a, b = problem
    matrix = pot.dist(x, y)
    optimum = pot.emd2(a, b, matrix)
    answers = {name: ours for module, name, ours in replaced(planner) if module is pot}
    turns = Turns(1)
    plan, log = turns.between(pot.emd, answers["emd"])(a, b, matrix, log=True)
    np.testing.assert_allclose(plan.sum(1), a, atol=1e-12)
    allowed = 1e-12 + ADDITIVE_ERROR * np.ptp(matrix)
    assert optimum - 1e-12 <= (plan * matrix).sum() <= optimum + allowed
    assert a @ log["u"] + b @ log["v"] >= optimum - allowed
    with pytest.raises(AssertionError, match="same mass"):
        answers["emd"](a, 2 * b, matrix)


def test_a_folder_without_the_tests_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POT_CHECKOUT", raising=False)
    assert checkout_of(None, "POT_CHECKOUT", "POT") is None
    monkeypatch.setenv("POT_CHECKOUT", str(tmp_path))
    with pytest.raises(SystemExit, match=r"holds no test/test_ot\.py: give a checkout of POT \(--pot or POT"):
        checkout_of(None, "POT_CHECKOUT", "POT")
