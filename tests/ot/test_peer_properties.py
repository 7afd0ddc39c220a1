"""Properties that geomloss asks of its solver, asked of ours: all of them follow from what is solved, not from how."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from openclip_otco.ot import SinkhornResult, combinatorial_plan, exact_plan, sinkhorn, sinkhorn_divergence

SIZES = st.integers(1, 9)
SEEDS = st.integers(0, 10_000)
EPSILONS = st.sampled_from([0.3, 1.0, 5.0])


def problem(n: int, m: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A cost in [-1, 1] and masses that do not sum to one."""
    rng = np.random.default_rng(seed)
    a, b = rng.random(n) + 0.1, rng.random(m) + 0.1
    return (
        torch.from_numpy(rng.uniform(-1, 1, (n, m))),
        torch.from_numpy(a / a.sum() * 3),
        torch.from_numpy(b / b.sum() * 3),
    )


def solved(matrix: Tensor, epsilon: float, a: Tensor, b: Tensor) -> SinkhornResult:
    result = sinkhorn(matrix, epsilon, a, b, tol=1e-10, max_iterations=5_000)
    assert result.converged
    return result


def plan_of(result: SinkhornResult, matrix: Tensor, a: Tensor, b: Tensor) -> Tensor:
    density = ((result.f[:, None] + result.g - matrix) / result.epsilon).exp()
    return density * (a / a.sum())[:, None] * (b / b.sum())


@given(n=SIZES, m=SIZES, seed=SEEDS, epsilon=EPSILONS)
def test_exchanging_the_sides_transposes_the_plan(n: int, m: int, seed: int, epsilon: float) -> None:
    matrix, a, b = problem(n, m, seed)
    there, back = solved(matrix, epsilon, a, b), solved(matrix.T, epsilon, b, a)
    assert there.value == pytest.approx(back.value, abs=1e-7)
    torch.testing.assert_close(plan_of(there, matrix, a, b), plan_of(back, matrix.T, b, a).T, atol=1e-8, rtol=0)
    # Potentials are determined up to a constant that one side gains and the other loses.
    constant = (there.f - back.g).mean()
    torch.testing.assert_close(there.f - constant, back.g, atol=1e-6, rtol=0)
    torch.testing.assert_close(there.g + constant, back.f, atol=1e-6, rtol=0)


@given(
    n=SIZES, m=SIZES, seed=SEEDS, epsilon=EPSILONS,
    scale=st.sampled_from([0.01, 0.3, 7.0, 100.0]), offset=st.sampled_from([-100.0, 0.0, 3.0]),
)  # fmt: skip
def test_value_is_linear_in_the_cost(n: int, m: int, seed: int, epsilon: float, scale: float, offset: float) -> None:
    """`OT_sε(sC + c) = s OT_ε(C) + c`, with the same plan."""
    matrix, a, b = problem(n, m, seed)
    plain, scaled = solved(matrix, epsilon, a, b), solved(scale * matrix + offset, scale * epsilon, a, b)
    assert scaled.value == pytest.approx(scale * plain.value + offset, abs=1e-6 * (scale + 1))
    torch.testing.assert_close(
        plan_of(scaled, scale * matrix + offset, a, b), plan_of(plain, matrix, a, b), atol=1e-7, rtol=0
    )


