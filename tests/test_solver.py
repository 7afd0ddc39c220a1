"""PlanSolver: every start leads to the same plan, and its diagnostics are the plan's."""

from __future__ import annotations

import numpy as np
import ot as pot
import pytest
import torch
import torch.nn.functional as F
from conftest import paired_features

from openclip_otco.method.solver import INITIAL_PLANS, PlanSolver


def reference_plan(images, texts, epsilon):
    n = len(images)
    cost = (1 - images.double() @ texts.double().T).numpy()
    uniform = [1 / n] * n
    return pot.sinkhorn(uniform, uniform, cost, epsilon, method="sinkhorn_log", stopThr=1e-12, numItermax=20_000), cost


@pytest.mark.parametrize("initial_plan", INITIAL_PLANS)
@pytest.mark.parametrize("epsilon", [0.05, 0.1])
def test_every_start_leads_to_the_entropic_plan(initial_plan, epsilon):
    solver = PlanSolver(epsilon, initial_plan, tolerance=1e-5)
    previous = solver.solve(*paired_features(70, seed=1), step=3)
    images, texts = paired_features(80, seed=2)
    plan = solver.solve(images, texts, step=11, previous=previous)
    reference, cost = reference_plan(images, texts, epsilon)
    ours = torch.exp((plan.f[:, None] + plan.g - torch.from_numpy(cost)).double() / epsilon).numpy() / 80**2
    assert abs(ours - reference).sum() < 1e-3
    diagnostics = plan.diagnostics
    assert diagnostics["objective"] == pytest.approx((reference * cost).sum(), rel=1e-3)
    entropy = -(reference * np.log(reference)).sum()
    assert diagnostics["entropy"] == pytest.approx(entropy, rel=1e-3)
    assert diagnostics["own_pair_mass"] == pytest.approx(reference.trace(), rel=1e-3)
    assert diagnostics["marginal_error"] <= 1e-5
    assert diagnostics["iterations"] >= 1
    assert diagnostics["seconds"] > 0
    assert plan.step == 11


def test_the_combinatorial_start_reports_the_error_that_it_reached():
    diagnostics = PlanSolver(additive_error=0.03).solve(*paired_features(80)).diagnostics
    assert 0 <= diagnostics["additive_error"] <= 0.03
    assert "additive_error" not in PlanSolver(initial_plan="none").solve(*paired_features(80)).diagnostics


def test_a_warm_start_saves_iterations():
    images, texts = paired_features(128)
    cold = PlanSolver(0.05, "none").solve(images, texts)
    warm = PlanSolver(0.05, "previous").solve(images, texts, previous=cold)
    assert warm.diagnostics["iterations"] < cold.diagnostics["iterations"] / 2


def test_drift_is_zero_between_equal_windows_and_grows_with_the_change():
    images, texts = paired_features(128)
    solver = PlanSolver()
    plan = solver.solve(images, texts)
    same = solver.solve(images, texts, previous=plan).diagnostics
    # All images to one side. (Their opposites would not do: these directions are as likely as the images themselves.)
    moved = F.normalize(images + torch.eye(24)[0])
    other = solver.solve(moved, texts, previous=plan).diagnostics
    assert same["drift_image"] == pytest.approx(0, abs=1e-5)
    assert same["drift_text"] == pytest.approx(0, abs=1e-5)
    assert other["drift_image"] > 0.05


def test_drift_tells_a_model_that_moved_from_other_pairs_of_the_same_model():
    """The last window's points and this one's are never the same; that alone must not look like a drift."""
    images, texts = paired_features(512, d=512)
    solver = PlanSolver()
    plan = solver.solve(images[:256], texts[:256])
    other_pairs = solver.solve(images[256:], texts[256:], previous=plan).diagnostics
    towards = 0.3 * torch.eye(512)[0]
    images, texts = F.normalize(images + towards), F.normalize(texts + towards)
    moved = solver.solve(images[256:], texts[256:], previous=plan).diagnostics
    for name in ("drift_image", "drift_text"):
        assert moved[name] > 3 * other_pairs[name]


def test_a_previous_plan_of_another_width_is_left_aside():
    previous = PlanSolver().solve(*paired_features(40, d=8))
    plan = PlanSolver(initial_plan="previous").solve(*paired_features(40, d=16), previous=previous)
    assert plan.diagnostics["marginal_error"] <= 1e-3


@pytest.mark.parametrize("initial_plan", INITIAL_PLANS)
def test_one_pair_couples_with_itself(initial_plan):
    plan = PlanSolver(initial_plan=initial_plan).solve(*paired_features(1))
    assert plan.diagnostics["own_pair_mass"] == pytest.approx(1)


@pytest.mark.parametrize("initial_plan", INITIAL_PLANS)
def test_equal_features_couple_evenly(initial_plan):
    images = torch.ones(6, 4) / 2
    plan = PlanSolver(initial_plan=initial_plan).solve(images, images)
    assert plan.diagnostics["own_pair_mass"] == pytest.approx(1 / 6, rel=1e-4)


def test_features_that_are_not_finite_are_refused():
    images, texts = paired_features(10)
    images[3, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        PlanSolver().solve(images, texts)


def test_a_plan_far_from_its_marginals_is_refused():
    with pytest.raises(RuntimeError, match=r"from its marginals after 2 iterations at epsilon=0\.001"):
        PlanSolver(0.001, "none", max_iterations=2).solve(*paired_features(60, noise=3))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"epsilon": 0.0}, "epsilon"),
        ({"initial_plan": "best"}, "combinatorial, emd, previous, none"),
        ({"additive_error": 0.0}, "additive_error"),
        ({"additive_error": 1.5}, "additive_error"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        PlanSolver(**setting)
