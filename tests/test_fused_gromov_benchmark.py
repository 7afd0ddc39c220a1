"""The benchmark of fused Gromov-Wasserstein: its costs against the definition, its density inside and outside."""

from __future__ import annotations

import fused_gromov
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fused_gromov import FusedPlan, Structure, structure_costs

from openclip_otco.method.solver import PlanSolver


def test_structure_costs_are_those_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    images, texts, plan = rng.normal(size=(4, 7)), rng.normal(size=(3, 7)), rng.dirichlet(np.ones(49)).reshape(7, 7)
    distances = (images[:, None, :, None] - texts[None, :, None, :]) ** 2
    np.testing.assert_allclose(structure_costs(images, texts, plan), (distances * plan).sum((2, 3)))


def test_structures_are_centred_and_on_one_scale() -> None:
    points = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    structure = Structure(points, 5.0)
    inside = structure(points)
    np.testing.assert_allclose(inside, inside.T, atol=1e-12)
    np.testing.assert_allclose(inside.mean(1), 0, atol=1e-12)
    assert inside.std(ddof=1) == pytest.approx(1)
    # A point has the same row whether it is asked alone or with others.
    np.testing.assert_allclose(structure(points[5:6])[0], inside[5], atol=1e-12)


@pytest.mark.parametrize("strength", fused_gromov.STRENGTHS)
def test_the_density_outside_is_that_inside(strength: float) -> None:
    torch.manual_seed(0)
    v = F.normalize(torch.randn(96, 16), dim=1)
    t = F.normalize(v + torch.randn(96, 16) / 8, dim=1)
    costs = (1 - v.double() @ t.double().T).numpy()
    images, texts = Structure(v, 1.0), Structure(t, 1.0)
    fused = FusedPlan(costs, images(v), texts(t), strength, 0.1)
    density = fused.log_density()
    # A plan's density has mean 1 in each row and column.
    np.testing.assert_allclose(np.exp(density).mean(0), 1, rtol=1e-2)
    np.testing.assert_allclose(np.exp(density).mean(1), 1, rtol=1e-2)
    # A point of the window is asked as one that the plan never saw.
    asked = fused.log_mass(costs, costs.T, np.diag(costs), images(v), texts(t))
    np.testing.assert_allclose(asked, np.diag(density), atol=2e-2)
    # It is the plan of POT: a fixed point of the linear problem.
    np.testing.assert_allclose(np.exp(density) / 96**2, fused.plan, atol=1e-4)


def test_without_structure_it_is_the_plan() -> None:
    torch.manual_seed(0)
    v, t = (F.normalize(torch.randn(96, 16), dim=1) for _ in range(2))
    costs = (1 - v.double() @ t.double().T).numpy()
    none = np.zeros((96, 96))
    fused = FusedPlan(costs, none, none, 0.0, 0.1)
    plan = PlanSolver(epsilon=0.1).solve(v, t)
    np.testing.assert_allclose(np.diag(fused.log_density()), plan.log_mass(v, t).numpy(), atol=2e-2)
