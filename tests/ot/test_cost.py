"""Costs: lazy and dense agree, tiles cover the rows, and what is no cost is refused."""

import numpy as np
import pytest
import torch

from openclip_otco.ot import CosineCost, DenseCost, combinatorial_plan, exact_plan, sinkhorn, sinkhorn_divergence
from openclip_otco.ot import cost as cost_module
from openclip_otco.ot.cost import all_rows, as_cost, cost_range, tiles
from openclip_otco.ot.marginals import marginals


def unit(n, d, seed=0, dtype=torch.float64):
    points = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (points / points.norm(dim=1, keepdim=True)).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "atol"),
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.float16, 1e-6), (torch.bfloat16, 1e-6)],
)
def test_cosine_cost_equals_the_matrix_of_the_features_as_given(dtype, atol):
    x, y = unit(7, 5, 1, dtype), unit(11, 5, 2, dtype)
    cost = CosineCost(x, y)
    expected = 1 - np.einsum("id,jd->ij", x.double().numpy(), y.double().numpy())
    assert cost.shape == (7, 11)
    assert cost.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    np.testing.assert_allclose(cost.rows(slice(0, 7)).numpy(), expected, atol=atol)
    np.testing.assert_allclose(cost.rows(torch.tensor([5, 0, 5])).numpy(), expected[[5, 0, 5]], atol=atol)
    np.testing.assert_allclose(cost.transposed().rows(slice(2, 9)).numpy(), expected.T[2:9], atol=atol)


@pytest.mark.parametrize(
    "make", [lambda c: DenseCost(c @ c.T), lambda c: CosineCost(c, c.flip(0))], ids=["dense", "cos"]
)
def test_entries_and_restrictions_are_those_of_the_matrix(make):
    cost = make(unit(9, 4))
    matrix = all_rows(cost)
    rows, cols = torch.tensor([0, 8, 8, 3]), torch.tensor([8, 0, 1, 3])
    torch.testing.assert_close(cost.entries(rows, cols), matrix[rows, cols], atol=1e-14, rtol=0)
    part, expected = cost.restricted(rows, cols[:3]), matrix[rows][:, cols[:3]]
    assert part.shape == (4, 3)
    torch.testing.assert_close(all_rows(part), expected, atol=1e-14, rtol=0)
    torch.testing.assert_close(all_rows(part.transposed()), expected.T, atol=1e-14, rtol=0)
    i, j = torch.tensor([3, 0]), torch.tensor([1, 2])
    torch.testing.assert_close(part.entries(i, j), expected[i, j], atol=1e-14, rtol=0)


@pytest.mark.parametrize("solve", [combinatorial_plan, exact_plan, sinkhorn], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("n", "m"), [(9, 9), (9, 7)])
def test_solvers_leave_the_matrix_alone(solve, n, m):
    matrix = unit(9, 9)[:n, :m].contiguous()
    before = matrix.clone()
    solve(matrix)
    assert torch.equal(matrix, before)


def test_autocast_outside_does_not_reach_the_gradient_of_the_divergence():
    gradients = []
    for inside in (False, True):
        x, y = (unit(30, 16, seed, torch.float32).requires_grad_() for seed in (1, 2))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            value = sinkhorn_divergence(x, y)
        value.backward()
        gradients.append((value.detach(), x.grad, y.grad))
    assert all(torch.equal(outside, within) for outside, within in zip(*gradients, strict=True))


@pytest.mark.parametrize("solve", [combinatorial_plan, exact_plan, sinkhorn], ids=lambda f: f.__name__)
def test_autocast_outside_does_not_reach_the_numbers(solve):
    cost = CosineCost(unit(30, 16, 1, torch.float32), unit(30, 16, 2, torch.float32))
    plain = solve(cost)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = solve(cost)
    assert torch.equal(plain.f, inside.f)
    assert torch.equal(plain.g, inside.g)


def test_features_that_require_grad_or_are_strided_are_taken_detached():
    base = unit(8, 12).requires_grad_()
    x, y = base[::2, ::3], base[1::2, ::3]
    rows = CosineCost(x, y).rows(slice(0, 4))
    assert not rows.requires_grad
    torch.testing.assert_close(rows, 1 - x.detach().contiguous() @ y.detach().contiguous().T)


