"""`CalibratedRetriever` against dense float64 references and POT, and by what calibration is for."""

from __future__ import annotations

import doctest
import functools
from pathlib import Path
from typing import Any

import numpy as np
import ot
import pytest
import torch
import torch.nn.functional as F
from conftest import paired_features
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logsumexp
from torch import Tensor
from torch.overrides import TorchFunctionMode

from openclip_otco import CalibratedRetriever, PlanCache, PlanSolver, TransportPlan
from openclip_otco.evaluate import retriever as calibrate

D = 24
WAYS = {"image_to_text": (0, 1), "text_to_image": (1, 0)}


@functools.cache
def retriever_of(*seeds: int, epsilon: float = 0.1) -> CalibratedRetriever:
    return CalibratedRetriever(
        [PlanSolver(epsilon=epsilon).solve(*paired_features(64 + seed, D, seed)) for seed in seeds or (1,)]
    )


def sides(n: int, m: int, way: str, seed: int = 7) -> tuple[Tensor, Tensor]:
    """`n` queries and `m` candidates."""
    features = paired_features(max(n, m), D, seed)
    query, candidate = WAYS[way]
    return features[query][:n], features[candidate][:m]


def double(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.double().numpy() for tensor in tensors]


def dense_scores(retriever: CalibratedRetriever, queries: Tensor, gallery: Tensor, way: str) -> np.ndarray:
    """The whole matrix in float64, by the definition of the c-transform (method, section 3)."""
    q, x = double(queries, gallery)
    potentials = []
    for plan in retriever.plans:
        support, dual = (plan.image_features, plan.f) if way == "image_to_text" else (plan.text_features, plan.g)
        y, p = double(support, dual)
        cost = 1 - x @ y.T
        potentials.append(-plan.epsilon * (logsumexp((p - cost) / plan.epsilon, axis=1) - np.log(len(plan))))
    return q @ x.T + np.mean(potentials, axis=0)


def assert_best(hits: calibrate.Hits, scores: np.ndarray, k: int, tolerance: float = 2e-5) -> None:
    """That `hits` are the `k` best of the matrix `scores`, best first, whichever comes first of what is equal."""
    indices, found = np.asarray(hits.indices), np.asarray(hits.scores)
    assert indices.shape == found.shape == (len(scores), k)
    assert all(len(set(row)) == k for row in indices.tolist())
    np.testing.assert_allclose(found, np.take_along_axis(scores, indices, axis=1), atol=tolerance)
    np.testing.assert_allclose(found, -np.sort(-scores, axis=1)[:, :k], atol=tolerance)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seeds", [(1,), (1, 2, 3)])
def test_search_is_that_of_the_whole_matrix_in_float64(way: str, seeds: tuple[int, ...]) -> None:
    retriever = retriever_of(*seeds)
    queries, gallery = sides(20, 150, way)
    assert_best(retriever.search(queries, gallery, 10, way), dense_scores(retriever, queries, gallery, way), 10)


def test_potentials_are_those_of_pot() -> None:
    images, texts = paired_features(80, D, seed=5)
    new = paired_features(30, D, seed=6)[1]
    _, log = ot.sinkhorn(
        *double(torch.full((80,), 1 / 80), torch.full((80,), 1 / 80), 1 - images @ texts.T),
        reg=0.1, method="sinkhorn_log", stopThr=1e-10, log=True,
    )  # fmt: skip
    v, t = double(images, new)
    # POT's plan is exp(log_u + log_v - C/ε): its log_u holds the mass 1/N.
    expected = -0.1 * logsumexp(log["log_u"] - (1 - t @ v.T) / 0.1, axis=1)
    found = CalibratedRetriever.from_features(images, texts, epsilon=0.1).potentials(new).double().numpy()
    np.testing.assert_allclose(found - found.mean(), expected - expected.mean(), atol=2e-4)


