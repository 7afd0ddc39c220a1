"""The combinatorial plan against exact solvers, on easy, degenerate and hostile inputs."""

import os
from pathlib import Path

import numpy as np
import ot as pot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import linear_sum_assignment

from openclip_otco.ot import CosineCost, DenseCost, combinatorial_plan, exact_plan
from openclip_otco.ot import cost as cost_module

FEATURES = "OPENCLIP_OTCO_FEATURES"


def rng(seed):
    return torch.Generator().manual_seed(seed)


def unit(points):
    return torch.nn.functional.normalize(points, dim=1)


def uniform(size):
    return np.full(size, 1 / size)


def optimum(matrix, a=None, b=None):
    """OPT by a solver that shares nothing with ours: scipy for assignments, else POT's network simplex."""
    n, m = matrix.shape
    if a is None and b is None and n == m:
        return matrix[linear_sum_assignment(matrix)].mean()
    a, b = uniform(n) if a is None else a / a.sum(), uniform(m) if b is None else b / b.sum()
    low, spread = matrix.min(), max(np.ptp(matrix), 1e-300)
    plan = pot.emd(a, b, (matrix - low) / spread, numItermax=10**6)  # POT takes negative costs for infeasible ones
    np.testing.assert_allclose(plan.sum(1), a, atol=1e-8)
    return (plan * (matrix - low)).sum() + low


def check_contract(plan, cost, delta, a=None, b=None):
    """Everything that a plan promises, recomputed in float64 from the matrix."""
    matrix = cost.double().numpy()
    n, m = matrix.shape
    row_mass, col_mass = (uniform(n) if a is None else a / a.sum()), (uniform(m) if b is None else b / b.sum())
    low, high = matrix.min(), matrix.max()
    # What the precision of the matrix allows: duals and values cannot be finer than an ulp of the greatest cost.
    ulp = 8 * torch.finfo(cost.dtype if cost.dtype == torch.float64 else torch.float32).eps * np.abs(matrix).max()
    opt = optimum(matrix, a, b)

    dense = plan.dense().numpy()
    assert plan.shape == dense.shape == (n, m)
    assert plan.mass.dtype == torch.float64
    assert (dense >= 0).all()
    np.testing.assert_allclose(dense.sum(1), row_mass, atol=1e-11, rtol=1e-9)
    np.testing.assert_allclose(dense.sum(0), col_mass, atol=1e-11, rtol=1e-9)
    assert plan.value == pytest.approx((dense * matrix).sum(), abs=ulp + 1e-10)
    assert opt - 1e-9 * np.abs(matrix).max() - ulp <= plan.value <= opt + delta * (high - low) + ulp

    f, g = plan.f.double().numpy(), plan.g.double().numpy()
    assert (f[:, None] + g[None, :] <= matrix + ulp).all()
    assert plan.bound == pytest.approx(row_mass @ f + col_mass @ g, abs=ulp + 1e-12)
    assert plan.bound <= opt + ulp
    if high > low:
        assert plan.additive_error >= (plan.value - opt - 2 * ulp) / (high - low)
        assert plan.additive_error <= delta + 4 * ulp / (high - low)
        steps = 1 / (delta * 0.35) + 2
        free = max(delta * 0.3, min(row_mass[row_mass > 0].min(), col_mass[col_mass > 0].min()))
        assert plan.rounds <= 2 * max(n * (2 / delta + 2), steps / free)
    else:
        assert plan.additive_error == 0


