"""PlanCacheCallback: when plans are made and set, what is logged, and that nothing that fails ends training."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import random
import sys
import types

import pytest
import torch
from conftest import paired_features
from hypothesis import given, settings
from hypothesis import strategies as st

from openclip_otco import FeatureWindow, OTCOLoss, PlanCache, PlanCacheCallback, PlanSolver


class Writer:
    def __init__(self):
        self.scalars = []

    def add_scalar(self, tag, scalar_value, global_step):
        self.scalars.append((tag, scalar_value, global_step))


class FailingSolver(PlanSolver):
    error: type[Exception] = RuntimeError

    def solve(self, *args, **kwargs):
        raise self.error("no plan today")


def make_callback(window=4, cache=2, solver=None, **settings) -> PlanCacheCallback:
    loss = OTCOLoss(confidence=1.0)
    return PlanCacheCallback(loss, FeatureWindow(window), PlanCache(cache), solver or PlanSolver(), **settings)


def train(callback: PlanCacheCallback, steps: range, writer=None, batch: int = 16) -> None:
    for step in steps:
        v, t = paired_features(batch, seed=step)
        losses = callback.loss(v, t, torch.tensor(10.0), output_dict=True)
        features = {"image_features": v, "text_features": t}
        callback.on_step_end(step=step, epoch=0, features=features, losses=losses, writer=writer)


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
    assert callback.loss.newest is None
    assert callback.loss.drawn == ()
    train(callback, range(9, 10))
    assert callback.loss.newest is callback.cache.newest
    assert len(callback.loss.drawn) == 1


def test_a_plan_that_fails_is_counted_and_the_last_good_one_stays(caplog):
    callback = make_callback(warmup=0)
    callback.on_train_start(step=0, total_steps=100)
    train(callback, range(4))
    good = callback.loss.newest
    callback.solver = FailingSolver()
    with caplog.at_level(logging.WARNING):
        train(callback, range(4, 8))
    assert callback.loss.newest is good
    assert (callback.made, callback.skipped) == (1, 1)
    assert "OTCO plan at step 7 skipped, going on with the last good one. RuntimeError: no plan today" in caplog.text
    callback.solver = PlanSolver()
    train(callback, range(8, 12))
    assert callback.loss.newest.step == 11


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
    callback.on_step_end(step=3, epoch=0, features={"image_features": nan, "text_features": nan}, losses={})
    assert len(callback.loss.newest) == 48
    assert callback.window.dropped == 16


def test_a_window_of_nan_skips_the_plan():
    callback = make_callback(window=1)
    callback.on_train_start(step=0, total_steps=10)
    nan = torch.full((16, 24), float("nan"))
    callback.on_step_end(step=0, epoch=0, features={"image_features": nan, "text_features": nan}, losses={})
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
    callback = make_callback(log_every=8)
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
    assert lines[-1] == "OTCO Plans: 4 made, 0 skipped, 0 non-finite pairs dropped"


def test_other_ranks_stay_silent(caplog):
    callback, writer = make_callback(master=False), Writer()
    callback.on_load_checkpoint(None)
    callback.on_train_start(step=0, total_steps=100)
    with caplog.at_level(logging.INFO):
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
    assert resumed.loss.newest.step == 11
    train(resumed, range(14, 22))
    assert list(resumed.cache) == list(straight.cache)
    for step in straight.cache:
        assert torch.equal(resumed.cache[step].f, straight.cache[step].f)
    assert [plan.step for plan in resumed.loss.drawn] == [plan.step for plan in straight.loss.drawn]
    assert resumed.made == straight.made


def test_a_plain_checkpoint_resumes_with_an_empty_cache_and_one_line(caplog):
    callback = make_callback()
    with caplog.at_level(logging.INFO):
        callback.on_load_checkpoint(None)
    assert [record.message for record in caplog.records] == [
        "=> no OTCO state in the checkpoint, starting with an empty plan cache"
    ]
    callback.on_train_start(step=5, total_steps=10)
    assert callback.loss.newest is None


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
    assert all(plan.image_features.shape[1] == v.shape[1] for plan in callback.loss.drawn)
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
    def __reduce__(self):
        return print, ("executed",)


def test_a_checkpoint_that_carries_code_is_refused(capsys):
    buffer = io.BytesIO()
    torch.save({"plugins": {"otco": {**STATE, "made": Payload()}}}, buffer)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("setting", "message"), [({"plans_per_step": 0}, "plans_per_step"), ({"warmup": -0.1}, "warmup"),
                             ({"warmup": 1.1}, "warmup")]
)  # fmt: skip
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        make_callback(**setting)