def test_without_duals_it_is_the_inverted_softmax() -> None:
    bank, texts = paired_features(64, D, seed=3)
    plan = TransportPlan(bank, texts, torch.zeros(64), torch.zeros(64), epsilon=0.1)
    queries, gallery = sides(15, 40, "image_to_text")
    q, x, b = double(queries, gallery, bank)
    # Smith et al.: over queries for each candidate, here over the bank and the query that asks.
    inverted = np.exp(q @ x.T / 0.1) / np.exp(b @ x.T / 0.1).sum(axis=0)
    hits = CalibratedRetriever(plan).search(queries, gallery, 40)
    assert_best(hits, 0.1 * np.log(inverted) + 0.1 * np.log(64) + 1, 40)


@given(
    n=st.integers(1, 12), m=st.integers(1, 60), gallery_tile=st.integers(1, 70), tile=st.integers(1, 400),
    way=st.sampled_from(sorted(WAYS)), data=st.data(),
)  # fmt: skip
def test_tiles_change_nothing(n: int, m: int, gallery_tile: int, tile: int, way: str, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, m))
    retriever = retriever_of()
    queries, gallery = sides(n, m, way)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "_GALLERY_TILE", gallery_tile)
        patch.setattr(calibrate, "_TILE", tile)
        hits = retriever.search(queries, gallery, k, way)
    assert_best(hits, dense_scores(retriever, queries, gallery, way), k)


def test_no_tile_is_larger_than_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    class Largest(TorchFunctionMode):
        elements = 0

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            for each in result if isinstance(result, tuple) else (result,):
                if isinstance(each, Tensor) and each.data_ptr() not in inputs:
                    self.elements = max(self.elements, each.numel())
            return result

    retriever = retriever_of()
    monkeypatch.setattr(calibrate, "_GALLERY_TILE", 100)
    monkeypatch.setattr(calibrate, "_TILE", 5000)
    queries, gallery = sides(500, 3000, "image_to_text")
    inputs = {queries.data_ptr(), gallery.data_ptr()}
    with Largest() as largest:
        retriever.search(queries, gallery, 3)
    # 3,000 potentials; a tile of the gallery, 100 x 24, or of the cost, 2 x 100 x 65; of scores, 48 x 100.
    assert 3000 <= largest.elements <= 2 * 100 * 65