@pytest.mark.parametrize(("elements", "widest"), [(1, 1), (12, 1), (13, 1), (30, 2), (1000, 10)])
def test_tiles_cover_each_row_once_within_the_limit(monkeypatch, elements, widest):
    monkeypatch.setattr(cost_module, "TILE_ELEMENTS", elements)
    monkeypatch.setattr(cost_module, "LAZY_FACTOR", 1)
    cost = as_cost(torch.arange(130.0).reshape(10, 13))
    slices = list(tiles(cost))
    assert [i for s in slices for i in range(s.start, s.stop)] == list(range(10))
    assert max(s.stop - s.start for s in slices) == widest
    assert cost_range(cost) == (0.0, 129.0)


def test_dense_matrix_is_promoted_to_at_least_float32_and_wrapped_once():
    assert as_cost(torch.ones(2, 2, dtype=torch.bfloat16)).dtype == torch.float32
    assert as_cost(torch.ones(2, 2, dtype=torch.int64)).dtype == torch.float32
    assert as_cost(torch.ones(2, 2, dtype=torch.float64)).dtype == torch.float64
    cost = CosineCost(unit(2, 3), unit(2, 3))
    assert as_cost(cost) is cost


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        (torch.ones(3), torch.ones(3), r"\(n, d\) and \(m, d\)"),
        (torch.ones(3, 2), torch.ones(3, 4), "one width"),
        (torch.ones(0, 2), torch.ones(3, 2), "non-empty"),
        (torch.ones(3, 0), torch.ones(3, 0), "non-empty"),
        (torch.full((2, 2), torch.nan), torch.ones(2, 2), "drop those rows"),
        (torch.ones(2, 2), torch.full((2, 2), torch.inf), "features y .* drop those rows"),
    ],
)
def test_bad_features_are_refused(x, y, says):
    with pytest.raises(ValueError, match=says):
        CosineCost(x, y)


@pytest.mark.parametrize(
    ("matrix", "says"),
    [
        (torch.ones(3), "matrix"),
        (torch.ones(0, 3), "non-empty"),
        (torch.ones(2, 2, 2), "matrix"),
        (torch.tensor([[0.0, torch.inf]]), "large finite cost"),
        (torch.tensor([[0.0, torch.nan]]), "large finite cost"),
    ],
)
def test_bad_matrices_are_refused(matrix, says):
    with pytest.raises(ValueError, match=says):
        DenseCost(matrix)


def test_marginals_are_normalised_in_float64_and_uniform_by_default():
    cost = as_cost(torch.ones(2, 4))
    a, b = marginals(cost, torch.tensor([3, 1]), torch.tensor([1, 1, 0, 2], dtype=torch.float16))
    assert a.dtype == b.dtype == torch.float64
    assert a.tolist() == [0.75, 0.25]
    assert b.tolist() == [0.25, 0.25, 0.0, 0.5]
    assert marginals(cost, None, None)[1].tolist() == [0.25] * 4


@pytest.mark.parametrize(
    ("a", "b", "says"),
    [
        (torch.ones(3), None, r"marginal a must have shape \(2,\)"),
        (None, torch.ones(4, 1), r"marginal b must have shape \(4,\)"),
        (torch.tensor([2.0, -1.0]), None, "marginal a must be .*non-negative"),
        (torch.tensor([torch.nan, 1.0]), None, "finite"),
        (torch.tensor([torch.inf, 1.0]), None, "finite"),
        (torch.zeros(2), torch.zeros(4), "not all zero"),
        (torch.tensor([1.0, 1.0]), None, "same mass; they sum to 2 and 1"),
        (torch.tensor([0.5, 0.5 + 1e-5]), None, "same mass"),
    ],
)
def test_bad_marginals_are_refused(a, b, says):
    with pytest.raises(ValueError, match=says):
        marginals(as_cost(torch.ones(2, 4)), a, b)


@pytest.mark.parametrize("call", [as_cost, lambda c: CosineCost(c, c)], ids=["matrix", "features"])
def test_numpy_arrays_are_refused_by_name(call):
    with pytest.raises(TypeError, match="got ndarray"):
        call(np.ones((3, 3)))


def test_sparse_matrices_are_refused():
    with pytest.raises(ValueError, match=r"dense matrix; got torch\.sparse_coo"):
        as_cost(torch.eye(3).to_sparse())


def test_complex_matrices_are_refused():
    with pytest.raises(ValueError, match="must be real"):
        as_cost(torch.ones(2, 2, dtype=torch.complex64))
