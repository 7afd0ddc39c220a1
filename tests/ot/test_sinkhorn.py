"""Sinkhorn against POT and against dense float64 formulas, from every start and on both paths."""

import importlib

import numpy as np
import ot as pot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

from openclip_otco.ot import (
    CosineCost,
    DenseCost,
    combinatorial_plan,
    exact_plan,
    half_steps,
    nearest_potentials,
    sinkhorn,
)
from openclip_otco.ot import cost as cost_module
from openclip_otco.ot.anderson import Anderson
from openclip_otco.ot.group import ALONE
from openclip_otco.ot.half_steps import KernelHalfSteps, StreamedHalfSteps

# `openclip_otco.ot.sinkhorn` is the function.
sinkhorn_module = importlib.import_module("openclip_otco.ot.sinkhorn")


def unit(n, d, seed, dtype=torch.float64):
    points = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (points / points.norm(dim=1, keepdim=True)).to(dtype)


def masses(size, seed, zeros=0):
    mass = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.05
    mass[:zeros] = 0
    return mass / mass.sum()


def uniform(size):
    return torch.full((size,), 1 / size, dtype=torch.float64)


def plan_of(result, matrix, a=None, b=None):
    """The plan that the potentials stand for, in float64."""
    a, b = uniform(matrix.shape[0]) if a is None else a, uniform(matrix.shape[1]) if b is None else b
    exponent = (result.f.double()[:, None] + result.g.double() - matrix.double()) / result.epsilon
    return (a[:, None] * b * exponent.exp()).numpy()


def primal(plan, matrix, epsilon, a=None, b=None):
    """`<σ, C> + ε KL(σ | a ⊗ b)`, written out."""
    a = np.full(plan.shape[0], 1 / plan.shape[0]) if a is None else a.numpy()
    b = np.full(plan.shape[1], 1 / plan.shape[1]) if b is None else b.numpy()
    base, held = np.outer(a, b), plan > 0
    kl = (plan[held] * np.log(plan[held] / base[held])).sum() - plan.sum() + base.sum()
    return (plan * matrix.numpy()).sum() + epsilon * kl


def stream(monkeypatch, elements=150):
    monkeypatch.setattr(cost_module, "DENSE_ENTRIES", 0)
    monkeypatch.setattr(cost_module, "TILE_ELEMENTS", elements)
    monkeypatch.setattr(cost_module, "LAZY_FACTOR", 1)


@pytest.fixture(params=["kept", "streamed"])
def path(request, monkeypatch):
    """Both ways to iterate: on a stored kernel, and in tiles."""
    if request.param == "streamed":
        stream(monkeypatch)
    return request.param


CASES = {
    "uniform square": (15, 15, None, None),
    "uniform wide": (17, 29, None, None),
    "uniform tall": (29, 17, None, None),
    "general": (19, 23, masses(19, 1), masses(23, 2)),
    "zeros": (19, 23, masses(19, 1, zeros=5), masses(23, 2, zeros=7)),
    "dominating": (9, 9, torch.cat([torch.tensor([1 - 8e-9]), torch.full((8,), 1e-9)]).double(), None),
    "one row": (1, 7, None, masses(7, 3)),
    "one column": (7, 1, masses(7, 3), None),
}


@pytest.fixture(params=CASES, ids=[name.replace(" ", "-") for name in CASES])
def case(request):
    n, m, a, b = CASES[request.param]
    a = None if a is None else a / a.sum()
    return 1 - unit(n, 6, 11) @ unit(m, 6, 12).T, a, b