@pytest.mark.parametrize("way", WAYS)
def test_kinds_and_types_agree(way: str, tmp_path: Path) -> None:
    retriever = retriever_of()
    queries, gallery = sides(9, 120, way)
    expected = retriever.search(queries, gallery, 5, way)
    assert isinstance(expected.indices, Tensor)
    assert (expected.indices.dtype, expected.scores.dtype) == (torch.int64, torch.float32)

    found = retriever.search(queries.numpy(), gallery.numpy(), 5, way)
    assert isinstance(found.indices, np.ndarray)
    assert (found.indices.dtype, found.scores.dtype) == (np.int64, np.float32)
    assert np.array_equal(found.indices, expected.indices)
    assert np.array_equal(found.scores, expected.scores)

    np.save(tmp_path / "gallery.npy", np.asfortranarray(gallery.numpy()))
    mapped = np.load(tmp_path / "gallery.npy", mmap_mode="r")
    assert np.array_equal(retriever.search(queries.numpy()[::-1], mapped, 5, way).indices, found.indices[::-1])

    wide = retriever.search(queries.double(), gallery.double(), 5, way)
    assert wide.scores.dtype == torch.float64
    for dtype in (torch.float16, torch.bfloat16):
        half = queries.to(dtype), gallery.to(dtype)
        hits = retriever.search(*half, 5, way)
        assert hits.scores.dtype == torch.float32
        assert_best(hits, dense_scores(retriever, *half, way), 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(retriever.search(queries, gallery, 5, way).indices, expected.indices)


def test_features_of_training_may_be_numpy_or_half() -> None:
    images, texts = paired_features(64, D, seed=1)
    queries, gallery = sides(9, 50, "image_to_text")
    expected = retriever_of(epsilon=0.1).potentials(gallery)
    images, texts = paired_features(65, D, seed=1)
    for features in ((images, texts), (images.numpy(), texts.numpy()), (images.double(), texts.double())):
        made = CalibratedRetriever.from_features(*features, epsilon=0.1)
        assert torch.allclose(made.potentials(gallery), expected, atol=1e-6)
    half = CalibratedRetriever.from_features(images.half(), texts.half(), epsilon=0.1)
    assert torch.allclose(half.potentials(gallery), expected, atol=2e-3)
    assert not queries.requires_grad
    assert not half.potentials(gallery.requires_grad_()).requires_grad


def test_more_pairs_than_the_support_takes_are_sampled_by_the_seed() -> None:
    features = paired_features(100, D)
    first, again, other = (CalibratedRetriever.from_features(*features, max_support=30, seed=s) for s in (0, 0, 1))
    (plan,) = first.plans
    assert len(plan) == 30
    rows = (plan.image_features[:, None] == features[0]).all(dim=2).nonzero()[:, 1]
    assert torch.equal(plan.text_features, features[1][rows])  # still pairs
    assert torch.equal(plan.f, again.plans[0].f)
    assert not torch.equal(plan.image_features, other.plans[0].image_features)


@given(st.floats(-10, 10))
def test_a_constant_changes_no_ranking(shift: float) -> None:
    retriever = retriever_of()
    queries, gallery = sides(9, 50, "image_to_text")
    potentials = retriever.potentials(gallery.double())
    plain = retriever.search(queries.double(), gallery.double(), 50)
    given_ = retriever.search(queries.double(), gallery.double(), 50, potentials=potentials)
    moved = retriever.search(queries.double(), gallery.double(), 50, potentials=potentials.double() + shift)
    assert torch.equal(plain.indices, given_.indices)
    assert torch.allclose(moved.scores, plain.scores + shift, atol=1e-12)
    assert torch.equal(moved.indices, plain.indices)


@pytest.mark.parametrize("way", WAYS)
def test_a_hub_goes_down(way: str) -> None:
    generator = torch.Generator().manual_seed(0)
    middle = F.normalize(torch.randn(1, D, generator=generator))
    signal = F.normalize(torch.randn(600, D, generator=generator))
    queries, candidates = (
        F.normalize(signal + 2 * middle),
        signal,
    )  # about one point all queries, none of the candidates
    pairs = (queries[:400], candidates[:400])
    retriever = CalibratedRetriever.from_features(*(pairs if way == "image_to_text" else pairs[::-1]))
    gallery = torch.cat([candidates[400:], middle])
    hub, own = 200, torch.arange(200)
    plain = (queries[400:] @ gallery.T).argmax(dim=1)
    assert (plain == hub).all()
    calibrated = retriever.search(queries[400:], gallery, 1, way).indices[:, 0]
    assert not (calibrated == hub).any()
    assert (calibrated == own).float().mean() > 0.95


def test_plans_of_a_checkpoint(tmp_path: Path) -> None:
    cache = PlanCache(size=3)
    for step in range(3):
        cache.add(PlanSolver(epsilon=0.07).solve(*paired_features(40, D, seed=step), step=step))
    path = tmp_path / "epoch_1.pt"
    torch.save({"state_dict": {}, "plugins": {"otco": {"cache": cache.state_dict()}}}, path)
    gallery = paired_features(20, D, seed=9)[1]
    found = CalibratedRetriever.from_checkpoint(path, epsilon=None)
    assert [plan.step for plan in found.plans] == [0, 1, 2]
    expected = torch.stack([cache[step].text_potential(gallery) for step in range(3)]).mean(dim=0)
    assert torch.allclose(found.potentials(gallery), expected, atol=1e-7)

    assert {plan.epsilon for plan in CalibratedRetriever.from_checkpoint(path).plans} == {0.1}
    anew = CalibratedRetriever.from_checkpoint(str(path), epsilon=0.3)
    assert {plan.epsilon for plan in anew.plans} == {0.3}
    by_hand = CalibratedRetriever.from_features(*paired_features(40, D, seed=2), epsilon=0.3)
    assert torch.equal(anew.plans[2].f, by_hand.plans[0].f)


@pytest.mark.parametrize("epsilon", [None, 0.03, 0.1])
def test_a_checkpoint_of_softmax_is_refused(tmp_path: Path, epsilon: float | None) -> None:
    plan = PlanSolver(epsilon=0.03, coupling="softmax").solve(*paired_features(40, D))
    path = tmp_path / "epoch_1.pt"
    torch.save({"state_dict": {}, "plugins": {"otco": {"cache": {"plans": [plan.state_dict()]}}}}, path)
    with pytest.raises(ValueError, match="`softmax`"):
        CalibratedRetriever.from_checkpoint(path, epsilon=epsilon)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ({"state_dict": {}}, "holds no cached plans"),
        ({"state_dict": {}, "plugins": {"otco": {"cache": {"plans": []}}}}, "holds no cached plans"),
        ({"state_dict": {}, "plugins": {"otco": {"cache": {"plans": [{"f": 1}]}}}}, "cached plans cannot be used"),
    ],
)
def test_a_checkpoint_without_plans_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "epoch_1.pt"
    if content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        CalibratedRetriever.from_checkpoint(path)


