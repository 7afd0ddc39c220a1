"""Sinkhorn divergence: its properties, its value against a dense reference, its gradient against differences."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openclip_otco.ot import cost as cost_module
from openclip_otco.ot import sinkhorn_divergence
from openclip_otco.ot.divergence import entropic_value


def unit(n, d, seed, dtype=torch.float64):
    points = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (points / points.norm(dim=1, keepdim=True)).to(dtype)


def masses(size, seed, zeros=0):
    mass = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.05
    mass[:zeros] = 0
    return mass / mass.sum()


def reference_value(x, y, epsilon, a=None, b=None):
    """`OT_ε` by plain log-domain iterations on the matrix, and its primal value."""
    n, m = len(x), len(y)
    a, b = np.full(n, 1 / n) if a is None else a.numpy(), np.full(m, 1 / m) if b is None else b.numpy()
    cost = 1 - x.numpy() @ y.numpy().T
    f, g = np.zeros(n), np.zeros(m)
    for _ in range(20_000):
        f = -epsilon * np.log((b * np.exp((g - cost) / epsilon)).sum(1))
        new = -epsilon * np.log((a[:, None] * np.exp((f[:, None] - cost) / epsilon)).sum(0))
        if np.abs(new - g).max() < 1e-15:
            break
        g = new
    log_density = (f[:, None] + g - cost) / epsilon
    plan = np.outer(a, b) * np.exp(log_density)
    return (plan * (cost + epsilon * log_density)).sum()


def reference_divergence(x, y, epsilon, a=None, b=None):
    own = reference_value(x, x, epsilon, a, a) + reference_value(y, y, epsilon, b, b)
    return reference_value(x, y, epsilon, a, b) - own / 2


CASES = {
    "square": (14, 14, None, None),
    "wide": (9, 16, None, None),
    "general": (12, 10, masses(12, 1), masses(10, 2)),
    "zeros": (12, 10, masses(12, 1, zeros=4), masses(10, 2, zeros=3)),
}


@pytest.fixture(params=CASES)
def case(request):
    n, m, a, b = CASES[request.param]
    return unit(n, 5, 1), unit(m, 5, 2), a, b


@pytest.mark.parametrize("epsilon", [0.15, 0.5, 10.0])
def test_value_is_the_dense_reference(case, epsilon):
    x, y, a, b = case
    value = sinkhorn_divergence(x, y, epsilon, a, b, tol=1e-11, max_iterations=50_000)
    assert value.shape == ()
    assert value.item() == pytest.approx(reference_divergence(x, y, epsilon, a, b), abs=1e-9)


@pytest.mark.parametrize("epsilon", [0.02, 0.1, 1.0])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.float16, 1e-6)])
def test_no_distance_from_itself(epsilon, dtype, atol):
    x = unit(20, 6, 1, dtype)
    assert abs(sinkhorn_divergence(x, x, epsilon).item()) <= atol
    a = masses(20, 3)
    assert abs(sinkhorn_divergence(x, x.clone(), epsilon, a, a).item()) <= atol
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    shuffled = sinkhorn_divergence(x, x[order], epsilon, a, a[order], tol=1e-5, max_iterations=3000).item()
    assert abs(shuffled) <= 1e-4


def test_split_masses_are_the_same_cloud():
    x, a = unit(8, 5, 1), masses(8, 2)
    doubled = torch.cat([x, x])
    halves = torch.cat([0.25 * a, 0.75 * a])
    assert abs(sinkhorn_divergence(x, doubled, 0.1, a, halves, tol=1e-8, max_iterations=20_000).item()) <= 1e-6


@given(
    n=st.integers(1, 12), m=st.integers(1, 12), seed=st.integers(0, 10_000), d=st.integers(2, 6),
    epsilon=st.sampled_from([0.1, 0.3, 1.0, 10.0]), weighted=st.booleans(),
)  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_symmetric_and_not_negative(n, m, seed, d, epsilon, weighted):
    x, y = unit(n, d, seed), unit(m, d, seed + 1)
    a, b = (masses(n, seed), masses(m, seed + 2)) if weighted else (None, None)
    there = sinkhorn_divergence(x, y, epsilon, a, b, tol=1e-7).item()
    back = sinkhorn_divergence(y, x, epsilon, b, a, tol=1e-7).item()
    # The dual value lies below by at most tol times the spread of the potentials, unless iterations ran out.
    assert there == pytest.approx(back, abs=1e-4)
    assert there >= -1e-4


def test_grows_as_clouds_part_and_tells_different_clouds_apart():
    x, y = unit(20, 6, 1), unit(20, 6, 2)
    path = [torch.nn.functional.normalize((1 - t) * x + t * y, dim=1) for t in (0.0, 0.2, 0.4, 0.6)]
    values = [sinkhorn_divergence(x, z, 0.1, tol=1e-8).item() for z in path]
    assert values == sorted(values)
    assert values[-1] > 0.01


@pytest.mark.parametrize("which", ["x", "y", "both"])
def test_gradcheck(case, which):
    x, y, a, b = case
    x, y = x[:, :3].clone(), y[:, :3].clone()

    def value(p, q):
        return sinkhorn_divergence(p, q, 0.2, a, b, tol=1e-13, max_iterations=3000)

    x.requires_grad_(which != "y")
    y.requires_grad_(which != "x")
    assert torch.autograd.gradcheck(value, (x, y), eps=1e-5, atol=1e-8, rtol=1e-5)


def test_gradient_of_the_same_tensor_on_both_sides_vanishes():
    x = unit(9, 4, 1).requires_grad_()
    sinkhorn_divergence(x, x, 0.1, tol=1e-12, max_iterations=20_000).backward()
    assert x.grad.abs().max() < 1e-10


@pytest.mark.parametrize("epsilon", [0.15, 0.5])
def test_gradient_against_differences_of_the_reference(epsilon):
    x, y, direction = unit(7, 4, 1), unit(9, 4, 2), unit(7, 4, 3)
    moving = x.clone().requires_grad_()
    sinkhorn_divergence(moving, y, epsilon, tol=1e-11, max_iterations=50_000).backward()
    h = 1e-5
    ends = [reference_divergence(x + s * h * direction, y, epsilon) for s in (1, -1)]
    assert (moving.grad * direction).sum().item() == pytest.approx((ends[0] - ends[1]) / (2 * h), abs=1e-7)


def test_upstream_factor_and_half_precision_reach_the_gradient():
    x, y = unit(10, 5, 1), unit(10, 5, 2)
    exact = x.clone().requires_grad_()
    (3 * sinkhorn_divergence(exact, y, 0.1, tol=1e-6)).backward()
    half = x.bfloat16().requires_grad_()
    (3 * sinkhorn_divergence(half, y.bfloat16(), 0.1, tol=1e-6)).backward()
    assert half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(half.grad.double(), exact.grad, atol=0.03 * exact.grad.abs().max().item(), rtol=0)


def test_nothing_is_recorded_unasked():
    x, y = unit(6, 4, 1), unit(6, 4, 2)
    assert not sinkhorn_divergence(x, y, 0.1).requires_grad
    with torch.no_grad():
        assert not sinkhorn_divergence(x.clone().requires_grad_(), y, 0.1).requires_grad
    moving = x.clone().requires_grad_()
    value = sinkhorn_divergence(moving, y, 0.1)
    assert value.requires_grad
    assert value.item() == pytest.approx(sinkhorn_divergence(x, y, 0.1).item(), abs=1e-15)
    value.backward()
    assert y.grad is None


def test_only_features_that_require_it_get_a_gradient():
    x, y = unit(6, 4, 1).requires_grad_(), unit(6, 4, 2)
    a = masses(6, 3).requires_grad_()
    value = sinkhorn_divergence(x, y, 0.1, a=a)
    value.backward()
    assert x.grad is not None
    assert a.grad is None  # the slope in the masses is not implemented: none is better than a wrong one


def test_masses_need_not_be_normalised_nor_of_the_features_dtype():
    x, y = unit(6, 4, 1, torch.float32), unit(8, 4, 2, torch.float32)
    a, b = masses(6, 3), masses(8, 4)
    grads = []
    for row_mass, col_mass in ((a, b), (10 * a, 10 * b), (a.float(), b.float())):
        moving = x.clone().requires_grad_()
        sinkhorn_divergence(moving, y, 0.1, row_mass, col_mass).backward()
        grads.append(moving.grad)
    torch.testing.assert_close(grads[1], grads[0], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(grads[2], grads[0], atol=1e-6, rtol=1e-4)


def test_streaming_gives_value_and_gradient_of_the_kept_path(monkeypatch):
    def run():
        x, y = unit(21, 5, 1).requires_grad_(), unit(17, 5, 2).requires_grad_()
        value = sinkhorn_divergence(x, y, 0.1, tol=1e-10)
        value.backward()
        return value.detach(), x.grad, y.grad

    kept = run()
    asked, rows = [], cost_module.CosineCost.rows

    def spying_rows(self, index, out=None):
        tile = rows(self, index, out)
        asked.append(tile.numel())
        return tile

    monkeypatch.setattr(cost_module.CosineCost, "rows", spying_rows)
    monkeypatch.setattr(cost_module, "DENSE_ENTRIES", 0)
    monkeypatch.setattr(cost_module, "TILE_ELEMENTS", 70)
    monkeypatch.setattr(cost_module, "LAZY_FACTOR", 1)
    streamed = run()
    assert max(asked) <= 70
    for ours, theirs in zip(streamed, kept, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_entropic_value_is_between_the_optimum_and_the_independent_coupling():
    x, y = unit(12, 5, 1), unit(12, 5, 2)
    cost = 1 - x @ y.T
    values = [entropic_value(x, y, eps, tol=1e-9, max_iterations=50_000).item() for eps in (0.02, 0.1, 1.0, 100.0)]
    assert values == sorted(values)
    assert cost.min().item() < values[0]
    assert values[-1] == pytest.approx(cost.mean().item(), abs=1e-3)


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        (torch.ones(3, 2), torch.ones(3, 4), "one width"),
        (torch.ones(0, 2), torch.ones(3, 2), "non-empty"),
        (torch.full((3, 2), torch.nan), torch.ones(3, 2), "NaN"),
    ],
)
def test_bad_features_are_refused(x, y, says):
    with pytest.raises(ValueError, match=says):
        sinkhorn_divergence(x, y)


def test_bad_epsilon_is_refused():
    with pytest.raises(ValueError, match="epsilon"):
        sinkhorn_divergence(unit(3, 2, 1), unit(3, 2, 2), epsilon=0.0)