@pytest.mark.parametrize("epsilon", [0.04, 0.3, 10.0])
def test_plan_is_pots_plan(case, path, epsilon):
    matrix, a, b = case
    result = sinkhorn(matrix, epsilon, a, b, tol=1e-12, max_iterations=100_000)
    ours = plan_of(result, matrix, a, b)
    row_mass, col_mass = uniform(len(matrix)) if a is None else a, uniform(matrix.shape[1]) if b is None else b
    held_rows, held_cols = row_mass > 0, col_mass > 0  # POT divides by empty masses
    theirs = np.zeros_like(ours)
    theirs[np.ix_(held_rows, held_cols)] = pot.sinkhorn(
        row_mass[held_rows].numpy(), col_mass[held_cols].numpy(), matrix[held_rows][:, held_cols].numpy(),
        epsilon, method="sinkhorn_log", stopThr=1e-13, numItermax=100_000,
    )  # fmt: skip
    assert result.converged
    np.testing.assert_allclose(ours, theirs, atol=1e-11, rtol=1e-6)
    assert torch.isfinite(result.f).all()
    assert torch.isfinite(result.g).all()


@pytest.mark.parametrize("epsilon", [0.005, 0.05, 1.0, 10.0])
@pytest.mark.parametrize("max_iterations", [1, 2, 7, 300])
def test_measured_error_is_the_row_error_and_columns_are_exact(case, path, epsilon, max_iterations):
    matrix, a, b = case
    result = sinkhorn(matrix, epsilon, a, b, tol=1e-6, max_iterations=max_iterations)
    plan = plan_of(result, matrix, a, b)
    row_mass, col_mass = uniform(len(matrix)) if a is None else a, uniform(matrix.shape[1]) if b is None else b
    assert result.marginal_error == pytest.approx(np.abs(plan.sum(1) - row_mass.numpy()).sum(), rel=1e-6, abs=1e-12)
    np.testing.assert_allclose(plan.sum(0), col_mass.numpy(), rtol=1e-9, atol=1e-14)
    assert result.converged == (result.marginal_error <= 1e-6)
    assert result.converged or result.iterations == max_iterations
    assert result.iterations <= max_iterations
    assert result.epsilon == epsilon


@pytest.mark.parametrize("epsilon", [0.04, 0.3, 10.0])
def test_value_is_the_primal_value(case, path, epsilon):
    matrix, a, b = case
    result = sinkhorn(matrix, epsilon, a, b, tol=1e-11, max_iterations=100_000)
    plan = plan_of(result, matrix, a, b)
    assert result.value == pytest.approx(primal(plan, matrix, epsilon, a, b), abs=1e-9)


def test_value_before_convergence_is_a_lower_bound(path):
    matrix = 1 - unit(20, 4, 1) @ unit(20, 4, 2).T
    best = sinkhorn(matrix, 0.05, tol=1e-9, max_iterations=5000).value
    values = [sinkhorn(matrix, 0.05, tol=1e-9, max_iterations=k).value for k in (1, 2, 4, 8, 32)]
    assert values == sorted(values)
    assert values[0] < best - 1e-4
    assert values[-1] <= best + 1e-12


@pytest.mark.parametrize("iterations", range(1, 40))
def test_the_result_is_the_best_point_of_the_iteration(path, monkeypatch, iterations):
    """An accelerated point may be worse than the one before. So further iterations never raise the error."""
    errors = []
    error_of = sinkhorn_module._marginal_error
    monkeypatch.setattr(sinkhorn_module, "_marginal_error", lambda *of: errors.append(error_of(*of)) or errors[-1])
    matrix = 1 - unit(20, 4, 1) @ unit(20, 4, 2).T
    result = sinkhorn(matrix, 0.02, tol=1e-15, max_iterations=iterations)
    assert len(errors) == result.iterations == iterations
    assert result.marginal_error == min(errors)
    assert np.abs(plan_of(result, matrix).sum(1) - 1 / 20).sum() == pytest.approx(min(errors), abs=1e-12)
    if iterations == 39:
        assert result.marginal_error < 2e-3 * errors[0]


def plain_iterations(matrix, epsilon, tol):
    """How many iterations Sinkhorn takes from zero without acceleration, in the log domain in float64."""
    f, g = np.zeros(matrix.shape[0]), np.zeros(matrix.shape[1])
    for iteration in range(1, 10_000):
        f = -epsilon * logsumexp((g - matrix) / epsilon - np.log(len(g)), axis=1)
        g = -epsilon * logsumexp((f[:, None] - matrix) / epsilon - np.log(len(f)), axis=0)
        plan = np.exp((f[:, None] + g - matrix) / epsilon) / matrix.size
        if np.abs(plan.sum(1) - 1 / len(f)).sum() <= tol:
            return iteration
    raise AssertionError("no convergence")


