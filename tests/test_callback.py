"""PlanCacheCallback: when plans are made and set, what is logged, and that nothing that fails ends training."""

from __future__ import annotations

import copy
import gc
import io
import logging
import pickle
import random
import sys
import types
import weakref
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from conftest import paired_features
from forks import PATIENCE, start_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip_train.file_utils import pt_load

from openclip_otco import FeatureWindow, OTCOLoss, PlanCache, PlanCacheCallback, PlanSolver
from openclip_otco.ot.group import DistributedGroup
from openclip_otco.train.plan_log import PlanLog


class Writer:
    def __init__(self):
        self.scalars = []

    def add_scalar(self, tag, scalar_value, global_step):
        self.scalars.append((tag, scalar_value, global_step))


class FailingSolver(PlanSolver):
    error: type[Exception] = RuntimeError

    def solve(self, *args, **kwargs):
        raise self.error("no plan today")


def make_callback(
    window=4, cache=2, solver=None, log_every=100, master=True, wandb=False, **settings
) -> PlanCacheCallback:
    """A callback; `callback.loss` is the loss whose plans it sets."""
    loss = OTCOLoss(confidence=1.0)
    log = PlanLog(log_every, master, wandb)
    callback = PlanCacheCallback(
        loss.exchange, FeatureWindow(window), PlanCache(cache), solver or PlanSolver(), log=log, **settings
    )
    callback.loss = loss
    return callback


def train(callback: PlanCacheCallback, steps: range, writer=None, batch: int = 16) -> None:
    for step in steps:
        v, t = paired_features(batch, seed=step)
        losses = callback.loss(v, t, torch.tensor(10.0), output_dict=True)
        callback.on_step_end(step=step, epoch=0, losses=losses, writer=writer)


def test_a_plan_is_made_of_every_window():
    callback = make_callback()
    callback.on_train_start(step=0, total_steps=100)
    train(callback, range(3))
    assert len(callback.cache) == 0
    train(callback, range(3, 13))
    assert list(callback.cache) == [7, 11]
    assert callback.made == 3
    plan = callback.cache[7]
    assert torch.equal(plan.image_features, torch.cat([paired_features(16, seed=step)[0] for step in range(4, 8)]))


def test_plans_act_when_the_warmup_is_over():
    callback = make_callback(warmup=0.1)
    callback.on_train_start(step=0, total_steps=100)
    train(callback, range(9))
    assert callback.exchange.newest is None
    assert callback.exchange.drawn == ()
    train(callback, range(9, 10))
    assert callback.exchange.newest is callback.cache.newest
    assert len(callback.exchange.drawn) == 1


def test_a_plan_that_fails_is_counted_and_the_last_good_one_stays(caplog):
    callback = make_callback(warmup=0)
    callback.on_train_start(step=0, total_steps=100)
    train(callback, range(4))
    good = callback.exchange.newest
    callback.solver = FailingSolver()
    with caplog.at_level(logging.WARNING):
        train(callback, range(4, 8))
    assert callback.exchange.newest is good
    assert (callback.made, callback.skipped) == (1, 1)
    assert "OTCO plan at step 7 skipped, going on with the last good one. RuntimeError: no plan today" in caplog.text
    callback.solver = PlanSolver()
    train(callback, range(8, 12))
    assert callback.exchange.newest.step == 11


@pytest.mark.parametrize("error", [MemoryError, AssertionError, TypeError])
def test_no_failure_of_a_plan_ends_training_and_one_that_lasts_is_not_told_each_time(caplog, monkeypatch, error):
    monkeypatch.setattr(FailingSolver, "error", error)
    callback = make_callback(window=1, solver=FailingSolver(), log_every=10)
    callback.on_train_start(step=0, total_steps=100)
    train(callback, range(20))
    assert callback.skipped == 20
    assert [record.message.split(" skipped")[0] for record in caplog.records] == [
        "OTCO plan at step 0",
        "OTCO plan at step 10",
    ]


def test_a_batch_of_nan_costs_its_pairs_only():
    callback = make_callback(warmup=0)
    callback.on_train_start(step=0, total_steps=100)
    train(callback, range(3))
    nan = torch.full((16, 24), float("nan"))
    callback.loss(nan, nan, torch.tensor(10.0))
    callback.on_step_end(step=3, epoch=0, losses={})
    assert len(callback.exchange.newest) == 48
    assert callback.window.dropped == 16


