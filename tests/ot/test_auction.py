"""The parts of the auction: candidate lists that answer as whole rows would, and ledgers that lose no mass."""

import doctest

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openclip_otco.ot import DenseCost, combinatorial, combinatorial_plan
from openclip_otco.ot import auction as auction_module
from openclip_otco.ot import cost as cost_module
from openclip_otco.ot import ledger as ledger_module
from openclip_otco.ot.auction import Auction
from openclip_otco.ot.candidates import CandidateLists
from openclip_otco.ot.cost import cost_range
from openclip_otco.ot.ledger import AssignmentLedger, TransportLedger


def random_cost(n, m, seed, levels=0):
    matrix = torch.rand(n, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (matrix * levels).floor() if levels else matrix


@given(
    n=st.integers(2, 12), m=st.integers(1, 60), levels=st.sampled_from([0, 2, 5]), seed=st.integers(0, 999),
    tile=st.sampled_from([1, 70, 10_000]), empty=st.booleans(),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_lists_answer_as_whole_rows_do(n, m, levels, seed, tile, empty):
    generator = torch.Generator().manual_seed(seed)
    matrix = random_cost(n, m, seed, levels)
    matrix[0, 0] -= 10  # not constant
    price = torch.zeros(m, dtype=torch.float64)
    if empty and m > 1:
        price[::2] = torch.inf
        price[1] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost_module, "TILE_ELEMENTS", tile)
        low, high = cost_range(DenseCost(matrix))
        lists = CandidateLists(DenseCost(matrix), low, high - low, 1e-3, price, seed)
        noise = lists._noise[:n].numpy()
        assert ((noise >= 0) & (noise < 1e-3)).all()
        shares = (matrix.numpy() - matrix.numpy().min()) / np.ptp(matrix.numpy()) + noise
        for _ in range(8):
            rows = torch.randperm(n, generator=generator)[: int(torch.randint(1, n + 1, (1,), generator=generator))]
            columns, gap = lists.bids(rows, price)
            priced = np.sort(shares + price.numpy(), axis=1)[rows.numpy()]
            chosen = (shares + price.numpy())[rows.numpy(), columns.numpy()]
            np.testing.assert_allclose(chosen, priced[:, 0], atol=1e-12)
            true_gap = priced[:, 1] - priced[:, 0] if m > 1 else np.zeros(len(rows))
            assert (gap.numpy() >= 0).all()
            assert (gap.numpy() <= np.where(np.isfinite(true_gap), true_gap, 0) + 1e-12).all()
            price[columns] += 0.3 * torch.rand(len(rows), generator=generator, dtype=torch.float64)


def test_equal_rows_prefer_different_columns():
    matrix = torch.zeros(50, 50, dtype=torch.float64)
    matrix[0, 0] = 1.0
    lists = CandidateLists(DenseCost(matrix), 0.0, 1.0, 1e-3, torch.zeros(50, dtype=torch.float64), 0)
    columns, _ = lists.bids(torch.arange(50), torch.zeros(50, dtype=torch.float64))
    assert len(columns.unique()) > 25


def masses(size, seed, kind):
    mass = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if kind == "steep":
        mass = mass**20
    elif kind == "zeros":
        mass[: size // 2] = 0
    return mass / mass.sum()


def empty_ledger(n, m, kind, seed):
    """A ledger of that kind, and the masses of its rows, `(n,)`, and columns, `(m,)`; an assignment has `n` of both."""
    if kind == "assignment":
        a = b = torch.full((n,), 1 / n, dtype=torch.float64)
        return AssignmentLedger(n, torch.device("cpu")), a, b
    a, b = masses(n, seed, kind), masses(m, seed + 1, kind)
    return TransportLedger(a, b, torch.float64), a, b


@given(
    n=st.integers(1, 9), m=st.integers(1, 9), kind=st.sampled_from(["flat", "steep", "zeros", "assignment"]),
    seed=st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_ledgers_lose_no_mass_and_lower_no_price(n, m, kind, seed):
    """Any bids in any order: what is placed and what is free always add up to the marginals."""
    generator = torch.Generator().manual_seed(seed)
    ledger, a, b = empty_ledger(n, m, kind, seed)
    m = len(b)
    cost, price = DenseCost(random_cost(n, m, seed)), torch.zeros(m, dtype=torch.float64)
    for _ in range(12):
        rows = ledger.free()
        if len(rows):
            columns = torch.nonzero(b).squeeze(1)[torch.randint(int((b > 0).sum()), rows.shape, generator=generator)]
            before = price.clone()
            ledger.sell(rows, columns, price[columns] + torch.rand(rows.shape, generator=generator).double(), price)
            assert (price >= before).all()
        placed = ledger.placed()
        if len(placed[0]) and torch.rand(1, generator=generator) < 0.3:
            ledger.release(torch.rand(placed[0].shape, generator=generator) < 0.5, price)
            placed = ledger.placed()
        rest = ledger.place_free(cost)
        assert float(placed[2].sum()) + ledger.free_share() == pytest.approx(1, abs=1e-12)
        assert float(rest[2].sum()) == pytest.approx(ledger.free_share(), abs=1e-12)
        plan = torch.zeros(n, m, dtype=torch.float64)
        for rows, columns, mass in (placed, rest):
            assert (mass > 0).all()
            plan.index_put_((rows, columns), mass, accumulate=True)
        np.testing.assert_allclose(plan.sum(1), a, atol=1e-15 * n)
        np.testing.assert_allclose(plan.sum(0), b, atol=1e-15 * m)


def test_the_highest_offers_take_the_cheapest_mass():
    """One column in two lots at prices 0.1 and 0.3; offers 0.2 and 0.5 for more than there is."""
    ledger = TransportLedger(torch.tensor([0.25, 0.25, 0.25, 0.25]), torch.tensor([0.5, 0.5]), torch.float64)
    price = torch.zeros(2, dtype=torch.float64)

    def sell(rows, offers):
        ledger.sell(torch.tensor(rows), torch.zeros(len(rows), dtype=torch.long), torch.tensor(offers).double(), price)

    def held():
        rows, columns, mass = ledger.placed()
        return sorted(zip(rows.tolist(), columns.tolist(), mass.tolist(), strict=True))

    sell([0, 1], [0.1, 0.3])
    assert held() == [(0, 0, 0.25), (1, 0, 0.25)]
    assert price.tolist() == [pytest.approx(0.1), 0.0]
    sell([2, 3], [0.2, 0.5])
    # Row 3 has taken what cost 0.1; row 2 did not offer enough for what costs 0.3.
    assert held() == [(1, 0, 0.25), (3, 0, 0.25)]
    assert ledger.free().tolist() == [0, 2]
    assert price.tolist() == [pytest.approx(0.3), 0.0]


def test_the_worked_example_of_a_sale_runs():
    failed, attempted = doctest.testmod(ledger_module)
    assert attempted > 5
    assert failed == 0


class GrainLedger:
    """The sale of `TransportLedger`, told grain by grain: mass is so many grains, each with a holder and a price."""

    def __init__(self, supply, demand):
        self.supply = list(supply)
        self.grains = [[(None, 0.0)] * count for count in demand]

    def sell(self, bids):
        """`bids` are `(row, column, offer)`."""
        wanted = list(self.supply)
        for column, grains in enumerate(self.grains):
            line = sorted(grains, key=lambda grain: grain[1])
            bidders = sorted((bid for bid in bids if bid[1] == column), key=lambda bid: -bid[2])
            in_front = [(row, offer) for row, _, offer in bidders for _ in range(wanted[row])]
            for place, (row, offer) in enumerate(in_front[: len(line)]):
                holder, price = line[place]
                if price < offer:
                    line[place] = row, offer
                    self.supply[row] -= 1
                    if holder is not None:
                        self.supply[holder] += 1
            self.grains[column] = line

    def placed(self):
        plan = np.zeros((len(self.supply), len(self.grains)))
        for column, grains in enumerate(self.grains):
            for holder, _ in grains:
                if holder is not None:
                    plan[holder, column] += 1
        return plan


@given(
    supply=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    demand=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    seed=st.integers(0, 999),
    offers=st.sampled_from([4, 1000]),
)
@settings(max_examples=150, deadline=None)
def test_a_sale_is_that_of_its_grains(supply, demand, seed, offers):
    """Against a loop over single grains of mass; with few different offers, many of them are equal."""
    total = 32  # a power of two, so that masses are exact
    supply, demand = [*supply, total - sum(supply)], [*demand, total - sum(demand)]
    random = np.random.default_rng(seed)
    reference = GrainLedger(supply, demand)
    ledger = TransportLedger(torch.tensor(supply) / total, torch.tensor(demand) / total, torch.float64)
    price = torch.zeros(len(demand), dtype=torch.float64)
    for _ in range(6):
        rows = ledger.free()
        assert rows.tolist() == np.flatnonzero(reference.supply).tolist()
        if not len(rows):
            return
        columns = torch.from_numpy(random.choice(np.flatnonzero(demand), len(rows)))
        bids = price[columns] + torch.from_numpy(random.integers(1, offers, len(rows)) / offers)
        ledger.sell(rows, columns, bids, price)
        reference.sell(list(zip(rows.tolist(), columns.tolist(), bids.tolist(), strict=True)))
        plan = torch.zeros(len(supply), len(demand), dtype=torch.float64)
        rows, columns, mass = ledger.placed()
        plan.index_put_((rows, columns), mass, accumulate=True)
        np.testing.assert_array_equal(plan * total, reference.placed())
        for column in np.flatnonzero(demand):
            assert price[column] == min(cost for _, cost in reference.grains[column])


@given(
    n=st.integers(2, 12),
    m=st.integers(2, 12),
    kind=st.sampled_from(["flat", "steep", "zeros", "assignment"]),
    seed=st.integers(0, 999),
    additive_error=st.sampled_from([0.02, 0.2]),
)
@settings(max_examples=100, deadline=None)
def test_what_a_row_holds_is_within_a_step_of_its_best_choice(n, m, kind, seed, additive_error):
    ledger, a, b = empty_ledger(n, m, kind, seed)
    m = len(b)
    matrix = random_cost(n, m, seed)
    low, high = cost_range(DenseCost(matrix))
    auction = Auction(DenseCost(matrix), low, high - low, a, b, ledger, additive_error, seed)

    def check():
        rows, columns, _ = ledger.placed()
        priced = (matrix - low) / (high - low) + auction.price
        excess = priced[rows, columns] - priced[rows].amin(dim=1)
        assert (excess <= auction.step + 0.02 * additive_error + 1e-12).all()  # the noise that breaks ties

    auction.bid(10_000)
    assert auction.done
    check()
    step, free_share = auction.step, auction.largest_free_share
    auction.refine(auction.plan())
    assert (auction.step < step) != (auction.largest_free_share < free_share)
    check()


@pytest.mark.parametrize(("n", "m"), [(120, 120), (90, 120)])
def test_price_wars_end_by_longer_steps(monkeypatch, n, m):
    """Costs like `i * j` make every row want the same columns: patience runs out, and the guarantee holds."""
    i, j = torch.arange(n)[:, None] / n, torch.arange(m)[None] / m
    monkeypatch.setattr(combinatorial, "_last_resort", None)  # not needed
    monkeypatch.setattr(auction_module, "_PATIENCE", 5)
    plan = combinatorial_plan(i * j, 0.005)
    assert plan.additive_error <= 0.005
    assert plan.rounds > 50


@pytest.mark.parametrize("exact", ["is at hand", "gives up", "is too large"])
@pytest.mark.parametrize(("n", "m"), [(40, 40), (30, 40)])
def test_when_the_rounds_run_out(monkeypatch, exact, n, m):
    matrix = random_cost(n, m, 0)
    monkeypatch.setattr(combinatorial, "MOST_ROUNDS", 2)
    monkeypatch.setattr(auction_module, "_PATIENCE", 1)
    if exact == "gives up":

        def fail(*_):
            raise RuntimeError

        monkeypatch.setattr(combinatorial, "exact_plan", fail)
    elif exact == "is too large":
        monkeypatch.setattr(combinatorial, "EXACT_ENTRIES", 0)
    plan = combinatorial_plan(matrix, 0.0005)
    np.testing.assert_allclose(plan.dense().sum(1), 1 / n, atol=1e-12)
    np.testing.assert_allclose(plan.dense().sum(0), 1 / m, atol=1e-12)
    assert float(plan.mass @ matrix[plan.rows, plan.cols]) == pytest.approx(plan.value)
    if exact == "is at hand":
        assert plan.additive_error < 1e-9
    else:  # not what was asked for, and said so
        assert 0.0005 < plan.additive_error < 1
