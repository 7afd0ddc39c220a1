"""Witnesses of an audit: against dense float64, against what is known of made-up groups, and on pairs made wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import paired_features
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles
from scipy.special import expit
from scipy.stats import norm

from openclip_otco.audit.canonical import Moments, _scaled_singular_vectors, canonical_space
from openclip_otco.audit.decoys import draw_decoys
from openclip_otco.audit.score import auroc
from openclip_otco.audit.structure import Structure, centred
from openclip_otco.audit.two_groups import (
    combined_posterior,
    discriminant_scores,
    posterior,
    posterior_by_reference,
    wrong_share,
)
from openclip_otco.audit.witnesses import canonical_cosines, combine_with_model, judge_by_towers

GROUPS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=40)


@settings(deadline=None)
@given(GROUPS, st.integers(0, 100))
def test_decoys_are_wrong_pairs_within_a_fold(groups: list[tuple[int, int]], seed: int) -> None:
    image, caption = torch.tensor(groups).T
    decoys = draw_decoys(image, caption, folds=3, count=2, seed=seed)
    for number in image.unique():
        assert len(decoys.fold[image == number].unique()) == 1
    first, second = decoys.pairs()
    assert (image[first] != image[second]).all()
    assert (caption[first] != caption[second]).all()
    assert torch.equal(decoys.fold[first], decoys.fold[second])
    again = draw_decoys(image, caption, folds=3, count=2, seed=seed)
    assert torch.equal(decoys.partner, again.partner)


def test_each_pair_has_its_decoys_where_there_are_other_images() -> None:
    image = torch.arange(100).repeat_interleave(5)
    decoys = draw_decoys(image, torch.arange(500), folds=4, count=3)
    assert (decoys.partner >= 0).all()
    assert torch.bincount(decoys.fold).tolist() == [125] * 4


@settings(deadline=None)
@given(GROUPS.filter(lambda groups: len({i for i, _ in groups}) > 4), st.integers(0, 100))
def test_structure_is_a_weighted_correlation(groups: list[tuple[int, int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    image, caption = torch.tensor(groups).T
    images = centred(torch.randn(10, 6, generator=generator))[image]
    texts = centred(torch.randn(10, 5, generator=generator))[caption]
    weights = torch.rand(len(groups), generator=generator) + 0.1
    first = torch.randint(len(groups), (7,), generator=generator)
    second = torch.randint(len(groups), (7,), generator=generator)
    found = Structure(images, texts, image, caption, sharpness=3.0).correlation(first, second, weights)
    x, y = (np.exp(3 * (each.double() @ each.double().T).numpy()) for each in (images, texts))
    for value, i, j in zip(found.tolist(), first.tolist(), second.tolist(), strict=True):
        heard = [
            k
            for k in range(len(groups))
            if groups[k][0] not in (groups[i][0], groups[j][0]) and groups[k][1] not in (groups[i][1], groups[j][1])
        ]
        if len({groups[k] for k in heard}) < 3:  # of two points the correlation is 1, -1 or nothing
            continue
        covariance = np.cov(x[i][heard], y[j][heard], aweights=weights.numpy()[heard])
        expected = covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1])
        assert value == pytest.approx(expected, abs=2e-3)


def test_a_structure_answers_alike_whatever_it_was_asked_before() -> None:
    images, texts = (centred(side) for side in paired_features(60, d=8, seed=0))
    image, caption = torch.arange(60) // 3, torch.arange(60) % 25
    pairs, (first, later) = torch.arange(60), torch.rand(2, 60, generator=torch.Generator().manual_seed(0))
    asked = Structure(images, texts, image, caption)
    asked.correlation(pairs, pairs.flip(0), first)
    found = asked.correlation(pairs, pairs.roll(1), later)
    expected = Structure(images, texts, image, caption).correlation(pairs, pairs.roll(1), later)
    assert torch.allclose(found, expected, atol=1e-5)
    assert found.std() > 0.1


@pytest.mark.parametrize(("d", "e"), [(12, 9), (9, 12), (7, 7)])
def test_scaled_singular_vectors_are_those_of_the_svd(d: int, e: int) -> None:
    matrix = torch.randn(d, e, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, right = _scaled_singular_vectors(matrix, 4)
    u, values, v = torch.linalg.svd(matrix)
    signs = (left * u[:, :4]).sum(dim=0).sign()
    assert torch.allclose(left * signs, u[:, :4] * values[:4])
    assert torch.allclose(right * signs, v[:4].T * values[:4])


def test_a_canonical_space_is_what_two_sides_share() -> None:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    sides = []
    for d in (12, 9):
        own = torch.randn(4000, d - 3, generator=generator, dtype=torch.float64)
        mixing = torch.randn(d, d, generator=generator, dtype=torch.float64)
        sides.append(torch.cat([shared, own], dim=1) @ mixing)
    space = canonical_space(Moments.of(*sides, torch.ones(4000, dtype=torch.float64)), ridge=1e-9, dimensions=3)
    for points in ((sides[0] - space.image_mean) @ space.image_map, (sides[1] - space.text_mean) @ space.text_map):
        assert np.rad2deg(subspace_angles(points.numpy(), (shared - shared.mean(dim=0)).numpy())).max() < 1e-3
    assert (space.images(sides[0]) * space.texts(sides[1])).sum(dim=1).min() > 0.999


def test_pairs_without_weight_are_not_there() -> None:
    v, t = paired_features(200, d=16, seed=3)
    weights = torch.ones(200)
    weights[100:] = 0
    space = canonical_space(Moments.of(v, t, weights))
    alone = canonical_space(Moments.of(v[:100], t[:100], torch.ones(100)))
    assert torch.allclose(space.images(v) @ space.texts(t).T, alone.images(v) @ alone.texts(t).T, atol=1e-4)


def test_moments_of_parts_add_up() -> None:
    v, t = paired_features(60, d=8, seed=0)
    weights = torch.rand(60, generator=torch.Generator().manual_seed(0))
    added = Moments.of(v[:20], t[:20], weights[:20]) + Moments.of(v[20:], t[20:], weights[20:])
    for name, value in vars(Moments.of(v, t, weights)).items():
        assert torch.allclose(getattr(added, name), value, atol=1e-5)


def test_a_cosine_is_taken_in_the_space_of_the_other_folds() -> None:
    v, t = (side.double() for side in paired_features(80, d=8, seed=1))
    weights = torch.rand(80, generator=torch.Generator().manual_seed(0)).double()
    decoys = draw_decoys(torch.arange(80) // 2, torch.arange(80), folds=4, count=2)
    found, of_decoys = canonical_cosines(v, t, weights, decoys)
    first, second = decoys.pairs()
    for number in range(4):
        others = decoys.fold != number
        space = canonical_space(Moments.of(v[others], t[others], weights[others]))
        cosine = space.images(v) @ space.texts(t).T
        assert torch.allclose(found[~others], cosine.diagonal()[~others])
        asked = ~others[first]
        assert torch.allclose(of_decoys[asked], cosine[first[asked], second[asked]])


def groups_of(wrong: float, n: int, seed: int, distance: float = 3.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which pairs are wrong, scores of pairs and of decoys: two normal densities."""
    generator = np.random.default_rng(seed)
    is_wrong = generator.random(n) < wrong
    return is_wrong, generator.normal(np.where(is_wrong, 0, distance)), generator.normal(size=3 * n)