def test_a_window_of_nan_skips_the_plan():
    callback = make_callback(window=1)
    callback.on_train_start(step=0, total_steps=10)
    nan = torch.full((16, 24), float("nan"))
    callback.loss(nan, nan, torch.tensor(10.0))
    callback.on_step_end(step=0, epoch=0, losses={})
    assert callback.skipped == 1


def test_every_plan_goes_to_the_writer_on_the_step_axis():
    callback, writer = make_callback(), Writer()
    callback.on_train_start(step=0, total_steps=100)
    train(callback, range(8), writer)
    tags = {tag for tag, _, _ in writer.scalars}
    assert tags >= {
        f"train/otco_{name}"
        for name in (
            "objective", "additive_error", "iterations", "marginal_error", "entropy", "own_pair_mass", "drift_image",
            "drift_text", "seconds", "effective_share",
        )
    }  # fmt: skip
    assert {step for _, _, step in writer.scalars} == {3, 7}
    assert all(isinstance(value, float | int) for _, value, _ in writer.scalars)


def test_the_share_of_matched_pairs_goes_to_the_writer():
    callback, writer = make_callback(), Writer()
    callback.on_train_start(step=0, total_steps=100)
    train(callback, range(8), writer)
    shares = [value for tag, value, _ in writer.scalars if tag == "train/otco_matched_share"]
    assert shares
    assert all(0 <= value <= 1 for value in shares)


def test_every_plan_goes_to_wandb_on_the_step_axis(monkeypatch):
    logged = []
    fake = types.SimpleNamespace(log=lambda metrics, step: logged.append((step, metrics)))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    callback = make_callback(wandb=True)
    callback.on_train_start(step=0, total_steps=100)
    train(callback, range(8))
    assert [step for step, _ in logged] == [3, 7]
    assert logged[1][1]["train/otco_objective"] == callback.cache[7].diagnostics["objective"]


def test_the_log_line_comes_at_open_clips_pace(caplog):
    callback = make_callback(log_every=8, warmup=0.05)
    callback.on_train_start(step=0, total_steps=100)
    with caplog.at_level(logging.INFO):
        train(callback, range(16))
        callback.on_train_end(step=16)
    lines = [record.message for record in caplog.records]
    assert [line.split(")")[0] for line in lines[:-1]] == [
        "OTCO Plan: 1 (step 3, N 64",
        "OTCO Plan: 3 (step 11, N 64",
    ]
    assert "Objective: 0." in lines[0]
    assert "Own Pair Mass: " in lines[0]
    assert lines[-1] == "OTCO Plans: 4 made, 0 skipped, 0 non-finite pairs dropped; plans acted in 11 of 16 steps"


def test_other_ranks_stay_silent(caplog):
    callback, writer = make_callback(master=False, warmup=1), Writer()
    with caplog.at_level(logging.INFO):
        callback.on_load_checkpoint(None)
        callback.on_train_start(step=0, total_steps=100)
        train(callback, range(8), writer)
        callback.on_train_end(step=8)
    assert caplog.text == ""
    assert writer.scalars == []
    assert callback.made == 2


def test_a_resumed_run_goes_on_as_one_that_was_not_stopped():
    straight = make_callback(warmup=0)
    straight.on_train_start(step=0, total_steps=40)
    train(straight, range(14))
    buffer = io.BytesIO()
    torch.save(straight.on_save_checkpoint(), buffer)
    buffer.seek(0)
    train(straight, range(14, 22))

    resumed = make_callback(warmup=0)
    resumed.on_load_checkpoint(torch.load(buffer, weights_only=True))
    resumed.on_train_start(step=14, total_steps=40)
    assert resumed.exchange.newest.step == 11
    train(resumed, range(14, 22))
    assert list(resumed.cache) == list(straight.cache)
    for step in straight.cache:
        assert torch.equal(resumed.cache[step].f, straight.cache[step].f)
    assert [plan.step for plan in resumed.exchange.drawn] == [plan.step for plan in straight.exchange.drawn]
    assert resumed.made == straight.made