def hostile(name, n, m, seed=0):
    """An `(n, m)` float32 cost with the structure `name`."""
    random = torch.rand(n, m, generator=rng(seed))
    i, j = torch.arange(n)[:, None] / n, torch.arange(m)[None, :] / m
    ones = torch.ones(n, m)
    if name in ("clustered", "duplicates"):
        centres = torch.randn(4, 8, generator=rng(seed))
        x, y = (
            unit(centres[torch.randint(4, (k,), generator=rng(s))] + 0.02 * torch.randn(k, 8, generator=rng(s)))
            for k, s in ((n, seed + 1), (m, seed + 2))
        )
        matrix = 1 - x @ y.T
        return matrix[torch.randint(max(1, n // 6), (n,), generator=rng(seed))] if name == "duplicates" else matrix
    if name == "hub":  # one column is best for every row
        ones[:, 0] = 0
    elif name == "price war":  # more rows than there are cheap columns
        ones[: n // 2 + 1, : m // 2] = 0
    elif name == "all but one cheap":
        ones[:, : m - 1] = 0
    return {
        "random": random,
        "ties": (random * 3).floor(),
        "binary": (random < 0.8).float(),
        "equal": torch.full((n, m), 0.3),
        "collinear": (i - j).abs(),
        "product": i * j,
        "anti-product": 1 - i * j,
        "maximum": torch.maximum(i, j) + 0 * random,
        "triangular": (i > j).float() + 0 * random,
        "columns only": j + 0 * random,
        "rows only": i + 0 * random,
        "geometric": 2.0 ** (-40 * i * j),
        "huge offset": random + 4096,
        "negative": random - 5,
        "tiny scale": random * 1e-20,
        "huge scale": random * 1e20,
        "one outlier": torch.where((i == 0) & (j == 0), 1e4, random),
    }.get(name, ones)


STRUCTURES = (
    "random", "ties", "binary", "equal", "collinear", "product", "anti-product", "maximum", "triangular",
    "columns only", "rows only", "geometric", "huge offset", "negative", "tiny scale", "huge scale", "one outlier",
    "clustered", "duplicates", "hub", "price war", "all but one cheap",
)  # fmt: skip


@pytest.mark.parametrize("delta", [0.02, 0.3])
@pytest.mark.parametrize("name", STRUCTURES)
def test_assignment_keeps_the_contract(name, delta):
    for n in (2, 37):
        cost = hostile(name, n, n)
        check_contract(combinatorial_plan(cost, delta), cost, delta)


@pytest.mark.parametrize(("n", "m"), [(13, 29), (29, 13), (1, 6), (6, 1)])
@pytest.mark.parametrize("name", STRUCTURES)
def test_unequal_numbers_keep_the_contract(name, n, m):
    cost = hostile(name, n, m)
    check_contract(combinatorial_plan(cost, 0.1), cost, 0.1)


def skewed(name, size, seed):
    mass = torch.rand(size, generator=rng(seed), dtype=torch.float64) + 0.01
    if name == "zeros":
        mass[::3] = 0
        mass[-1] = 1
    elif name == "dominating":
        mass[size // 2] = 1e6
    elif name == "tiny":
        mass[::2] *= 1e-12
    elif name == "single":
        mass = torch.zeros(size, dtype=torch.float64).index_fill_(0, torch.tensor([size - 1]), 1.0)
    return mass / mass.sum()


@pytest.mark.parametrize("masses", ["random", "zeros", "dominating", "tiny", "single"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_general_marginals_keep_the_contract(name, masses):
    cost, a, b = hostile(name, 17, 14, 3), skewed(masses, 17, 1), skewed(masses, 14, 2)
    check_contract(combinatorial_plan(cost, 0.15, a, b), cost, 0.15, a.numpy(), b.numpy())


def test_columns_without_mass_do_not_loosen_the_proof():
    # The cheapest column of every row may hold nothing: the duals must not rest on it.
    cost = 1 + torch.rand(20, 20, generator=rng(0))
    cost[:, :5] = 0
    b = torch.ones(20, dtype=torch.float64)
    b[:5] = 0
    plan = combinatorial_plan(cost, 0.05, a=torch.ones(20) / 20, b=b / b.sum())
    assert plan.additive_error <= 0.05
    assert not plan.dense()[:, :5].any()


sizes = st.integers(1, 9)
ENTRIES = st.one_of(st.floats(-4, 4, width=32), st.integers(-2, 2).map(float))


@given(data=st.data(), n=sizes, delta=st.sampled_from([0.01, 0.1, 0.5, 1.0]), seed=st.integers(0, 99))
@settings(max_examples=400, deadline=None)
def test_any_square_matrix_keeps_the_contract(data, n, delta, seed):
    cost = torch.from_numpy(data.draw(hnp.arrays(np.float32, (n, n), elements=ENTRIES)))
    check_contract(combinatorial_plan(cost, delta, seed=seed), cost, delta)


@given(data=st.data(), n=sizes, m=sizes, delta=st.sampled_from([0.1, 0.3, 1.0]))
@settings(max_examples=400, deadline=None)
def test_any_matrix_with_any_marginals_keeps_the_contract(data, n, m, delta):
    cost = torch.from_numpy(data.draw(hnp.arrays(np.float32, (n, m), elements=ENTRIES)))
    masses = st.sampled_from([0.0, 1e-12, 1e-3, 0.5, 1.0, 50.0])
    a, b = (np.array(data.draw(st.lists(masses, min_size=k, max_size=k).filter(any))) for k in (n, m))
    a, b = a / a.sum(), b / b.sum()
    plan = combinatorial_plan(cost, delta, torch.from_numpy(a), torch.from_numpy(b))
    check_contract(plan, cost, delta, a, b)


def test_a_finer_delta_gives_a_nearer_optimum():
    x, y = (unit(torch.randn(300, 16, generator=rng(s))) for s in (0, 1))
    cost = 1 - x @ y.T
    opt = optimum(cost.double().numpy())
    gaps = [combinatorial_plan(cost, delta).value - opt for delta in (0.5, 0.05, 0.001)]
    assert gaps[0] > gaps[1] > gaps[2]
    check_contract(combinatorial_plan(cost, 0.001), cost, 0.001)


@pytest.mark.parametrize(("n", "m"), [(40, 40), (20, 31)])
def test_same_seed_same_plan_another_seed_another(n, m):
    cost = hostile("ties", n, m)
    first, again, other = (combinatorial_plan(cost, 0.1, seed=seed) for seed in (5, 5, 6))
    for field in ("rows", "cols", "mass", "f", "g"):
        assert torch.equal(getattr(first, field), getattr(again, field))
    assert not torch.equal(first.dense(), other.dense())


@pytest.mark.parametrize(("n", "m"), [(40, 40), (20, 31)])
def test_the_global_random_state_is_neither_read_nor_moved(n, m):
    cost = hostile("ties", n, m)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = combinatorial_plan(cost, 0.1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(first.dense(), combinatorial_plan(cost, 0.1).dense())


@pytest.mark.parametrize(("n", "m"), [(30, 30), (20, 31)])
def test_permuting_and_transposing_stay_within_delta(n, m):
    cost, delta = hostile("clustered", n, m), 0.02
    rows, cols = torch.randperm(n, generator=rng(1)), torch.randperm(m, generator=rng(2))
    opt, spread = optimum(cost.double().numpy()), float(cost.max() - cost.min())
    for changed in (cost[rows][:, cols], cost.T):
        plan = combinatorial_plan(changed, delta)
        assert opt - 1e-6 <= plan.value <= opt + delta * spread + 1e-6


@pytest.mark.parametrize(("n", "m"), [(30, 30), (20, 31)])
@pytest.mark.parametrize("constant", [-7.0, 1024.0])
def test_a_constant_moves_the_value_and_not_the_plan(n, m, constant):
    cost = (hostile("random", n, m) * 2**20).floor().double() / 2**20  # exact under the shift
    plan, moved = combinatorial_plan(cost, 0.05), combinatorial_plan(cost + constant, 0.05)
    assert torch.equal(plan.dense(), moved.dense())
    assert moved.value - plan.value == pytest.approx(constant, abs=1e-10)
    assert moved.additive_error == pytest.approx(plan.additive_error, abs=1e-10)


class RecordingCost:
    """A cost that remembers how many entries it was asked for at most."""

    def __init__(self, cost, record=None):
        self.cost, self.record = cost, [] if record is None else record
        self.shape, self.dtype, self.device = cost.shape, cost.dtype, cost.device

    def rows(self, index, out=None):
        rows = self.cost.rows(index)
        self.record.append(rows.numel())
        return rows

    def entries(self, rows, cols):
        return self.cost.entries(rows, cols)

    def restricted(self, rows, cols):
        return RecordingCost(self.cost.restricted(rows, cols), self.record)

    def transposed(self):
        return RecordingCost(self.cost.transposed(), self.record)


@pytest.mark.parametrize(("n", "m"), [(60, 60), (30, 41)])
def test_streamed_rows_give_the_plan_of_the_kept_matrix(monkeypatch, n, m):
    cost = DenseCost(hostile("clustered", n, m))
    kept = combinatorial_plan(cost, 0.05)
    monkeypatch.setattr(cost_module, "DENSE_ENTRIES", n * m - 1)
    monkeypatch.setattr(cost_module, "TILE_ELEMENTS", 3 * m + 1)
    monkeypatch.setattr(cost_module, "LAZY_FACTOR", 1)
    recorder = RecordingCost(cost)
    streamed = combinatorial_plan(recorder, 0.05)
    assert torch.equal(kept.dense(), streamed.dense())
    assert torch.equal(kept.g, streamed.g)
    assert kept.rounds == streamed.rounds
    assert max(recorder.record) <= 3 * m + 1  # no larger block of the matrix was ever made


@pytest.mark.parametrize(("n", "m"), [(50, 50), (20, 31)])
def test_cosine_cost_of_half_precision_strided_features(n, m):
    base = unit(torch.randn(2 * (n + m), 24, generator=rng(0)))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x, y = base.to(dtype)[: 2 * n : 2, ::2], base.to(dtype)[2 * n :: 2, ::2]
        dense = 1 - x.double() @ y.double().T
        check_contract(combinatorial_plan(CosineCost(x, y), 0.05), dense.float(), 0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32])
def test_matrices_of_any_real_dtype_and_stride(dtype):
    cost = (torch.rand(48, 36, generator=rng(0)) * 9).to(dtype)
    for view in (cost[::2, ::3], cost.T[::3, ::2], cost[::4, ::3]):
        promoted = view if dtype == torch.float64 else view.float()
        check_contract(combinatorial_plan(view, 0.1), promoted, 0.1)


@pytest.mark.parametrize("scaled", [(1.0, -5.0), (1e-20, 0.0), (1e20, 0.0), (1e-3, 1.0)], ids=str)
@pytest.mark.parametrize(("n", "m"), [(12, 12), (13, 21)])
def test_exact_plan_is_the_optimum_at_any_scale_and_sign(n, m, scaled):
    scale, offset = scaled
    cost = hostile("random", n, m).double() * scale + offset
    check_contract(exact_plan(cost), cost, 1e-9)
    a, b = skewed("zeros", n, 1), skewed("random", m, 2)
    plan = exact_plan(cost, a, b)
    spread = float(cost.max() - cost.min())
    assert plan.value == pytest.approx(optimum(cost.numpy(), a.numpy(), b.numpy()) * 1.0, abs=1e-9 * spread)


@pytest.mark.skipif(FEATURES not in os.environ, reason=f"{FEATURES} names no folder of trained features")
def test_trained_features_keep_the_contract():
    from safetensors.torch import load_file

    features = load_file(Path(os.environ[FEATURES], "flickr8k-epoch10.safetensors"))
    x, y = features["image"][:700], features["text"][:700]
    plan = combinatorial_plan(CosineCost(x, y), 0.005)
    check_contract(plan, 1 - x.float() @ y.float().T, 0.005)


@pytest.mark.parametrize("delta", [0.0, -0.1, 1.5, float("nan"), float("inf")])
def test_delta_outside_its_range_is_refused(delta):
    with pytest.raises(ValueError, match=r"additive_error must be in \(0, 1\]"):
        combinatorial_plan(torch.rand(3, 3), delta)


@pytest.mark.parametrize(
    ("cost", "a", "says"),
    [
        (torch.ones(0, 3), None, "non-empty"),
        (torch.full((2, 2), torch.nan), None, "large finite cost"),
        (torch.ones(2, 3), torch.ones(3) / 3, "shape"),
        (torch.ones(2, 3), torch.ones(2), "same mass"),
    ],
)
def test_bad_costs_and_marginals_are_refused(cost, a, says):
    with pytest.raises(ValueError, match=says):
        combinatorial_plan(cost, 0.1, a=a)
