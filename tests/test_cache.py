"""The window of features and the cache of plans."""

from __future__ import annotations

import io

import pytest
import torch
from conftest import paired_features
from hypothesis import given, settings
from hypothesis import strategies as st

from openclip_otco import FeatureWindow, PlanCache, PlanSolver


def plan_at(step: int):
    return PlanSolver().solve(*paired_features(8, seed=step), step=step)


def tagged(count: int, step: int) -> torch.Tensor:
    """Features whose two entries are the step and the row, so that a pair can be recognised."""
    return torch.stack([torch.full((count,), float(step)), torch.arange(count).float()], dim=1)


@settings(deadline=None, max_examples=60)
@given(
    steps=st.integers(1, 6),
    max_support=st.integers(1, 50),
    sizes=st.lists(st.integers(1, 30), min_size=6, max_size=6),
    seed=st.integers(0, 3),
)
def test_a_window_is_bounded_and_keeps_pairs_together(steps, max_support, sizes, seed):
    window = FeatureWindow(steps, max_support, seed)
    for step in range(steps):
        assert not window.full
        window.add(tagged(sizes[step], step), tagged(sizes[step], step), step)
    assert window.full
    if max_support >= steps:
        images, texts = window.features()
        assert torch.equal(images, texts)
        assert len(images) <= max_support
        assert len(torch.unique(images, dim=0)) == len(images)
        if sum(sizes[:steps]) <= max_support // steps * steps and max(sizes[:steps]) <= max_support // steps:
            assert len(images) == sum(sizes[:steps])
    window.clear()
    assert len(window) == 0


def subsample(seed: int, step: int) -> list[float]:
    """The rows that a window keeps of a batch."""
    window = FeatureWindow(1, 10, seed)
    window.add(tagged(100, 7), tagged(100, 7), step)
    return window.features()[0][:, 1].tolist()


def test_subsamples_depend_on_seed_and_step_alone():
    assert len(subsample(0, 7)) == 10
    assert subsample(0, 7) == subsample(0, 7)
    assert subsample(0, 7) != subsample(1, 7)
    assert subsample(0, 7) != subsample(0, 8)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_pairs_that_are_not_finite_are_left_out_and_counted(bad):
    window = FeatureWindow(1)
    images, texts = tagged(5, 0), tagged(5, 0)
    images[1, 0] = bad
    texts[3, 1] = bad
    window.add(images, texts, step=0)
    images, texts = window.features()
    assert images[:, 1].tolist() == [0, 2, 4]
    assert torch.equal(images, texts)
    assert window.dropped == 2


def test_an_empty_window_says_so():
    with pytest.raises(ValueError, match="empty"):
        FeatureWindow(1).features()


def test_a_window_of_nothing_finite_says_so():
    window = FeatureWindow(1)
    window.add(torch.full((2, 3), float("nan")), torch.ones(2, 3), step=0)
    with pytest.raises(ValueError, match="no finite features"):
        window.features()


def test_the_window_does_not_alias_the_batch():
    window, batch = FeatureWindow(1), tagged(3, 0)
    window.add(batch, batch, step=0)
    batch.zero_()
    assert window.features()[0].abs().sum() > 0


def test_the_oldest_plan_goes_first():
    cache = PlanCache(2)
    assert cache.newest is None
    for step in (0, 8, 16):
        cache.add(plan_at(step))
    assert list(cache) == [8, 16]
    assert cache.newest is cache[16]


@settings(deadline=None, max_examples=20)
@given(count=st.integers(1, 6), step=st.integers(0, 10**6), seed=st.integers(0, 5))
def test_draws_are_distinct_and_repeatable(count, step, seed):
    caches = [PlanCache(4, seed), PlanCache(4, seed)]
    for cache in caches:
        for at in range(3):
            cache.add(plan_at(at))
    drawn = [[plan.step for plan in cache.draw(count, step)] for cache in caches]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == min(count, 3)


def test_every_plan_is_drawn_sooner_or_later():
    cache = PlanCache(4)
    for at in range(4):
        cache.add(plan_at(at))
    counts = torch.bincount(torch.tensor([cache.draw(1, step)[0].step for step in range(400)]), minlength=4)
    assert counts.min() > 60


def test_state_survives_a_checkpoint_without_code():
    cache, window = PlanCache(3), FeatureWindow(4)
    for step in (0, 8):
        cache.add(plan_at(step))
    window.add(*paired_features(5), step=9)
    buffer = io.BytesIO()
    torch.save({"cache": cache.state_dict(), "window": window.state_dict()}, buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    restored_cache, restored_window = PlanCache(3), FeatureWindow(4)
    restored_cache.load_state_dict(state["cache"])
    restored_window.load_state_dict(state["window"])
    assert list(restored_cache) == [0, 8]
    assert torch.equal(restored_cache[8].f, cache[8].f)
    assert len(restored_window) == 1
    assert torch.equal(restored_window.features()[1], window.features()[1])


@pytest.mark.parametrize(("steps", "max_support"), [(8, 512), (4, 8192), (1, 100)])
def test_a_smaller_window_takes_what_it_has_room_for(steps, max_support):
    large, small = FeatureWindow(8, 8192), FeatureWindow(steps, max_support)
    for step in range(7):
        large.add(tagged(1000, step), tagged(1000, step), step)
    small.load_state_dict(large.state_dict())
    assert not small.full
    small.add(tagged(1000, 7), tagged(1000, 7), 7)
    images, texts = small.features()
    assert len(images) <= max_support
    assert torch.equal(images, texts)
    assert images[:, 0].unique().tolist() == list(range(8 - len(small), 8))


def test_a_smaller_cache_takes_the_newest_plans_of_a_larger_one():
    large, small = PlanCache(4), PlanCache(1)
    for step in (0, 8, 16):
        large.add(plan_at(step))
    small.load_state_dict(large.state_dict())
    assert list(small) == [16]


@pytest.mark.parametrize("make", [lambda: PlanCache(0), lambda: FeatureWindow(0), lambda: FeatureWindow(1, 0)])
def test_sizes_below_one_are_refused(make):
    with pytest.raises(ValueError, match="at least 1"):
        make()


def test_a_window_with_a_skipped_step_is_saved_and_taken_up():
    window, again = FeatureWindow(4), FeatureWindow(4)
    window.add(*paired_features(5), step=0)
    window.skip()
    again.load_state_dict(window.state_dict())
    assert len(again) == 2
    assert all(torch.equal(x, y) for x, y in zip(again.features(), window.features(), strict=True))