@pytest.mark.parametrize("step", [7, 14, 28, 5000])
def test_a_run_that_counts_its_steps_otherwise_takes_the_plans_at_their_age(caplog, step):
    """OpenCLIP counts steps from the epoch, so that half the batch size doubles them."""
    first = make_callback(warmup=0)
    first.on_train_start(step=0, total_steps=40)
    train(first, range(14))
    ages = [14 - made for made in first.cache]
    resumed = make_callback(warmup=0)
    with caplog.at_level(logging.WARNING):
        resumed.on_load_checkpoint(first.on_save_checkpoint())
        resumed.on_train_start(step=step, total_steps=10_000)
        assert [step - made for made in resumed.cache] == ages
        train(resumed, range(step, step + 2))
    assert resumed.exchange.newest is not None
    assert caplog.text == ""
    # And once more, from what this run has saved.
    again = make_callback(warmup=0)
    again.on_load_checkpoint(resumed.on_save_checkpoint())
    again.on_train_start(step=step + 2, total_steps=10_000)
    assert list(again.cache) == list(resumed.cache)


def test_a_plain_checkpoint_resumes_with_an_empty_cache_and_one_line(caplog):
    callback = make_callback()
    with caplog.at_level(logging.INFO):
        callback.on_load_checkpoint(None)
    assert [record.message for record in caplog.records] == [
        "=> no OTCO state in the checkpoint, starting with an empty plan cache"
    ]
    callback.on_train_start(step=5, total_steps=10)
    assert callback.exchange.newest is None


def saved_state() -> dict:
    callback = make_callback(warmup=0)
    callback.on_train_start(step=0, total_steps=40)
    train(callback, range(10))
    return callback.on_save_checkpoint()


def takes_up_and_trains(state) -> PlanCacheCallback:
    """Whatever the state is: it is used or told of, and training goes on with finite numbers."""
    callback = make_callback(warmup=0)
    callback.on_load_checkpoint(state)
    callback.on_train_start(step=10, total_steps=40)
    v, t = paired_features(16, seed=0)
    assert all(plan.image_features.shape[1] == v.shape[1] for plan in callback.exchange.drawn)
    assert torch.isfinite(callback.loss(v, t, torch.tensor(10.0)))
    return callback


def test_a_thousand_broken_checkpoints_are_refused_or_survived(caplog):
    """Bytes flipped, cut off, doubled: the loader refuses the file, or what it yields is taken up without harm."""
    caplog.set_level(logging.CRITICAL)
    buffer = io.BytesIO()
    torch.save({"plugins": {"otco": saved_state()}}, buffer)
    whole, generator = buffer.getvalue(), random.Random(0)
    refused = survived = 0
    for _ in range(1000):
        data = bytearray(whole)
        at = generator.randrange(len(data))
        match generator.randrange(4):
            case 0:
                data = data[:at]
            case 1:
                data[at : at + 64] = data[: generator.randrange(64)]
            case _:
                for _ in range(generator.choice((1, 4, 64))):
                    data[generator.randrange(len(data))] = generator.randrange(256)
        try:
            state = torch.load(io.BytesIO(bytes(data)), weights_only=True)["plugins"]["otco"]
        except Exception:
            refused += 1
            continue
        takes_up_and_trains(state)
        survived += 1
    assert refused + survived == 1000
    assert min(refused, survived) > 50


ANYTHING = st.one_of(
    st.none(), st.integers(-3, 3), st.floats(), st.text(max_size=3), st.lists(st.integers(), max_size=2),
    st.just({}), st.builds(lambda *shape: torch.zeros(shape), st.integers(0, 3), st.integers(0, 3)),
    st.just(torch.full((4, 24), torch.nan)), st.just(torch.zeros(8, dtype=torch.int64)),
)  # fmt: skip


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_value_anywhere_in_the_state_is_survived(data):
    state = copy.deepcopy(STATE)
    node = state
    while True:
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else list(range(len(node)))))
        child = node[key]
        if not isinstance(child, dict | list) or not child or data.draw(st.booleans()):
            break
        node = child
    if data.draw(st.booleans()):
        node[key] = data.draw(ANYTHING)
    else:
        del node[key]
    takes_up_and_trains(state)


STATE = saved_state()


def test_a_broken_state_is_told_in_one_line(caplog):
    state = copy.deepcopy(STATE)
    state["cache"]["plans"][0]["f"][3] = torch.nan
    callback = make_callback()
    callback.on_load_checkpoint(state)
    assert len(callback.cache) == len(callback.window) == 0
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "not usable, starting with an empty one. ValueError: a plan's" in caplog.text


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return Path.mkdir, (self.folder,)


def test_open_clip_refuses_a_checkpoint_that_carries_code(tmp_path):
    """By the function that `main` loads `--resume` with."""
    executed, file = tmp_path / "executed", tmp_path / "epoch_1.pt"
    torch.save({"plugins": {"otco": {**STATE, "made": Payload(executed)}}}, file)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        pt_load(str(file), map_location="cpu")
    assert not executed.exists()
    torch.load(file, weights_only=False)
    assert executed.exists()  # it would have run