def test_plans_that_cannot_calibrate_are_refused() -> None:
    features = paired_features(32, D)
    with pytest.raises(ValueError, match="needs a plan"):
        CalibratedRetriever([])
    with pytest.raises(ValueError, match="`softmax`"):
        CalibratedRetriever(PlanSolver(coupling="softmax").solve(*features))
    with pytest.raises(ValueError, match="one width"):
        CalibratedRetriever([PlanSolver().solve(*paired_features(32, d)) for d in (8, 9)])


X = np.eye(D, dtype=np.float32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": 0}, ValueError, "k must lie in 1 to 24, the size of the gallery; got 0"),
        ({"k": 25}, ValueError, "k must lie in 1 to 24, the size of the gallery; got 25"),
        ({"way": "image"}, ValueError, "way must be one of image_to_text, text_to_image; got 'image'"),
        ({"queries": X[:, :5]}, ValueError, r"queries must be 24 wide, .* got \(24, 5\)"),
        ({"gallery": X[:0]}, ValueError, r"gallery must be a non-empty \(n, d\) matrix"),
        ({"queries": X[0]}, ValueError, r"queries must be a non-empty \(n, d\) matrix; got \(24,\)"),
        ({"queries": X.tolist()}, TypeError, "queries must be a numpy array or a torch tensor; got list"),
        ({"queries": torch.from_numpy(X)}, TypeError, "must be of one kind; got Tensor and ndarray"),
        ({"queries": X.astype(int)}, TypeError, "queries must be floating; got int64"),
        ({"gallery": 2 * X}, ValueError, "gallery must be finite and of unit norm; got norms of 2 to 2"),
        ({"queries": X * np.float32(np.nan)}, ValueError, "queries must be finite and of unit norm"),
        ({"potentials": np.zeros(3)}, ValueError, r"potentials must be \(24,\)"),
    ],
)
def test_impossible_searches_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        retriever_of().search(**{"queries": X, "gallery": X, "k": 3, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"text_features": X[:3]}, ValueError, "must be pairs"),
        ({"image_features": X.tolist()}, TypeError, "image_features must be a numpy array"),
        ({"text_features": 3 * X}, ValueError, "text_features must be finite and of unit norm"),
        ({"epsilon": 0.0}, ValueError, "epsilon must be positive"),
        ({"max_support": 0}, ValueError, "max_support must be at least 1"),
    ],
)
def test_features_that_do_not_couple_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CalibratedRetriever.from_features(**{"image_features": X, "text_features": X, **change})


def test_the_example_runs() -> None:
    failed, attempted = doctest.testmod(calibrate)
    assert attempted > 5
    assert failed == 0