@pytest.mark.parametrize("wrong", [0.0, 0.1, 0.4, 0.9, 1.0])
def test_the_share_of_wrong_pairs_has_the_error_that_it_says(wrong: float) -> None:
    n, number = 2000, np.arange(2000)
    off = []
    for seed in range(40):
        is_wrong, pairs, decoys = groups_of(wrong, n, seed, distance=5.0)
        found = wrong_share(pairs, decoys, number, np.tile(number, 3))
        assert 0 <= found.value <= 1
        off.append((found.value - is_wrong.mean()) / max(found.error, 1e-3))
    # With the share at its bounds half of the estimates are cut off.
    assert np.abs(np.mean(off)) < (0.5 if 0 < wrong < 1 else 1.0)
    assert np.std(off) < 1.3


def test_captions_of_one_image_are_one_observation() -> None:
    _, pairs, decoys = groups_of(0.4, 1000, seed=0)
    number = np.arange(1000)
    once = wrong_share(pairs, decoys, number, np.tile(number, 3))
    pairs, decoys, number, decoy_number = (np.repeat(each, 5) for each in (pairs, decoys, number, np.tile(number, 3)))
    five = wrong_share(pairs, decoys, number, decoy_number)
    assert five == pytest.approx(once, rel=1e-6)


def test_the_posterior_is_that_of_two_known_densities() -> None:
    _, pairs, decoys = groups_of(0.4, 40_000, seed=1)
    found = posterior(pairs, decoys, 0.4)
    exact = 1 - 0.4 * norm.pdf(pairs) / (0.4 * norm.pdf(pairs) + 0.6 * norm.pdf(pairs - 3))
    assert np.abs(found - exact).mean() < 0.01
    assert (np.diff(found[np.argsort(pairs)]) >= 0).all()


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=30),
    st.lists(st.integers(0, 5), min_size=1, max_size=30),
    st.floats(0, 1),
)
def test_posteriors_rise_with_the_score(pairs: list[int], decoys: list[int], wrong: float) -> None:
    found = posterior(np.array(pairs, float), np.array(decoys, float), wrong)
    assert ((found >= 0) & (found <= 1)).all()
    order = np.argsort(pairs, kind="stable")
    assert (np.diff(found[order]) >= 0).all()
    for number in set(pairs):
        assert len(set(found[np.array(pairs) == number])) == 1