def test_the_gathered_batch_is_released_when_the_window_has_it():
    callback = make_callback()
    callback.on_train_start(step=0, total_steps=100)
    v, t = paired_features(16)
    callback.loss(v, t, torch.tensor(10.0))
    gathered = [weakref.ref(side) for side in callback.exchange.features]
    callback.on_step_end(step=0, epoch=0, losses={})
    gc.collect()
    assert [side() for side in gathered] == [None, None]
    assert len(callback.window) == 1


def test_a_step_without_a_call_of_the_loss_skips_the_plan(caplog):
    callback = make_callback(window=1)
    callback.on_train_start(step=0, total_steps=100)
    callback.on_step_end(step=0, epoch=0, losses={})
    assert (callback.made, callback.skipped) == (0, 1)
    assert "the loss was not called in this step" in caplog.text


def test_a_window_that_fails_releases_the_gathered_batch_too(monkeypatch):
    callback = make_callback()
    callback.on_train_start(step=0, total_steps=100)
    v, t = paired_features(16)
    callback.loss(v, t, torch.tensor(10.0))
    monkeypatch.setattr(callback.window, "add", lambda *features, step: 1 / 0)
    callback.on_step_end(step=0, epoch=0, losses={})
    assert callback.exchange.features is None


# --- Runs in which no plan acts


@pytest.mark.parametrize(
    ("window", "warmup", "total_steps", "words"),
    [
        (4, 0.0, 4, ["--otco-window 4"]),
        (4, 0.0, 5, []),
        (4, 1.0, 100, ["--otco-warmup 1.0"]),
        (4, 0.95, 10, ["--otco-warmup 0.95"]),
        (4, 0.9, 10, []),
        (4, 1.0, 3, ["--otco-window 4", "--otco-warmup 1.0"]),
    ],
)
def test_a_run_in_which_no_plan_can_act_is_told_at_its_start(caplog, window, warmup, total_steps, words):
    callback = make_callback(window=window, warmup=warmup)
    callback.on_train_start(step=0, total_steps=total_steps)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * len(words)
    for record, word in zip(caplog.records, words, strict=True):
        assert word in record.message
        assert "No plan will act" in record.message
    train(callback, range(total_steps))
    assert (callback.acted == 0) == bool(words)


def test_a_resumed_run_with_plans_is_not_told_that_its_window_is_too_long(caplog):
    callback = make_callback()
    callback.on_load_checkpoint(copy.deepcopy(STATE))
    callback.on_train_start(step=10, total_steps=11)  # two steps are in the window
    train(callback, range(10, 11))
    assert caplog.text == ""
    assert callback.acted == STATE["acted"] + 1


def test_a_run_that_is_over_is_not_warned_of(caplog):
    make_callback(warmup=1).on_train_start(step=10, total_steps=10)
    assert caplog.text == ""


def test_a_run_in_which_no_plan_acted_says_so_at_its_end(caplog):
    callback = make_callback(window=8, warmup=0)
    callback.on_train_start(step=0, total_steps=5)
    train(callback, range(5))
    caplog.clear()
    callback.on_train_end(step=5)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "OTCO Plans: 0 made, 0 skipped" in record.message
    assert "plans acted in 0 of 5 steps" in record.message


def test_plans_that_have_no_weight_do_not_act():
    callback = make_callback(warmup=0)
    callback.loss.confidence = callback.loss.negative_power = 0.0
    callback.on_train_start(step=0, total_steps=10)
    train(callback, range(6))
    assert (callback.made, callback.acted) == (1, 0)
    callback.loss.transport_weight = 0.5
    train(callback, range(6, 8))
    assert callback.acted == 2


def test_steps_are_counted_on_after_a_resume():
    callback = make_callback(warmup=0)
    callback.on_load_checkpoint(copy.deepcopy(STATE))
    callback.on_train_start(step=10, total_steps=40)
    train(callback, range(10, 13))
    assert (callback.steps, callback.acted) == (13, 9)  # the first plan came with the fourth step


def test_a_state_without_the_counts_of_steps_is_taken_up():
    old = {key: value for key, value in STATE.items() if key not in ("steps", "acted")}
    callback = make_callback(warmup=0)
    callback.on_load_checkpoint(copy.deepcopy(old))
    assert len(callback.cache) == 2
    callback.on_train_start(step=10, total_steps=40)
    train(callback, range(10, 13))
    assert (callback.steps, callback.acted) == (3, 3)