@given(cost=st.floats(-100, 100), epsilon=st.floats(0.01, 10), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_between_two_points_there_is_one_plan(cost: float, epsilon: float, dtype: torch.dtype) -> None:
    matrix = torch.tensor([[cost]], dtype=dtype)
    result = sinkhorn(matrix, epsilon)
    assert result.converged
    assert result.iterations == 1
    assert result.value == pytest.approx(cost, rel=1e-6, abs=1e-6)
    assert combinatorial_plan(matrix).value == exact_plan(matrix).value == pytest.approx(cost, rel=1e-6)


@given(n=st.integers(1, 8), seed=SEEDS)
def test_a_clear_permutation_is_found_by_all_three(n: int, seed: int) -> None:
    """Entries of the permutation are at least a quarter cheaper than all others."""
    rng = np.random.default_rng(seed)
    cost, order = rng.uniform(0.5, 1, (n, n)), rng.permutation(n)
    cost[np.arange(n), order] = rng.uniform(0, 0.25, n)
    expected = np.zeros((n, n))
    expected[np.arange(n), order] = 1 / n
    matrix = torch.from_numpy(cost)
    result = sinkhorn(matrix, 0.02, init=exact_plan(matrix), tol=1e-5)
    uniform = torch.ones(n, dtype=torch.float64)
    np.testing.assert_allclose(plan_of(result, matrix, uniform, uniform), expected, atol=1e-4)
    np.testing.assert_allclose(exact_plan(matrix).dense(), expected, atol=1e-12)
    np.testing.assert_allclose(combinatorial_plan(matrix, 0.25 / n / 2).dense(), expected, atol=1e-12)


@given(n=st.integers(1, 5), seed=SEEDS)
def test_small_epsilon_reaches_the_optimum_of_scipy(n: int, seed: int) -> None:
    """`0 <= OT_ε - OT <= ε log n` under uniform masses, as the entropy of an assignment to `1/n²` is `log n`."""
    matrix = problem(n, n, seed)[0]
    optimum = matrix.numpy()[linear_sum_assignment(matrix.numpy())].mean()
    result = sinkhorn(matrix, 0.02, init=exact_plan(matrix), tol=1e-3)
    assert result.converged
    # The value is the dual's, low by at most tol times the spread of the potentials.
    assert optimum - 4e-3 <= result.value <= optimum + 0.02 * np.log(n) + 1e-9


@given(n=st.integers(2, 8), d=st.integers(1, 4), seed=SEEDS)
def test_gradients_of_convex_functions_are_optimal(n: int, d: int, seed: int) -> None:
    """Brenier: points moved along the gradient of a convex function are matched with where they were."""
    rng = np.random.default_rng(seed)
    x, keys = rng.normal(size=(n, d)), rng.normal(size=(n, d))
    a = torch.from_numpy(rng.random(n) + 0.1)
    a /= a.sum()
    away = x[:, None] - keys  # of a sum of distances to key points
    y = x + (away / np.maximum(np.linalg.norm(away, axis=2, keepdims=True), 1e-12)).sum(1)
    matrix = torch.from_numpy(((x[:, None] - y) ** 2).sum(2))
    optimum = float(a @ matrix.diagonal())
    assert exact_plan(matrix, a, a).value == pytest.approx(optimum, abs=1e-9)
    plan = combinatorial_plan(matrix, 0.01, a, a)
    assert optimum - 1e-9 <= plan.value <= optimum + 0.01 * float(matrix.max() - matrix.min()) + 1e-9


@given(n=SIZES, m=SIZES, d=st.integers(2, 5), seed=SEEDS, epsilon=st.sampled_from([0.3, 1.0]))
def test_divergence_does_not_know_the_order_of_points(n: int, m: int, d: int, seed: int, epsilon: float) -> None:
    rng = np.random.default_rng(seed)
    x, y = (torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(size, d))), dim=1) for size in (n, m))
    order = torch.from_numpy(rng.permutation(n))
    plain = sinkhorn_divergence(x, y, epsilon, tol=1e-9)
    shuffled = sinkhorn_divergence(x[order], y, epsilon, tol=1e-9)
    assert shuffled.item() == pytest.approx(plain.item(), abs=1e-7)


@given(n=st.integers(2, 6), seed=SEEDS)
def test_descent_along_the_gradient_of_the_divergence_descends(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = (torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(n, 3))), dim=1) for _ in range(2))
    x.requires_grad_()
    before = sinkhorn_divergence(x, y, 0.3, tol=1e-9)
    before.backward()
    assert x.grad is not None
    step = 1e-3 * x.grad
    after = sinkhorn_divergence(x.detach() - step, y, 0.3, tol=1e-9).item()
    slope = float((step * x.grad).sum())
    assert after <= before.item() - 0.5 * slope + 1e-9