def test_one_score_is_made_of_several_as_a_normal_discriminant_would() -> None:
    generator = np.random.default_rng(0)
    shift = np.array([1.0, 0.5])
    decoys = generator.normal(size=(50_000, 2)) * [1, 2]
    pairs = generator.normal(size=(50_000, 2)) * [1, 2] + shift
    scores, decoy_scores = discriminant_scores(pairs, decoys)
    # Fisher's direction: the shift over the variance.
    expected = pairs @ (shift / np.array([1, 4]))
    assert np.corrcoef(scores, expected)[0, 1] > 0.999
    assert auroc(np.r_[scores, decoy_scores], np.r_[np.zeros(50_000), np.ones(50_000)]) > 0.75


def test_a_second_witness_is_judged_by_the_first() -> None:
    generator = np.random.default_rng(0)
    is_wrong, pairs, decoys = groups_of(0.4, 40_000, seed=2)
    # Of the second no decoy is known: its wrong pairs lie where a model that learned them by heart puts them.
    second = generator.normal(np.where(is_wrong, 1.0, 3.0))
    by_first = posterior(pairs, decoys, 0.4)
    by_second = posterior_by_reference(by_first, second)
    exact = expit(np.log(0.6 / 0.4) + norm.logpdf(second, 3) - norm.logpdf(second, 1))
    assert np.abs(by_second - exact).mean() < 0.03
    both = combined_posterior(by_first, by_second, 0.4)
    exact_both = expit(np.log(0.6 / 0.4) + norm.logpdf(second, 3) - norm.logpdf(second, 1) + norm.logpdf(pairs, 3)
                       - norm.logpdf(pairs, 0))  # fmt: skip
    assert np.abs(both - exact_both).mean() < 0.02
    assert auroc(both, is_wrong) > max(auroc(by_first, is_wrong), auroc(by_second, is_wrong)) + 0.003


@pytest.mark.parametrize("first", [np.ones(50), np.zeros(50), np.full(50, 0.3)])
def test_a_first_witness_that_knows_nothing_teaches_nothing(first: np.ndarray) -> None:
    found = posterior_by_reference(first, np.arange(50.0))
    assert found == pytest.approx(first)


def two_towers(n: int, wrong: float, seed: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Features of towers that do not know each other: two rotations of noisy copies, and which pairs are wrong."""
    generator = torch.Generator().manual_seed(seed)
    v, t = paired_features(n, d=48, seed=seed)
    rotation, _ = torch.linalg.qr(torch.randn(48, 48, generator=generator))
    count = int(wrong * n)
    t = t @ rotation
    t[:count] = t[:count].roll(1, 0)
    return v, t, np.arange(n) < count


@pytest.mark.parametrize("wrong", [0.0, 0.2, 0.4, 0.6])
def test_towers_that_do_not_know_each_other_tell_wrong_pairs(wrong: float) -> None:
    v, t, is_wrong = two_towers(2000, wrong, seed=0)
    number = torch.arange(2000)
    found = judge_by_towers(v, t, number, number)
    assert found.wrong.error < 0.04
    assert found.wrong.value == pytest.approx(wrong, abs=3 * found.wrong.error + 0.01)
    assert found.probability.mean() == pytest.approx(1 - wrong, abs=3 * found.wrong.error + 0.01)
    if wrong:
        assert auroc(found.score, is_wrong) > 0.95


def test_a_model_that_knows_makes_it_better() -> None:
    v, t, is_wrong = two_towers(2000, 0.4, seed=1)
    number = torch.arange(2000)
    towers = judge_by_towers(v, t, number, number)
    score = np.random.default_rng(0).normal(np.where(is_wrong, 0.0, 2.0))
    probability, order = combine_with_model(towers, score)
    ranked = np.lexsort((order, probability)).argsort()
    assert auroc(ranked, is_wrong) > max(auroc(towers.score, is_wrong), auroc(score, is_wrong))


def test_features_that_do_not_vary_are_no_error() -> None:
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(1, 64, generator=generator).expand(300, 64)
    t = torch.randn(300, 32, generator=generator)
    number = torch.arange(300)
    for images, texts in ((v, t), (t, v), (v, v), (v + 1e-7 * torch.randn(300, 64, generator=generator), t)):
        found = judge_by_towers(images, texts, number, number)
        assert np.isfinite(found.score).all()
        assert np.isfinite(found.probability).all()


@pytest.mark.parametrize("images", [[0], [0, 0, 0], [0, 1], [0, 1, 2, 3, 4], [0, 0, 1, 1, 2]])
def test_of_a_few_pairs_something_finite_is_said(images: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    v, t = torch.randn(2, 5, 8, generator=generator)
    image = torch.tensor(images)
    found = judge_by_towers(v[image], t[: len(images)], image, torch.arange(len(images)))
    assert np.isfinite(found.score).all()
    assert ((found.probability >= 0) & (found.probability <= 1)).all()
    probability, order = combine_with_model(found, np.zeros(len(images)))
    assert np.isfinite(probability).all()
    assert np.isfinite(order).all()