def test_a_plan_that_is_too_old_acts_no_longer(caplog):
    callback = make_callback(window=2, warmup=0, max_age=3, log_every=4)
    callback.on_train_start(step=0, total_steps=100)
    train(callback, range(2))
    callback.solver = FailingSolver()
    train(callback, range(2, 7))
    assert callback.exchange.newest.step == 1
    caplog.clear()
    train(callback, range(7, 20))  # at step 8 the plan is seven steps old, and three windows are six
    assert callback.acted == 6
    assert callback.exchange.newest is None
    assert callback.exchange.drawn == ()
    lines = [record.message for record in caplog.records]
    assert [line.split(" skipped")[0] for line in lines if " skipped, going on" in line] == [
        f"OTCO plan at step {step}" for step in (7, 11, 15, 19)
    ]
    assert [index for index, line in enumerate(lines) if "--otco-max-age 3" in line] == [1]
    assert all("going on without a plan" in line for line in lines[2:])
    callback.solver = PlanSolver()
    train(callback, range(20, 23))
    assert callback.exchange.newest.step == 21


def test_of_an_old_and_a_new_plan_only_the_new_one_acts(caplog):
    callback = make_callback(window=2, cache=4, warmup=0, max_age=4)
    callback.on_train_start(step=0, total_steps=100)
    train(callback, range(2))
    callback.solver = FailingSolver()
    train(callback, range(2, 8))
    callback.solver = PlanSolver()
    train(callback, range(8, 10))
    assert list(callback.cache) == [9]
    assert "--otco-max-age" not in caplog.text


def test_a_run_without_failures_never_meets_the_age(caplog):
    callback = make_callback(window=2, cache=3, warmup=0, max_age=3)
    callback.on_train_start(step=0, total_steps=100)
    train(callback, range(12))
    assert list(callback.cache) == [7, 9, 11]
    assert len(callback.exchange.drawn) == 1
    assert caplog.text == ""


# --- Ranks and their states


def _states(rank: int) -> dict[str, dict | None]:
    """By case, what the rank finds in its checkpoint. The second one finds something else than the first."""
    good = copy.deepcopy(STATE)
    if rank == 0:
        return dict.fromkeys(("good", "broken", "missing", "other plans", "other window"), good) | {"first": None}
    broken, plans, window = (copy.deepcopy(STATE) for _ in range(3))
    broken["cache"]["plans"][0]["f"][3] = torch.nan
    plans["cache"]["plans"][1]["g"][0] += 0.5
    window["window"]["batches"].pop()
    states = {"good": good, "broken": broken, "missing": None, "other plans": plans, "other window": window}
    return states | {"first": good}


def _rank(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/store", world_size=world, rank=rank, timeout=timedelta(seconds=PATIENCE)
    )
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    out = {}
    for case, state in _states(rank).items():
        lines.clear()
        hook = make_callback(solver=PlanSolver(group=DistributedGroup()), warmup=0, master=rank == 0)
        hook.on_load_checkpoint(state)
        loaded = (list(hook.cache), len(hook.window), hook.made, list(lines))
        hook.on_train_start(step=10, total_steps=40)
        train(hook, range(10, 14), batch=64)
        out[case] = (*loaded, hook.skipped, [hook.cache[step].digest() for step in hook.cache])
    torch.save(out, folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_all_ranks_take_up_a_state_or_none_does(tmp_path):
    """That they come back says that none waits for another; each then makes a plan with the others."""
    start_ranks(_rank, 2, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for case, (plans, steps, made, lines, skipped, digests) in first.items():
        assert second[case] == (plans, steps, made, [], skipped, digests), case
        assert skipped == 0
        if case == "good":
            assert (plans, steps, made, lines) == ([3, 7], 2, 2, [])
            assert len(digests) == 2
        else:
            assert (plans, steps, made) == ([], 0, 0), case
            assert len(digests) == 1
            (line,) = lines
            assert "not usable on all ranks, starting with an empty one" in line


@pytest.mark.parametrize(
    ("setting", "message"), [({"plans_per_step": 0}, "plans_per_step"), ({"warmup": -0.1}, "warmup"),
                             ({"warmup": 1.1}, "warmup"), ({"max_age": 1}, "max_age")]
)  # fmt: skip
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        make_callback(**setting)
