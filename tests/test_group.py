"""Plans that ranks make together: the same on all of them, the same as one makes alone, and nobody left waiting."""

import logging
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import paired_features
from cost_model import Run
from forks import PATIENCE, start_ranks

import openclip_otco
from openclip_otco.method import solver
from openclip_otco.method.cache import PlanCache
from openclip_otco.method.loss import Features, OTCOLoss
from openclip_otco.method.solver import PlanSolver
from openclip_otco.method.window import FeatureWindow
from openclip_otco.ot import CosineCost, half_steps, nearest_potentials, sinkhorn
from openclip_otco.ot import cost as cost_module
from openclip_otco.ot.group import ALONE, DistributedGroup, Group
from openclip_otco.train.callback import PlanCacheCallback

WORLDS = (2, 4)
POTENTIALS = {"kept": 8192**2, "streamed": 0}
FAILURES = ("the initial plan", "the kernel", "a half-step", "the drift", "the window", "a step's features")


def problem():
    """Sizes that no number of ranks divides, general marginals, one of them with zeros."""
    x, y = paired_features(211, seed=3)[0], paired_features(150, seed=4)[1]
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(211, generator=generator).double(), torch.rand(150, generator=generator).double()
    b[:7] = 0
    return CosineCost(x, y), a / a.sum(), b / b.sum()


def solved(group, epsilon, start):
    cost, a, b = problem()
    g = torch.linspace(-1, 1, 150) if start == "far" else None
    init = None if g is None else (torch.zeros(211), g)
    return sinkhorn(cost, epsilon, a, b, init=init, tol=3e-5, max_iterations=3000, group=group)


def windows():
    return [paired_features(512, seed=seed) for seed in (1, 2)]


def plans(group, initial_plan="combinatorial"):
    """Two plans, the second with a warm start, of features that are enough to be shared out."""
    plan_solver = PlanSolver(0.05, initial_plan, group=group)
    first = plan_solver.solve(*windows()[0])
    return [first, plan_solver.solve(*windows()[1], step=1, previous=first)]


def callback(group, steps=2):
    loss = OTCOLoss()
    return PlanCacheCallback(loss.exchange, FeatureWindow(steps), PlanCache(), PlanSolver(0.1, group=group), warmup=0.0)


def failing_rank(failing, world):
    """Initial plan and drift are the first rank's alone; of the rest the last one's fails."""
    return 0 if failing in ("the initial plan", "the drift") else world - 1


def train(hook, failing=None, rank=0):
    """Three windows of two steps. In the second one something fails, on one rank alone."""
    hook.on_train_start(step=0, total_steps=6)
    for step in range(6):
        batch = paired_features(256, seed=step)
        hook.exchange.features = Features(*batch)
        with pytest.MonkeyPatch.context() as patch:
            if failing and step in (2, 3) and rank == failing_rank(failing, hook.solver.group.count):
                _break(patch, failing, step, hook)
            hook.on_step_end(step=step, epoch=0, losses={})
    return hook


def _break(patch, failing, step, hook):
    def fail(*args, **kwargs):
        raise MemoryError(failing)

    if failing == "a step's features":
        if step == 2:
            patch.setattr(hook.window, "add", fail)
    elif step == 3:
        owner, name = {
            "the initial plan": (PlanSolver, "_initial"),
            "the kernel": (half_steps.KernelHalfSteps, "_make_kernel"),
            "a half-step": (torch, "mv"),
            "the drift": (solver, "_drift"),
            "the window": (hook.window, "features"),
        }[failing]
        patch.setattr(owner, name, fail)


def uneven(group):
    """Potentials of a problem whose parts are not all of one size."""
    result = sinkhorn(CosineCost(*paired_features(33, seed=2)), 0.1, tol=1e-5, group=group)
    return result.f, result.g