@pytest.mark.parametrize("epsilon", [0.02, 0.05])
def test_acceleration_takes_at_most_half_of_the_plain_iterations(path, epsilon):
    matrix = 1 - unit(60, 8, 1) @ unit(60, 8, 2).T
    plain = plain_iterations(matrix.numpy(), epsilon, 1e-6)
    assert sinkhorn(matrix, epsilon, tol=1e-6).iterations <= plain / 2


def test_acceleration_falls_back_where_it_leads_astray():
    """A map whose combined points are useless: the plain steps, which contract, are taken in between."""
    weight = torch.ones(4, dtype=torch.float64)
    acceleration, point = Anderson(weight), torch.full((4,), 8.0, dtype=torch.float64)
    rough = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    errors = []
    for step in range(300):
        image = 0.8 * point * (1 + 0.2 * torch.sin(rough * step))  # another map each time
        errors.append(float(point.abs().max()))
        point = acceleration.next(point, image, errors[-1])
    assert errors[-1] < 1e-2 * errors[0]


@pytest.mark.parametrize("scale", [1e-6, 1e-2, 50.0, 1e6])
def test_scaling_cost_and_epsilon_together_scales_the_potentials(path, scale):
    matrix = 1 - unit(15, 5, 1) @ unit(18, 5, 2).T
    plain, scaled = sinkhorn(matrix, 0.05, tol=1e-10), sinkhorn(matrix * scale, 0.05 * scale, tol=1e-10)
    assert scaled.value == pytest.approx(plain.value * scale, rel=1e-9)
    torch.testing.assert_close(scaled.g, plain.g * scale, rtol=1e-7, atol=1e-9 * scale)


@pytest.mark.parametrize("constant", [-3.0, 1000.0])
def test_a_constant_moves_the_value_and_not_the_plan(path, constant):
    matrix = 1 - unit(15, 5, 1) @ unit(18, 5, 2).T
    plain, moved = sinkhorn(matrix, 0.05, tol=1e-9), sinkhorn(matrix + constant, 0.05, tol=1e-9)
    assert moved.value - plain.value == pytest.approx(constant, abs=1e-9)
    np.testing.assert_allclose(plan_of(plain, matrix), plan_of(moved, matrix + constant), rtol=1e-7)


