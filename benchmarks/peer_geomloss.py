"""A pytest plugin: geomloss's tests of `ot.solve` and `ot.solve_sample` call this package's `sinkhorn`.

Checks of the input, plan, value and marginals stay theirs and are computed from our potentials. `max_iter` counts steps
of an annealing that this package does not have. What it has for a small `ε` is a start from a plan, so both are judged:
`PEER_PLANNER` says `none` or `exact_plan`. `peer_tests.py` runs it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from geomloss._typing import SinkhornPotentials
from geomloss.ot._implementations import matrix as geomloss_matrix
from geomloss.ot._implementations import sample as geomloss_sample
from hypothesis import Phase, assume, settings
from peer_turns import Turns
from torch import Tensor

from openclip_otco.ot import exact_plan, sinkhorn

# L1 errors of the marginals, as a share of the mass. geomloss allows a potential an error of 1e-4, and the potential at
# a small mass has a greater error than the marginals.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
MOST_ITERATIONS = 2_000
# The marginal errors of all problems that were given up after that many iterations.
given_up: list[float] = []

# The same examples each time, and none made smaller where one fails: this counts failures and mends none.
settings.register_profile(
    "peers", max_examples=30, derandomize=True, database=None, deadline=None, phases=[Phase.generate]
)
settings.load_profile("peers")


def potentials(matrix: Tensor, epsilon: float, log_a: Tensor, log_b: Tensor) -> tuple[Tensor, Tensor]:
    """The duals `(f, g)` of one problem in geomloss's convention: about `a ⊗ b` as given, whatever the total mass, and
    with equal weighted means where a pair is determined up to a constant."""
    a, b = log_a.double().exp(), log_b.double().exp()
    start = exact_plan(matrix, a, b) if os.environ["PEER_PLANNER"] == "exact_plan" else None
    found = sinkhorn(matrix, epsilon, a, b, start, TOLERANCE[matrix.dtype], MOST_ITERATIONS)
    if not found.converged:
        given_up.append(found.marginal_error)
    f, g = found.f.double(), found.g.double()
    # Our masses sum to one. Masses that sum to m divide the density by m.
    of_mass = -epsilon * a.sum().log()
    shift = ((b @ g) / b.sum() - (a @ f) / a.sum()) / 2
    return f + shift + of_mass / 2, g - shift + of_mass / 2


def ours(
    *, log_a_list: list[Any], log_b_list: list[Any], C_list: list[Any], descent: Any, debias: bool, **_: Any
) -> SinkhornPotentials:
    """geomloss's `sinkhorn_loop`, balanced and without debiasing, one problem of the batch after the other."""
    assume(descent.rho_list[-1] is None)  # unbalanced problems are none of ours: draw another example
    assert not debias, "ot.solve does not debias"
    costs, log_a, log_b = C_list[-1].xy, log_a_list[-1], log_b_list[-1]
    as_tensors = [torch.as_tensor(np.asarray(x)) if not isinstance(x, Tensor) else x for x in (costs, log_a, log_b)]
    is_batch = as_tensors[0].ndim == 3  # ot.solve_sample has one problem
    if not is_batch:
        as_tensors = [x[None] for x in as_tensors]
    pairs = [potentials(c, float(descent.eps_list[-1]), p, q) for c, p, q in zip(*as_tensors, strict=True)]
    f, g = (torch.stack(parts).to(as_tensors[0].dtype) for parts in zip(*pairs, strict=True))
    if not is_batch:
        f, g = f[0], g[0]
    if not isinstance(costs, Tensor):
        return SinkhornPotentials(f_ba=f.numpy(), g_ab=g.numpy())
    return SinkhornPotentials(f_ba=f, g_ab=g)


@pytest.fixture(autouse=True, scope="module")
def ours_answer() -> Iterator[Turns]:
    """Puts this package in the place of geomloss's loop. Once for all: hypothesis calls a test many times."""
    turns = Turns(int(os.environ["PEER_EVERY"]))
    with pytest.MonkeyPatch.context() as patch:
        for module in (geomloss_matrix, geomloss_sample):
            patch.setattr(module, "sinkhorn_loop", turns.between(module.sinkhorn_loop, ours))
        yield turns


@pytest.fixture(autouse=True)
def counted(ours_answer: Turns, record_property: Callable[[str, object], None]) -> Iterator[None]:
    """Notes how often this package was asked in one test, and how many problems it gave up."""
    before, given_up_before = ours_answer.ours, len(given_up)
    yield
    record_property("calls", ours_answer.ours - before)
    record_property("given_up", len(given_up) - given_up_before)