def join(rank, world, folder):
    """The group of gloo ranks that this one belongs to."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", world_size=world, rank=rank)
    return DistributedGroup()


def leave():
    dist.barrier()
    dist.destroy_process_group()


def _rank(rank, world, folder):
    group = join(rank, world, folder)
    out = {}
    for path, entries in POTENTIALS.items():
        cost_module.DENSE_ENTRIES = entries
        for epsilon in (0.02, 0.3):
            for start in ("zero", "far"):
                result = solved(group, epsilon, start)
                out[f"{path}-{epsilon}-{start}"] = (result.f, result.g, result.marginal_error, result.value)
    cost, a, b = problem()
    candidates = [torch.zeros(150), result.g, torch.randn(150, generator=torch.Generator().manual_seed(1))]
    out["nearest"] = nearest_potentials(cost, candidates, 0.3, a, b, group=group)
    # Of two ranks, the first has a part of as many entries, and the other one of more.
    cost_module.DENSE_ENTRIES = 33 * 16
    out["uneven"] = uneven(group)
    cost_module.DENSE_ENTRIES = POTENTIALS["kept"]
    out["plans"] = [plan.state_dict() for plan in plans(group)]
    out["digests"] = [plan.digest() for plan in plans(group)]
    with pytest.MonkeyPatch.context() as patch:
        # Without an initial plan no rank has use for the whole cost.
        sizes = []
        patch.setattr(solver, "_DRIFT_SUPPORT", 64)  # the drift has costs of its own
        patch.setattr(
            cost_module, "all_rows", lambda cost: sizes.append(cost.shape) or cost.rows(slice(0, cost.shape[0]))
        )
        out["previous"] = [plan.state_dict() for plan in plans(group, "previous")]
    out["largest part"] = max(n * m for n, m in sizes)
    for failing in FAILURES:
        hook = train(callback(group), failing, rank)
        out[failing] = (hook.made, hook.skipped, list(hook.cache), [hook.cache[step].digest() for step in hook.cache])
    vector = torch.full((3,), float(rank))
    out["least"] = (group.attempt(lambda: group.least(vector)), group.attempt(lambda: group.total(vector)), vector)
    small = PlanSolver(0.1, group=group).solve(*paired_features(world * solver._LEAST_PART - 1))
    out["small"] = (small.digest(), sorted(small.diagnostics))
    torch.save(out, folder / f"{world}-{rank}.pt")
    leave()


@pytest.fixture(scope="module", params=WORLDS)
def ranks(request, tmp_path_factory):
    """What each of the gloo ranks got."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    start_ranks(_rank, request.param, folder)
    return [torch.load(folder / f"{request.param}-{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("start", ["zero", "far"])
@pytest.mark.parametrize("epsilon", [0.02, 0.3])
@pytest.mark.parametrize("path", POTENTIALS)
def test_sharded_potentials_are_those_of_one_process(ranks, monkeypatch, path, epsilon, start):
    monkeypatch.setattr(cost_module, "DENSE_ENTRIES", POTENTIALS[path])
    alone = solved(ALONE, epsilon, start)
    assert alone.converged
    for f, g, error, value in (rank[f"{path}-{epsilon}-{start}"] for rank in ranks):
        torch.testing.assert_close(f, alone.f, atol=5e-4, rtol=0)
        torch.testing.assert_close(g, alone.g, atol=5e-4, rtol=0)
        assert error <= 3e-5
        assert value == pytest.approx(alone.value, abs=2e-5)
        assert torch.equal(f, ranks[0][f"{path}-{epsilon}-{start}"][0])
        assert torch.equal(g, ranks[0][f"{path}-{epsilon}-{start}"][1])


def test_parts_of_different_sizes_are_solved_in_one_way(ranks):
    for potentials in (rank["uneven"] for rank in ranks):
        for ours, alone, first in zip(potentials, uneven(ALONE), ranks[0]["uneven"], strict=True):
            torch.testing.assert_close(ours, alone, atol=1e-4, rtol=0)
            assert torch.equal(ours, first)


def test_without_an_initial_plan_each_rank_makes_its_parts_alone(ranks):
    for rank in ranks:
        assert 0 < rank["largest part"] <= 512 * 512 / len(ranks)
        for ours, first, alone in zip(rank["previous"], ranks[0]["previous"], plans(ALONE, "previous"), strict=True):
            assert torch.equal(ours["g"], first["g"])
            offset = ours["f"].mean() - alone.f.mean()  # potentials are free up to a constant
            torch.testing.assert_close(ours["f"] - offset, alone.f, atol=2e-3, rtol=0)


def test_ranks_choose_the_same_start(ranks):
    assert {rank["nearest"] for rank in ranks} == {1}


def test_plans_made_together_are_equal_to_the_bit_and_as_good_as_one_made_alone(ranks):
    assert len({tuple(rank["digests"]) for rank in ranks}) == 1
    for index, plan in enumerate(plans(ALONE)):
        shared = ranks[0]["plans"][index]
        assert ranks[-1]["plans"][index]["diagnostics"].keys() == plan.diagnostics.keys()
        for name in ("objective", "entropy", "own_pair_mass", "drift_image", "drift_text"):
            if name in plan.diagnostics:
                assert shared["diagnostics"][name] == pytest.approx(plan.diagnostics[name], rel=2e-2), name
        assert shared["diagnostics"]["marginal_error"] <= 1e-3
        offset = shared["f"].mean() - plan.f.mean()  # potentials are free up to a constant
        torch.testing.assert_close(shared["f"] - offset, plan.f, atol=2e-3, rtol=0)


@pytest.mark.parametrize("failing", FAILURES)
def test_a_rank_that_fails_makes_all_skip_that_plan_and_no_other(ranks, failing):
    """That the ranks came back at all says that none hung."""
    for rank in ranks:
        made, skipped, steps, digests = rank[failing]
        assert (made, skipped, steps) == (2, 1, [1, 5])
        assert digests == ranks[0][failing][3]


def test_what_processes_put_in_stays_as_it_is(ranks):
    for rank, found in enumerate(ranks):
        least, total, vector = found["least"]
        assert vector.tolist() == [rank] * 3
        assert least.tolist() == [0] * 3
        assert total.tolist() == [sum(range(len(ranks)))] * 3


def test_the_first_process_makes_small_plans_for_all(ranks):
    alone = PlanSolver(0.1).solve(*paired_features(len(ranks) * solver._LEAST_PART - 1))
    assert {rank["small"][0] for rank in ranks} == {alone.digest()}
    assert ranks[0]["small"][1] == sorted(alone.diagnostics)
    assert ranks[1]["small"][1] == ["seconds"]


# --- a failure at each line -----------------------------------------------------------------------------------------

PACKAGE = str(Path(openclip_otco.__file__).parent)
# What makes a failure known; it has no line that could fail alone but for its collective itself.
PROTOCOL = ("attempt", "_reduced", "_meet")


class Tracer:
    """Sees each line of the package that is run, and fails when it first comes to one of them, `(file, line)`."""

    def __init__(self, failing=None):
        self.failing, self.lines = failing, {}

    def __call__(self, frame, event, argument):
        code = frame.f_code
        ours = code.co_filename.startswith(PACKAGE)
        if not ours or (code.co_filename.endswith("group.py") and code.co_name in PROTOCOL):
            return None
        return self.line

    def line(self, frame, event, argument):
        if event == "line":
            line = (frame.f_code.co_filename, frame.f_lineno)
            self.lines[line] = f"{frame.f_code.co_name}: line {frame.f_lineno} of {frame.f_code.co_filename}"
            if line == self.failing:
                self.failing = None
                raise MemoryError(self.lines[line])
        return self.line

    def run(self, make):
        """What `make` gives, or the error that it ends with."""
        sys.settrace(self)
        try:
            return make()
        except Exception as error:
            return error
        finally:
            sys.settrace(None)


def scenarios(group):
    """Solves that go through all lines which ranks go through together: matrices kept and streamed, near and far."""
    first = PlanSolver(0.05).solve(*paired_features(48, seed=1))
    again = PlanSolver(0.05, group=group)

    def streamed(start):
        cost_module.DENSE_ENTRIES = 0
        try:
            init = None if start == "zero" else (torch.zeros(48), torch.linspace(-9, 9, 48))
            cost = CosineCost(*paired_features(48, seed=2))
            return sinkhorn(cost, 0.02, init=init, tol=1e-3, max_iterations=9, group=group)
        finally:
            cost_module.DENSE_ENTRIES = POTENTIALS["kept"]

    def far():
        init = (torch.zeros(48), torch.linspace(-9, 9, 48))
        return sinkhorn(CosineCost(*paired_features(48, seed=2)), 0.02, init=init, max_iterations=9, group=group)

    return {
        "a plan": lambda: again.solve(*paired_features(48, seed=2), step=1, previous=first),
        "streamed": lambda: streamed("zero"),
        "streamed from afar": lambda: streamed("far"),
        "kept from afar": far,
    }


def _fails_at_each_line(rank, world, folder):
    group = join(rank, world, folder)
    out = {"lines": 0, "wrong": []}
    seen = set()
    for name, solve in scenarios(group).items():
        make = partial(group.attempt, solve)  # as the callback does
        tracer = Tracer()
        sound = tracer.run(make)
        assert not isinstance(sound, Exception), sound
        for failing_rank in range(world):
            # The ranks go through the lines of one of them, together.
            told = [[line for line in tracer.lines if (failing_rank, line) not in seen]]
            dist.broadcast_object_list(told, src=failing_rank)
            for line in told[0]:
                seen.add((failing_rank, line))
                found = Tracer(line if rank == failing_rank else None).run(make)
                expected = MemoryError if rank == failing_rank else RuntimeError
                if type(found) is not expected:
                    out["wrong"].append((name, failing_rank, line, repr(found)))
                out["lines"] += 1
        again = make()
        assert torch.equal(again.g, sound.g), name
    torch.save(out, folder / f"{rank}.pt")
    leave()


def test_wherever_a_rank_fails_all_leave_and_the_next_plan_is_sound(tmp_path):
    """Each line of the package that a rank comes to in a solve fails in turn. A rank left waiting would never end."""
    start_ranks(_fails_at_each_line, 2, tmp_path)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert [rank["wrong"] for rank in found] == [[], []]
    assert found[0]["lines"] == found[1]["lines"] > 300


# --- many ranks -----------------------------------------------------------------------------------------------------


class Meeting:
    """Where the threads that play ranks meet: each brings a tensor, and all get what comes of them."""

    def __init__(self, count):
        self.brought, self.result, self.combine = [None] * count, None, None
        self.barrier = threading.Barrier(count, self._combined)

    def _combined(self):
        if self.combine is not None:
            self.result, self.combine = self.combine(torch.stack(self.brought)), None

    def __call__(self, rank, part, combine):
        self.brought[rank], self.combine = part, combine
        self.barrier.wait(PATIENCE)
        result = self.result.clone()
        self.barrier.wait(PATIENCE)  # nobody brings the next one before all have this one
        return result


class ThreadGroup(Group):
    """One of many ranks, played by threads of one process; it counts what it hands to collectives, as if it told of
    failures before each of them."""

    def __init__(self, rank, count, meeting):
        self.rank, self.count, self.meeting = rank, count, meeting
        self.floats = 0

    def total(self, part):
        self.floats += part.numel() * part.element_size() // 4 + 1
        return self.meeting(self.rank, part, lambda parts: parts.sum(dim=0))

    def least(self, part):
        self.floats += part.numel() + 1
        return self.meeting(self.rank, part, lambda parts: parts.amin(dim=0))

    def first(self, make, like):
        return self.total(make() if self.rank == 0 else torch.zeros_like(like))

    def joined(self, part, size):
        whole = part.new_zeros(size)
        whole[self.part(size)] = part
        return self.total(whole)

    def attempt(self, make):
        made = make()
        self.floats += 1
        return made


def test_256_ranks_share_a_plan(monkeypatch):
    """At the default cap, from 129 ranks on, each of them once made the whole plan for itself."""
    count, n = 256, solver._LEAST_PART * 256
    previous = PlanSolver(0.05).solve(*paired_features(n, seed=1))
    pair = paired_features(n, seed=2)
    alone = PlanSolver(0.05).solve(*pair, step=1, previous=previous)
    meeting = Meeting(count)
    members = [ThreadGroup(rank, count, meeting) for rank in range(count)]
    sizes = {}  # of the largest matrix that a rank lays out
    all_rows, local = cost_module.all_rows, threading.local()

    def watched(cost):
        rank = getattr(local, "rank", None)
        sizes[rank] = max(sizes.get(rank, 0), cost.shape[0] * cost.shape[1])
        return all_rows(cost)

    def solve(group):
        local.rank = group.rank
        torch.set_num_threads(1)
        return PlanSolver(0.05, group=group).solve(*pair, step=1, previous=previous)

    monkeypatch.setattr(cost_module, "all_rows", watched)
    with ThreadPoolExecutor(count) as pool:
        plans = list(pool.map(solve, members))
    assert len({plan.digest() for plan in plans}) == 1
    offset = plans[0].f.mean() - alone.f.mean()  # potentials are free up to a constant
    torch.testing.assert_close(plans[0].f - offset, alone.f, atol=2e-3, rtol=0)
    assert sizes.pop(0) == n * n  # the initial plan
    assert set(sizes) == set(range(1, count))
    assert max(sizes.values()) <= n * n // count
    run = Run(batch=1, ranks=count, window=8, max_support=n)
    assert {member.floats for member in members} == {run.plan_floats(int(plans[0].diagnostics["iterations"]))}


def test_the_digest_is_logged_in_debug_mode_alone(caplog):
    with caplog.at_level(logging.INFO):
        train(callback(ALONE))
    assert "digest" not in caplog.text
    with caplog.at_level(logging.DEBUG):
        hook = train(callback(ALONE))
    for step in (1, 3, 5):
        assert f"digest {hook.cache[step].digest()} at step {step} on rank 0" in caplog.text
