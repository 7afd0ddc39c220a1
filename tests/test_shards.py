"""Plans that ranks make together: the same on all of them, the same as one makes alone, and nobody left waiting."""

import importlib
import logging
from pathlib import Path

import pytest
import torch
from conftest import free_port, paired_features

from openclip_otco import solver
from openclip_otco.cache import FeatureWindow, PlanCache
from openclip_otco.callback import PlanCacheCallback
from openclip_otco.loss import Features, OTCOLoss
from openclip_otco.ot import CosineCost, nearest_potentials, sinkhorn
from openclip_otco.ot import cost as cost_module
from openclip_otco.ot.shards import ALONE, DistributedShards
from openclip_otco.solver import PlanSolver

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


def solved(shards, epsilon, start):
    cost, a, b = problem()
    g = torch.linspace(-1, 1, 150) if start == "far" else None
    init = None if g is None else (torch.zeros(211), g)
    return sinkhorn(cost, epsilon, a, b, init=init, tol=3e-5, max_iterations=3000, shards=shards)


def windows():
    return [paired_features(512, seed=seed) for seed in (1, 2)]


def plans(shards, initial_plan="combinatorial"):
    """Two plans, the second with a warm start, of features that are enough to be shared out."""
    plan_solver = PlanSolver(0.05, initial_plan, shards=shards)
    first = plan_solver.solve(*windows()[0])
    return [first, plan_solver.solve(*windows()[1], step=1, previous=first)]


def callback(shards, steps=2):
    loss = OTCOLoss()
    return PlanCacheCallback(loss, FeatureWindow(steps), PlanCache(), PlanSolver(0.1, shards=shards), warmup=0.0)


def failing_rank(failing, world):
    """Initial plan and drift are the first rank's alone; of the rest the last one's fails."""
    return 0 if failing in ("the initial plan", "the drift") else world - 1


def train(hook, failing=None, rank=0):
    """Three windows of two steps. In the second one something fails, on one rank alone."""
    hook.on_train_start(step=0, total_steps=6)
    for step in range(6):
        batch = paired_features(256, seed=step)
        hook.loss.gathered = Features(*batch)
        with pytest.MonkeyPatch.context() as patch:
            if failing and step in (2, 3) and rank == failing_rank(failing, hook.solver.shards.count):
                _break(patch, failing, step, hook)
            hook.on_step_end(step=step, epoch=0, features={}, losses={})
    return hook


def _break(patch, failing, step, hook):
    # The package's attribute of this name is the function.
    module = importlib.import_module("openclip_otco.ot.sinkhorn")

    def fail(*args, **kwargs):
        raise MemoryError(failing)

    if failing == "a step's features":
        if step == 2:
            patch.setattr(hook.window, "add", fail)
    elif step == 3:
        owner, name = {
            "the initial plan": (PlanSolver, "_initial"),
            "the kernel": (module._Kernel, "_filled"),
            "a half-step": (module.torch, "mv"),
            "the drift": (solver, "_drift"),
            "the window": (hook.window, "features"),
        }[failing]
        patch.setattr(owner, name, fail)


def _rank(rank, world, port, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=world, rank=rank)
    shards = DistributedShards()
    out = {}
    for path, entries in POTENTIALS.items():
        cost_module.DENSE_ENTRIES = entries
        for epsilon in (0.02, 0.3):
            for start in ("zero", "far"):
                result = solved(shards, epsilon, start)
                out[f"{path}-{epsilon}-{start}"] = (result.f, result.g, result.marginal_error, result.value)
    cost, a, b = problem()
    candidates = [torch.zeros(150), result.g, torch.randn(150, generator=torch.Generator().manual_seed(1))]
    out["nearest"] = nearest_potentials(cost, candidates, 0.3, a, b, shards=shards)
    cost_module.DENSE_ENTRIES = POTENTIALS["kept"]
    out["plans"] = [plan.state_dict() for plan in plans(shards)]
    out["digests"] = [plan.digest() for plan in plans(shards)]
    with pytest.MonkeyPatch.context() as patch:
        # Without an initial plan no rank has use for the whole cost.
        sizes = []
        patch.setattr(solver, "_DRIFT_SUPPORT", 64)  # the drift has costs of its own
        patch.setattr(cost_module, "whole", lambda cost: sizes.append(cost.shape) or cost.rows(slice(0, cost.shape[0])))
        out["previous"] = [plan.state_dict() for plan in plans(shards, "previous")]
    out["largest part"] = max(n * m for n, m in sizes)
    for failing in FAILURES:
        hook = train(callback(shards), failing, rank)
        out[failing] = (hook.made, hook.skipped, list(hook.cache), [hook.cache[step].digest() for step in hook.cache])
    torch.save(out, folder / f"{world}-{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module", params=WORLDS)
def ranks(request, tmp_path_factory):
    """What each of the gloo ranks got."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(_rank, (request.param, free_port(), folder), nprocs=request.param)
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


def test_small_plans_are_not_shared_out(monkeypatch):
    class Counting(type(ALONE)):
        count = 4
        rank = 1

        def total(self, make, like):
            raise AssertionError("asked")

    small = PlanSolver(0.1, shards=Counting()).solve(*paired_features(100))
    assert small.digest() == PlanSolver(0.1).solve(*paired_features(100)).digest()


def test_the_digest_is_logged_in_debug_mode_alone(caplog):
    with caplog.at_level(logging.INFO):
        train(callback(ALONE))
    assert "digest" not in caplog.text
    with caplog.at_level(logging.DEBUG):
        hook = train(callback(ALONE))
    for step in (1, 3, 5):
        assert f"digest {hook.cache[step].digest()} at step {step} on rank 0" in caplog.text