@given(n=st.integers(1, 12), m=st.integers(1, 12), seed=st.integers(0, 999), epsilon=st.sampled_from([0.02, 0.2, 2.0]))
@settings(max_examples=60, deadline=None)
def test_permuted_points_have_permuted_potentials(n, m, seed, epsilon):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.rand(n, m, generator=generator, dtype=torch.float64)
    a, b = masses(n, seed), masses(m, seed + 1)
    rows, cols = torch.randperm(n, generator=generator), torch.randperm(m, generator=generator)
    plain = sinkhorn(matrix, epsilon, a, b, tol=1e-9, max_iterations=20_000)
    moved = sinkhorn(matrix[rows][:, cols], epsilon, a[rows], b[cols], tol=1e-9, max_iterations=20_000)
    expected = plan_of(plain, matrix, a, b)[np.ix_(rows.numpy(), cols.numpy())]
    np.testing.assert_allclose(plan_of(moved, matrix[rows][:, cols], a[rows], b[cols]), expected, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("epsilon", [0.005, 0.05, 10.0])
def test_streaming_path_equals_kept_path(monkeypatch, dtype, epsilon):
    cost = CosineCost(unit(37, 8, 1, dtype), unit(23, 8, 2, dtype))
    # In float32 the error itself can be told to about 1e-7/ε only.
    tol, atol = (1e-4, 1e-3) if dtype == torch.float32 else (1e-10, 1e-8)
    kept = sinkhorn(cost, epsilon, tol=tol)
    stream(monkeypatch)
    streamed = sinkhorn(cost, epsilon, tol=tol)
    assert kept.converged
    assert streamed.converged
    torch.testing.assert_close(streamed.f, kept.f, atol=atol, rtol=0)
    torch.testing.assert_close(streamed.g, kept.g, atol=atol, rtol=0)
    assert streamed.iterations == pytest.approx(kept.iterations, rel=0.5, abs=1)


@given(
    n=st.integers(1, 9), m=st.integers(1, 9), seed=st.integers(0, 999), epsilon=st.sampled_from([0.01, 0.1, 2.0]),
    spread=st.sampled_from([0.0, 0.1, 5.0]),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_half_steps_of_both_kinds_are_those_of_the_formula(n, m, seed, epsilon, spread):
    """From near potentials and from far ones, which leave the stored kernel and the plain sums."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.rand(n, m, generator=generator, dtype=torch.float64)
    a, b = masses(n, seed), masses(m, seed + 1)
    f = spread * torch.randn(n, generator=generator, dtype=torch.float64)
    exact_g = -epsilon * logsumexp((f[:, None] - matrix) / epsilon + a.log()[:, None], axis=0)
    exact_f = -epsilon * logsumexp((exact_g - matrix.numpy()) / epsilon + b.log().numpy(), axis=1)
    cost = DenseCost(matrix)
    kernel = KernelHalfSteps(cost, torch.zeros(m, dtype=torch.float64), epsilon, a, b, ALONE)
    streamed = StreamedHalfSteps(cost.transposed(), epsilon, b, a, ALONE)
    for half_steps_of_a_kind in (kernel, streamed):
        g, next_f = half_steps_of_a_kind.step(f)
        np.testing.assert_allclose(g, exact_g, atol=1e-11 * (1 + spread), rtol=0)
        np.testing.assert_allclose(next_f, exact_f, atol=1e-11 * (1 + spread), rtol=0)
    first_f = -epsilon * logsumexp(-matrix.numpy() / epsilon + b.log().numpy(), axis=1)
    kernel = KernelHalfSteps(cost, torch.zeros(m, dtype=torch.float64), epsilon, a, b, ALONE)
    np.testing.assert_allclose(kernel.exact_rows(torch.zeros(m)), first_f, atol=1e-11, rtol=0)


class Spy:
    """A cost that remembers the greatest number of entries it was asked for at once."""

    def __init__(self, cost, record):
        self.cost, self.record = cost, record
        self.shape, self.dtype, self.device = cost.shape, cost.dtype, cost.device

    def rows(self, index, out=None):
        rows = self.cost.rows(index)
        self.record.append(rows.numel())
        return rows

    def entries(self, rows, cols):
        return self.cost.entries(rows, cols)

    def restricted(self, rows, cols):
        return Spy(self.cost.restricted(rows, cols), self.record)

    def transposed(self):
        return Spy(self.cost.transposed(), self.record)


def test_streaming_asks_for_no_more_than_a_tile(monkeypatch):
    stream(monkeypatch, elements=500)
    record = []
    spy = Spy(CosineCost(unit(90, 8, 1), unit(70, 8, 2)), record)
    result = sinkhorn(spy, 0.05)
    nearest_potentials(spy, [result.g, torch.zeros_like(result.g)], 0.05)
    assert max(record) <= 500
    assert sum(record) >= 90 * 70 * (result.iterations + 1)  # it did go over the whole cost, each time


def test_the_limit_of_the_kept_kernel_is_8192_squared():
    assert cost_module.DENSE_ENTRIES == 8192**2


def count_kernels(monkeypatch):
    kernels, plain = [], half_steps.KernelHalfSteps._absorb
    monkeypatch.setattr(half_steps.KernelHalfSteps, "_absorb", lambda *args: kernels.append(1) or plain(*args))
    return kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("start", ["zero", "far"])
def test_absorption_keeps_small_epsilon_finite(monkeypatch, dtype, start):
    """Clusters and a far start: the scalings leave any float32 range, and the plan is still right."""
    kernels = count_kernels(monkeypatch)
    x, y = unit(30, 3, 1), unit(30, 3, 2)
    matrix = (1 - x @ y.T) * torch.linspace(0.1, 1, 30, dtype=torch.float64)[:, None]
    init = (torch.zeros(30), torch.linspace(-3, 3, 30)) if start == "far" else None
    # A first half-step settles what potentials can; the mass of a lone column has to travel by scalings.
    b = torch.full((30,), 1e-12, dtype=torch.float64)
    b[3] = 1
    b /= b.sum()
    for col_mass in (None, b):
        result = sinkhorn(matrix.to(dtype), 0.005, b=col_mass, init=init, tol=1e-3, max_iterations=20_000)
        assert torch.isfinite(torch.cat([result.f, result.g])).all()
        assert result.converged
        plan = plan_of(result, matrix, b=col_mass)
        np.testing.assert_allclose(plan.sum(1), 1 / 30, atol=1.1e-3)
        assert np.abs(plan.sum(1) - 1 / 30).sum() <= 1.1e-3
    assert len(kernels) > 2  # more than one for each of the two solutions


@pytest.mark.parametrize("limit", [-10.0, -2.0])
def test_absorbing_often_changes_nothing(monkeypatch, limit):
    matrix = 1 - unit(25, 4, 1) @ unit(31, 4, 2).T
    rare = sinkhorn(matrix, 0.01, tol=1e-9, max_iterations=50_000)
    kernels = count_kernels(monkeypatch)
    monkeypatch.setattr(half_steps, "_ABSORB", limit)
    often = sinkhorn(matrix, 0.01, tol=1e-9, max_iterations=50_000)
    assert len(kernels) > 1
    torch.testing.assert_close(often.g, rare.g, atol=1e-9, rtol=0)


def test_the_log_domain_takes_over_from_an_underflowing_kernel(monkeypatch):
    """Scalings that are never absorbed reach the end of float32, from where the iteration must go on."""
    monkeypatch.setattr(half_steps, "_ABSORB", float("inf"))
    grid = torch.linspace(0, 1, 40)
    matrix = (grid[:, None] - grid) ** 2 * 2
    a, b = torch.exp(-40 * (grid - 0.1) ** 2), torch.exp(-40 * (grid - 0.9) ** 2)
    a, b = (a / a.sum()).double(), (b / b.sum()).double()
    result = sinkhorn(matrix, 0.005, a / a.sum(), b / b.sum(), max_iterations=20_000)
    assert result.converged
    assert torch.isfinite(torch.cat([result.f, result.g])).all()
    reference = sinkhorn(matrix.double(), 0.005, a / a.sum(), b / b.sum(), tol=1e-9, max_iterations=100_000)
    assert result.value == pytest.approx(reference.value, abs=2e-3)


def test_every_start_reaches_the_same_fixed_point(path):
    matrix, epsilon = 1 - unit(20, 6, 1) @ unit(26, 6, 2).T, 0.03
    a, b = masses(20, 1), masses(26, 2, zeros=4)
    cold = sinkhorn(matrix, epsilon, a, b, tol=1e-11, max_iterations=50_000)
    starts = {
        "combinatorial": combinatorial_plan(matrix, 0.05, a, b),
        "exact": exact_plan(matrix, a, b),
        "other epsilon": sinkhorn(matrix, 0.1, a, b),
        "potentials": (torch.randn(20), torch.randn(26, generator=torch.Generator().manual_seed(3))),
        "far potentials": (torch.zeros(20), torch.linspace(-5, 5, 26)),
    }
    for name, start in starts.items():
        warm = sinkhorn(matrix, epsilon, a, b, init=start, tol=1e-11, max_iterations=50_000)
        assert warm.converged, name
        np.testing.assert_allclose(plan_of(warm, matrix, a, b), plan_of(cold, matrix, a, b), atol=1e-10, err_msg=name)
        assert warm.value == pytest.approx(cold.value, abs=1e-9)


def test_a_start_from_its_own_result_needs_one_iteration(path):
    matrix = 1 - unit(20, 6, 1) @ unit(26, 6, 2).T
    cold = sinkhorn(matrix, 0.02, tol=1e-6)
    for init in (cold, (cold.f, cold.g)):
        warm = sinkhorn(matrix, 0.02, init=init, tol=1e-6)
        assert warm.iterations == 1 < cold.iterations
        assert warm.converged


@given(
    n=st.integers(1, 12), m=st.integers(1, 12), epsilon=st.sampled_from([0.005, 0.05, 0.5, 10.0]),
    scale=st.sampled_from([0.01, 1.0, 2.0]), dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000), zeros=st.booleans(),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_a_converged_result_is_a_coupling(n, m, epsilon, scale, dtype, seed, zeros):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.rand(n, m, generator=generator, dtype=torch.float64) * scale
    a, b = masses(n, seed, zeros=n // 2 if zeros else 0), masses(m, seed + 1, zeros=m // 3 if zeros else 0)
    result = sinkhorn(matrix.to(dtype), epsilon, a, b, tol=1e-3, max_iterations=500)
    plan = plan_of(result, matrix.to(dtype), a, b)
    assert np.isfinite(plan).all()
    np.testing.assert_allclose(plan.sum(0), b.numpy(), atol=2e-4)
    assert np.abs(plan.sum(1) - a.numpy()).sum() == pytest.approx(result.marginal_error, abs=2e-4)
    assert result.converged == (result.marginal_error <= 1e-3)


def test_acceleration_does_not_run_away_along_the_constant():
    """Found by hypothesis: potentials of 7.5e11, whose last digits the plan then lacks."""
    matrix = 2.0 * torch.rand(2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    a, b = masses(2, 3, zeros=0), masses(2, 4, zeros=0)
    result = sinkhorn(matrix, 0.005, a, b, tol=1e-3, max_iterations=500)
    assert result.f.abs().max() < 1e4
    np.testing.assert_allclose(plan_of(result, matrix, a, b).sum(0), b.numpy(), atol=2e-4)


def test_large_epsilon_tends_to_the_independent_coupling_and_small_to_the_optimum():
    matrix = 1 - unit(12, 5, 1) @ unit(12, 5, 2).T
    a, b = masses(12, 1), masses(12, 2)
    far = sinkhorn(matrix, 1e5, a, b, tol=1e-9)
    np.testing.assert_allclose(plan_of(far, matrix, a, b), np.outer(a, b), rtol=1e-4)
    near = sinkhorn(matrix, 0.005, a, b, tol=1e-6, max_iterations=100_000)
    opt = pot.emd2(a.numpy(), b.numpy(), matrix.numpy())
    assert opt - 1e-9 <= (plan_of(near, matrix, a, b) * matrix.numpy()).sum() <= opt + 0.005 * np.log(144)


def test_nearest_potentials_finds_the_solution_among_others():
    matrix, epsilon = 1 - unit(20, 6, 1) @ unit(26, 6, 2).T, 0.05
    a, b = masses(20, 1, zeros=3), masses(26, 2, zeros=4)
    solved = sinkhorn(matrix, epsilon, a, b, tol=1e-10, max_iterations=50_000).g
    noise = torch.randn(26, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    candidates = [torch.zeros_like(solved), solved + noise, solved + 0.05 * noise, solved + 3.0, solved + 0.3 * noise]
    assert nearest_potentials(matrix, candidates, epsilon, a, b) == 3  # a constant is no distance
    assert nearest_potentials(matrix, [c for i, c in enumerate(candidates) if i != 3], epsilon, a, b) == 2
    assert nearest_potentials(matrix, candidates[:1], epsilon, a, b) == 0


def test_nearest_potentials_measures_the_column_error_in_l1():
    """Independent recomputation: half a step from `g`, then the columns' L1 error, on ten random candidates."""
    matrix, epsilon = 1 - unit(9, 4, 1) @ unit(13, 4, 2).T, 0.1
    a, b = masses(9, 4), masses(13, 5)
    candidates = [torch.from_numpy(np.random.default_rng(s).normal(size=13) * 0.2) for s in range(10)]
    errors = []
    for g in candidates:
        kernel = b * torch.exp((g - matrix) / epsilon)
        plan = a[:, None] * kernel / kernel.sum(1, keepdim=True)
        errors.append(float((plan.sum(0) - b).abs().sum()))
    assert nearest_potentials(matrix, candidates, epsilon, a, b) == int(np.argmin(errors))


@pytest.mark.parametrize("max_iterations", [1, 3, 2000])
def test_a_point_is_chosen_between_iterations_alone(path, monkeypatch, max_iterations):
    asked, choose = [], Anderson.next
    monkeypatch.setattr(Anderson, "next", lambda *of: asked.append(of) or choose(*of))
    found = sinkhorn(CosineCost(unit(20, 8, 1), unit(20, 8, 2)), 0.05, max_iterations=max_iterations)
    assert found.converged == (max_iterations == 2000)
    assert len(asked) == found.iterations - 1


def test_an_error_that_is_nan_ends_the_iteration(path, monkeypatch):
    monkeypatch.setattr(sinkhorn_module, "_marginal_error", lambda *of: torch.nan)
    found = sinkhorn(CosineCost(unit(20, 8, 1), unit(20, 8, 2)), 0.05)
    assert (found.iterations, found.converged) == (1, False)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_nearest_potentials_never_picks_broken_ones(broken):
    matrix = torch.rand(5, 6, generator=torch.Generator().manual_seed(0))
    assert nearest_potentials(matrix, [torch.full((6,), broken), torch.randn(6)], 0.1) == 1


@pytest.mark.parametrize("candidates", [[], [torch.zeros(1)], [torch.zeros(6), torch.zeros(5)]])
def test_nearest_potentials_refuses_none_and_wrong_lengths(candidates):
    with pytest.raises(ValueError, match=r"at least one potential of shape \(6,\)"):
        nearest_potentials(torch.rand(5, 6), candidates, 0.1)


@pytest.mark.parametrize(
    "setting",
    [
        {"epsilon": 0.0}, {"epsilon": -1.0}, {"epsilon": float("nan")}, {"epsilon": float("inf")},
        {"tol": 0.0}, {"tol": -1.0}, {"tol": float("nan")}, {"max_iterations": 0},
    ],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_refused(path, setting):
    (name,) = setting
    with pytest.raises(ValueError, match=f"^{name} must be (positive|at least 1); got "):
        sinkhorn(torch.rand(3, 4), **setting)


@pytest.mark.parametrize(
    ("init", "says"),
    [
        ((torch.zeros(3), torch.zeros(3)), r"shapes \(3,\) and \(4,\); got \(3,\) and \(3,\)"),
        ((torch.zeros(4), torch.zeros(4)), "got"),
        ((torch.zeros(3), torch.tensor([0, 0, 0, torch.nan])), "finite"),
        ((torch.zeros(3), torch.tensor([0, 0, 0, -torch.inf])), "finite"),
    ],
)
def test_bad_starts_are_refused(init, says):
    with pytest.raises(ValueError, match=says):
        sinkhorn(torch.rand(3, 4), init=init)


@pytest.mark.parametrize(
    ("cost", "b", "says"),
    [
        (torch.full((2, 2), torch.inf), None, "large finite cost"),
        (torch.ones(2, 2), torch.tensor([1.0, -0.5]), "non-negative"),
        (torch.ones(2, 2), torch.ones(3) / 3, "shape"),
        (torch.ones(0, 2), None, "non-empty"),
    ],
)
def test_bad_costs_and_marginals_are_refused(cost, b, says):
    with pytest.raises(ValueError, match=says):
        sinkhorn(cost, b=b)


def test_inputs_are_left_alone_and_nothing_is_recorded(path):
    matrix = torch.rand(6, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    a, g = torch.full((6,), 1 / 6, requires_grad=True), torch.zeros(5, requires_grad=True)
    before = matrix.detach().clone()
    result = sinkhorn(DenseCost(matrix), 0.1, a=a, init=(torch.zeros(6), g))
    assert not result.f.requires_grad
    assert not result.g.requires_grad
    assert torch.equal(matrix, before)
    assert torch.equal(g, torch.zeros(5))
    assert torch.equal(a, torch.full((6,), 1 / 6))
