"""OTCOLoss against ClipLoss, and against its formula written out in float64."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import paired_features
from forks import start_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.loss import ClipLoss
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor

from openclip_otco import OTCOLoss, PlanSolver, TransportPlan
from openclip_otco.method.features import Features
from openclip_otco.method.loss import TRUSTS
from openclip_otco.method.posterior import matched_share
from openclip_otco.method.solver import COUPLINGS
from openclip_otco.method.weights import log_negative_weights, tempered
from openclip_otco.ot import sinkhorn_divergence

SCALE = torch.tensor(14.2857)


@pytest.fixture(scope="module")
def plan() -> TransportPlan:
    return PlanSolver(0.1).solve(*paired_features(128, seed=1))


def gradients(loss, images: Tensor, texts: Tensor) -> tuple[Tensor, ...]:
    v, t, scale = (x.clone().requires_grad_() for x in (images, texts, SCALE))
    losses = loss(v, t, scale, output_dict=True)
    total = sum(losses.values())
    total.backward()
    return total.detach(), v.grad, t.grad, scale.grad


def info_nce(x: Tensor, y: Tensor, scale: float, weights: Tensor) -> Tensor:
    logits = scale * x.double() @ y.double().T
    per_pair = -(logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()) / 2
    return (weights.double() * per_pair).mean()


def pair_weights(loss: OTCOLoss, images: Tensor, texts: Tensor) -> Tensor:
    """`c_i` of the pairs of a batch."""
    return loss._weights(loss._ask(Features(images, texts)))


def reference_weights(confidence: Tensor, gamma: float, least_share: float) -> Tensor:
    """`c ∝ confidence^γ'`, mean 1, the power lowered by bisection until that share of the batch carries the loss."""

    def weights(power: float) -> Tensor:
        raised = confidence.double() ** power
        return raised / raised.mean()

    def excess(power: float) -> float:
        return float(1 / weights(power).square().mean()) - least_share

    return weights(gamma if excess(gamma) >= 0 else brentq(excess, 0, gamma))


@pytest.mark.parametrize("cache_labels", [False, True])
@pytest.mark.parametrize("with_plans", [False, True])
def test_everything_off_is_clip_loss_to_the_bit(plan, cache_labels, with_plans):
    loss = OTCOLoss(confidence=0, negatives="none", cache_labels=cache_labels)
    if with_plans:
        loss.exchange.set_plans([plan], plan)
    images, texts = paired_features(32, seed=2)
    for ours, clip in zip(
        gradients(loss, images, texts), gradients(ClipLoss(cache_labels=cache_labels), images, texts), strict=True
    ):
        assert torch.equal(ours, clip)
    assert torch.equal(loss(images, texts, SCALE), ClipLoss()(images, texts, SCALE))


def test_no_plan_yet_is_clip_loss_to_the_bit():
    images, texts = paired_features(32, seed=2)
    loss = OTCOLoss(confidence=2.0, transport_weight=1.0)
    losses = loss(images, texts, SCALE, output_dict=True)
    assert list(losses) == ["contrastive_loss"]
    assert torch.equal(losses["contrastive_loss"], ClipLoss()(images, texts, SCALE))


def test_logit_bias_acts_as_in_clip_loss():
    images, texts = paired_features(32, seed=2)
    bias = torch.tensor(-3.0)
    assert torch.equal(OTCOLoss()(images, texts, SCALE, bias), ClipLoss()(images, texts, SCALE, bias))


@pytest.mark.parametrize(
    ("gamma", "least_share", "transport", "count"),
    [(0.1, 0.0, 0.0, 1), (2.0, 0.0, 0.5, 2), (0.0, 0.0, 0.7, 1), (0.1, 0.5, 0.0, 1), (2.0, 0.5, 0.5, 2)],
)
def test_the_loss_is_its_formula(plan, gamma, least_share, transport, count):
    other = PlanSolver(0.1).solve(*paired_features(96, seed=3), step=8)
    drawn = [plan, other][:count]
    images, texts = paired_features(32, seed=2)
    texts = torch.cat([texts[:20], texts[20:].roll(1, 0)])
    loss = OTCOLoss(
        confidence=gamma, trust="share", transport_weight=transport, least_share=least_share, negatives="none"
    )
    loss.exchange.set_plans(drawn, newest=other)
    losses = loss(images, texts, SCALE, output_dict=True)

    weights = reference_weights(other.confidence(images, texts), gamma, least_share)
    scale = float(SCALE)
    expected = info_nce(images, texts, scale, weights)
    # Where the power is lowered, the loss takes the next one of a grid.
    tolerance = {"rtol": 5e-2 if gamma > 1 and least_share else 1e-4, "atol": 1e-6}
    torch.testing.assert_close(losses["contrastive_loss"].double(), expected, **tolerance)
    if transport:
        terms = [
            info_nce(p.transport_image(images, texts), texts, scale, weights)
            + info_nce(images, p.transport_text(texts, images), scale, weights)
            for p in drawn
        ]
        expected = transport / count * sum(terms)
        torch.testing.assert_close(losses["transport_loss"].double(), expected, **tolerance)
    else:
        assert list(losses) == ["contrastive_loss"]
    assert torch.equal(loss(images, texts, SCALE), sum(losses.values()))


def test_without_own_pairs_the_support_is_other_samples_alone(plan):
    images, texts = paired_features(32, seed=2)
    loss = OTCOLoss(confidence=0, negatives="none", transport_weight=0.7, own_pair=False)
    loss.exchange.set_plans([plan], plan)
    losses = loss(images, texts, SCALE, output_dict=True)
    ones = torch.ones(32)
    expected = 0.7 * (
        info_nce(plan.transport_image(images), texts, float(SCALE), ones)
        + info_nce(images, plan.transport_text(texts), float(SCALE), ones)
    )
    torch.testing.assert_close(losses["transport_loss"].double(), expected, rtol=1e-4, atol=1e-6)
    loss.own_pair = True
    assert float(loss(images, texts, SCALE, output_dict=True)["transport_loss"]) < float(losses["transport_loss"])


def test_weights_have_mean_one_and_no_gradient(plan):
    images, texts = paired_features(32, seed=2)
    loss = OTCOLoss(confidence=1.5)
    loss.exchange.set_plans([plan], plan)
    weights = pair_weights(loss, images.requires_grad_(), texts.requires_grad_())
    assert weights.mean() == pytest.approx(1, rel=1e-5)
    assert not weights.requires_grad
    assert 0 < float(loss.exchange.effective_share) <= 1


@settings(deadline=None, max_examples=100)
@given(
    logs=st.lists(st.floats(-50, 0, width=32), min_size=1, max_size=40),
    power=st.floats(0, 8),
    least=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
)
def test_tempering_keeps_the_share_and_no_more(logs, power, least):
    log_confidence = torch.tensor(logs)
    weights, share = tempered(log_confidence, power, least)
    assert float(share) >= least
    assert float(weights.mean()) == pytest.approx(1, rel=1e-4)
    assert float(share) == pytest.approx(float(1 / weights.square().mean()), rel=1e-5)
    full = torch.softmax(power * log_confidence.double(), dim=0) * len(logs)
    if 1 / full.square().mean() >= least + 1e-4:
        torch.testing.assert_close(weights.double(), full, rtol=1e-3, atol=1e-5)


def test_one_pair_far_ahead_does_not_take_all():
    log_confidence = torch.full((100,), -30.0)
    log_confidence[7] = 0.0
    weights, share = tempered(log_confidence, 1.0, 0.5)
    assert float(share) >= 0.5
    assert weights.argmax() == 7
    assert float(weights[7]) < 20


def test_posterior_weights_are_their_formula(plan):
    images, texts = paired_features(64, seed=2)
    texts = torch.cat([texts[:40], texts[40:].roll(7, 0)])
    loss = OTCOLoss(confidence=1.0, trust="posterior", least_share=0)
    loss.exchange.set_plans([plan], plan)
    weights = pair_weights(loss, images, texts)
    ratio = plan.log_mass(images, texts).double().exp()
    share = minimize_scalar(lambda p: -float((p * ratio + 1 - p).log().mean()), bounds=(0, 1), method="bounded").x
    posterior = share * ratio / (share * ratio + 1 - share)
    torch.testing.assert_close(weights.double(), posterior / posterior.mean(), rtol=1e-3, atol=1e-4)
    assert float(loss.exchange.matched_share) == pytest.approx(share, abs=1e-3)


def test_clean_pairs_of_a_sharp_plan_weigh_one():
    sharp = PlanSolver(0.03).solve(*paired_features(256, seed=1))
    images, texts = paired_features(64, seed=2)
    loss = OTCOLoss(confidence=1.0, trust="posterior", least_share=0)
    loss.exchange.set_plans([sharp], sharp)
    assert pair_weights(loss, images, texts) == pytest.approx(torch.ones(64), abs=0.05)
    assert float(loss.exchange.matched_share) > 0.95


def test_a_plan_that_finds_next_to_no_matched_pairs_is_not_believed():
    plan = PlanSolver(0.03).solve(*paired_features(256, seed=1))
    images, texts = paired_features(64, seed=2)
    texts = torch.cat([texts[:6], texts[6:].roll(7, 0)])  # six pairs of 64 are matched
    loss = OTCOLoss(confidence=2.0, least_share=0.25)
    loss.exchange.set_plans([plan], plan)
    assert torch.equal(pair_weights(loss, images, texts), torch.ones(64))
    assert float(loss.exchange.matched_share) < 0.25
    assert float(loss.exchange.effective_share) == 1
    loss.least_share = 0.05
    weights = pair_weights(loss, images, texts)
    assert weights[:6].mean() > 3 * weights[6:].mean()


def test_an_unknown_trust_is_refused():
    with pytest.raises(ValueError, match="trust must be one of posterior, share; got 'blind'"):
        OTCOLoss(trust="blind")


@pytest.mark.parametrize(("trust", "epsilon"), [("share", 0.1), ("posterior", 0.03)])
def test_wrong_captions_hardly_pull(trust, epsilon):
    plan = PlanSolver(epsilon).solve(*paired_features(128, seed=1))
    images, texts = paired_features(64, seed=2)
    wrong = torch.arange(64) >= 40
    texts = torch.where(wrong[:, None], texts.roll(7, 0), texts)
    loss = OTCOLoss(confidence=1.0, trust=trust, least_share=0)
    loss.exchange.set_plans([plan], plan)
    weights = pair_weights(loss, images, texts)
    assert weights[~wrong].mean() > 5 * weights[wrong].mean()


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_weighted_negatives_are_their_formula(coupling):
    """Against the density written out in float64, from the plan's support and potentials alone."""
    plan = PlanSolver(0.1, coupling=coupling).solve(*paired_features(128, seed=1))
    images, texts = paired_features(32, seed=2)
    texts = torch.cat([texts[:24], texts[24:].roll(3, 0)])  # some pairs are wrong
    v, t, support_v, support_t, f, g = (
        x.double() for x in (images, texts, plan.image_features, plan.text_features, plan.f, plan.g)
    )
    own_f = -0.1 * (torch.logsumexp((g - 1 + v @ support_t.T) / 0.1, 1) - math.log(128))
    own_g = -0.1 * (torch.logsumexp((f - 1 + t @ support_v.T) / 0.1, 1) - math.log(128))
    similarity = (v @ t.T / 0.1).exp()
    density = {"plan": ((own_f[:, None] + own_g - 1 + v @ t.T) / 0.1).exp(), "similarity": similarity}
    own_density = density["plan"].diagonal()
    if coupling == "softmax":
        # Two softmaxes: the pair's density is the geometric mean of both, and potentials of zero weigh by similarity.
        own_density = (((own_f + own_g) / 2 - 1 + (v * t).sum(1)) / 0.1).exp()
        density["plan"] = similarity
    # A row of images has the texts' prices, a column of texts the images', each as far as its pair is trusted. Without
    # a coupling these are the c-transforms of zero.
    share = matched_share(own_density.log())
    trusted = share * own_density / (share * own_density + 1 - share)
    assert trusted.min() < 0.7 < 0.9 < trusted.max()
    text_price, image_price = (0.7 * trusted * (x.mean() - x) for x in (own_g, own_f))
    price = (((v @ t.T + text_price) / 0.1).exp(), ((v @ t.T + image_price[:, None]) / 0.1).exp())
    assert not torch.allclose(price[0], similarity, rtol=0.1)
    ways = {name: (r, r) for name, r in density.items()} | {"price": price}
    for negatives, (by_row, by_column) in ways.items():
        rows, columns = ((r**2.0).fill_diagonal_(0) for r in (by_row, by_column))
        rows, columns = rows / rows.sum(1, keepdim=True) * 31, columns / columns.sum(0) * 31
        e = (float(SCALE) * v @ t.T).exp()
        own = e.diagonal()
        expected = -((own / (own + (rows * e).sum(1))).log() + (own / (own + (columns * e).sum(0))).log()).mean() / 2
        loss = OTCOLoss(confidence=0, negatives=negatives, negative_power=2.0, negative_price=0.7)
        loss.exchange.set_plans([plan], plan)
        terms = loss(images, texts, SCALE, output_dict=True)
        assert loss.exchange.plans_acted
        assert list(terms) == ["contrastive_loss"]
        torch.testing.assert_close(terms["contrastive_loss"].double(), expected, rtol=1e-5, atol=0)
        assert float(terms["contrastive_loss"]) > float(ClipLoss()(images, texts, SCALE))


def test_weighted_negatives_stand_beside_trust_and_bias(plan):
    images, texts = paired_features(32, seed=2)
    bias = torch.tensor(-3.0)
    # Shares of the plan differ from pair to pair. Posteriors may all be 1 here, by the last digit of an estimate.
    loss = OTCOLoss(confidence=1.0, negatives="plan", negative_power=1.0, trust="share")
    loss.exchange.set_plans([plan], plan)
    both = loss(images, texts, SCALE, bias)
    # A bias that all logits have changes no softmax.
    torch.testing.assert_close(both, loss(images, texts, SCALE), rtol=1e-5, atol=0)
    loss.confidence = 0.0
    assert not torch.equal(both, loss(images, texts, SCALE, bias))
    loss.negative_power = 0.0
    assert torch.equal(loss(images, texts, SCALE, bias), ClipLoss()(images, texts, SCALE, bias))
    assert not loss.exchange.plans_acted


@settings(deadline=None, max_examples=100)
@given(
    n=st.integers(2, 12), columns=st.integers(0, 8), power=st.floats(0, 50), shift=st.floats(-2, 2),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_log_weights_of_negatives(n, columns, power, shift, seed):
    generator = torch.Generator().manual_seed(seed)
    similarity = 2 * torch.rand(n, n + columns, generator=generator) - 1
    potential = torch.randn(n + columns, generator=generator) / 10
    own = torch.randperm(n + columns, generator=generator)[:n]
    weights = log_negative_weights(similarity, own, power, potential)
    others = torch.ones_like(weights, dtype=torch.bool).scatter(1, own[:, None], False)
    assert torch.equal(weights[~others], torch.zeros(n))
    assert (weights.exp() * others).sum(1) / (n + columns - 1) == pytest.approx(torch.ones(n), rel=1e-4)
    # What all columns have in common says nothing, and what a column has more makes it weigh more.
    moved = log_negative_weights(similarity, own, power, potential + shift)
    torch.testing.assert_close(moved, weights, rtol=1e-3, atol=1e-3)
    hardness = (similarity + potential).masked_fill(~others, -torch.inf)
    assert torch.equal(weights.masked_fill(~others, -torch.inf).argmax(1), hardness.argmax(1)) or power < 1e-3


def test_the_plan_is_asked_for_what_is_used_alone(plan, monkeypatch):
    images, texts = paired_features(16, seed=2)
    loss = OTCOLoss(confidence=0, negatives="similarity")
    loss.exchange.set_plans([plan], plan)
    expected = loss(images, texts, SCALE)
    assert not torch.equal(expected, ClipLoss()(images, texts, SCALE))
    monkeypatch.delattr(TransportPlan, "potentials")
    assert torch.equal(loss(images, texts, SCALE), expected)
    loss.negatives = "plan"
    with pytest.raises(AttributeError, match="potentials"):
        loss(images, texts, SCALE)


def test_a_pair_alone_has_no_negatives_to_weigh(plan):
    images, texts = paired_features(1)
    loss = OTCOLoss(negatives="plan")
    loss.exchange.set_plans([plan], plan)
    assert float(loss(images, texts, SCALE)) == 0


def test_unknown_negatives_are_refused():
    with pytest.raises(ValueError, match="negatives must be one of price, plan, similarity, none; got 'all'"):
        OTCOLoss(negatives="all")


def test_divergence_is_added_with_its_weight():
    images, texts = paired_features(32, seed=2)
    loss = OTCOLoss(confidence=0, divergence_weight=0.5)
    total, v_grad, *_ = gradients(loss, images, texts)
    clip_total, clip_grad, *_ = gradients(ClipLoss(), images, texts)
    assert total > clip_total
    assert not torch.equal(v_grad, clip_grad)
    losses = loss(images, texts, SCALE, output_dict=True)
    assert set(losses) == {"contrastive_loss", "divergence_loss"}
    expected = 0.5 * sinkhorn_divergence(images, texts, loss.epsilon)
    torch.testing.assert_close(losses["divergence_loss"], expected, rtol=1e-6, atol=0)


def test_a_nan_in_the_batch_is_left_to_the_training_loop(plan):
    images, texts = paired_features(32, seed=2)
    images[3] = float("nan")
    loss = OTCOLoss(confidence=1.0, transport_weight=0.5, divergence_weight=0.1, least_share=0.5)
    loss.exchange.set_plans([plan], plan)
    assert torch.isnan(loss(images, texts, SCALE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_features_train(plan, dtype):
    images, texts = (x.to(dtype).requires_grad_() for x in paired_features(32, seed=2))
    loss = OTCOLoss(confidence=1.0, transport_weight=0.5, divergence_weight=0.1, negatives="plan")
    loss.exchange.set_plans([plan], plan)
    with torch.autocast("cpu", dtype=dtype):
        total = loss(images, texts, SCALE)
    total.backward()
    assert torch.isfinite(images.grad).all()
    assert images.grad.abs().max() > 0


def test_plans_of_another_width_are_refused(plan):
    loss = OTCOLoss(confidence=1.0)
    loss.exchange.set_plans((), plan)
    with pytest.raises(ValueError, match="step 0 couples features of width 24, the model makes features of width 12"):
        loss(*paired_features(8, d=12), SCALE)


@pytest.mark.parametrize(
    "name", ["least_share", "confidence", "transport_weight", "divergence_weight", "negative_power"]
)
def test_negative_weights_are_refused(name):
    with pytest.raises(ValueError, match=name):
        OTCOLoss(**{name: -0.1})


def _rank(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", world_size=world, rank=rank)
    everyone = paired_features(64, seed=2)
    images, texts = (x.chunk(world)[rank] for x in everyone)
    plan = PlanSolver(0.1).solve(*paired_features(128, seed=1))
    out = {}
    for local_loss, gather_with_grad in itertools.product([False, True], repeat=2):
        settings = {"local_loss": local_loss, "gather_with_grad": gather_with_grad, "rank": rank, "world_size": world}
        losses = {"clip": ClipLoss(**settings), "without": OTCOLoss(confidence=1.0, **settings)}
        for trust in ("share", "posterior"):
            more = {"transport_weight": 0.5, "trust": trust, "negatives": "none"}
            losses[trust] = OTCOLoss(confidence=1.0, **more, **settings)
            losses[trust].exchange.set_plans([plan], plan)
            losses[trust].exchange.keeps_features = True
        for negatives in ("price", "plan", "similarity"):
            losses[negatives] = OTCOLoss(confidence=1.0, negatives=negatives, negative_power=2.0, **settings)
            losses[negatives].exchange.set_plans([plan], plan)
        losses["divergence"] = OTCOLoss(confidence=0, divergence_weight=2.0, **settings)
        for name, loss in losses.items():
            out[f"{name}-{local_loss}-{gather_with_grad}"] = gradients(loss, images, texts)
        assert all(torch.equal(x, y) for x, y in zip(losses["share"].exchange.features, everyone, strict=True))
    torch.save(out, folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory) -> list[dict[str, tuple[Tensor, ...]]]:
    """What each of the gloo ranks got, by `loss-local_loss-gather_with_grad`."""
    folder, world = tmp_path_factory.mktemp("ranks"), request.param
    start_ranks(_rank, world, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


SETTINGS = list(itertools.product([False, True], repeat=2))


@pytest.mark.parametrize(("local_loss", "gather_with_grad"), SETTINGS)
def test_ranks_without_plans_are_clip_loss_to_the_bit(ranks, local_loss, gather_with_grad):
    for rank in ranks:
        ours, clip = (rank[f"{name}-{local_loss}-{gather_with_grad}"] for name in ("without", "clip"))
        assert all(torch.equal(x, y) for x, y in zip(ours, clip, strict=True))


@pytest.mark.parametrize(("local_loss", "gather_with_grad"), SETTINGS)
@pytest.mark.parametrize("name", ["share", "posterior", "price", "plan", "similarity"])
def test_ranks_with_plans_equal_one(ranks, plan, local_loss, gather_with_grad, name):
    if name in TRUSTS:
        loss = OTCOLoss(confidence=1.0, transport_weight=0.5, trust=name, negatives="none")
    else:
        loss = OTCOLoss(confidence=1.0, negatives=name, negative_power=2.0)
    loss.exchange.set_plans([plan], plan)
    total, *grads, _ = gradients(loss, *paired_features(64, seed=2))
    with_plan = [rank[f"{name}-{local_loss}-{gather_with_grad}"] for rank in ranks]
    torch.testing.assert_close(torch.stack([rank[0] for rank in with_plan]).mean(), total, rtol=1e-5, atol=0)
    if local_loss and not gather_with_grad:
        return  # OpenCLIP leaves out what the other ranks' rows would give: another gradient, by its own choice
    # With gather_with_grad a feature's gradient is the sum over the ranks' losses, which DDP then averages.
    share = 1 / len(ranks) if gather_with_grad else 1
    for index, expected in enumerate(grads, start=1):
        spread = torch.cat([rank[index] for rank in with_plan]) * share
        # Relative to the largest of them: single entries are sums that nearly cancel.
        torch.testing.assert_close(spread, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("negatives", ["none", "price", "plan"])
@pytest.mark.parametrize("accum", [2, 4])
def test_accumulated_batches_equal_the_large_one(plan, accum, negatives):
    """OpenCLIP's own way: each small batch again with a gradient, among the cached features of all others."""
    torch.manual_seed(0)
    inputs = paired_features(64, seed=2)
    towers = [torch.nn.Linear(24, 24) for _ in range(2)]
    parameters = [p for tower in towers for p in tower.parameters()]

    def encode(part):
        return [F.normalize(tower(x[part]), dim=1) for tower, x in zip(towers, inputs, strict=True)]

    loss = OTCOLoss(confidence=1.0, transport_weight=0.5, negatives=negatives)
    loss.exchange.set_plans([plan], plan)
    loss.exchange.keeps_features = True
    loss(*encode(slice(None)), torch.tensor(10.0)).backward()
    expected = [p.grad.clone() for p in parameters]
    gathered = loss.exchange.features
    for p in parameters:
        p.grad = None
    parts = [slice(start, start + 64 // accum) for start in range(0, 64, 64 // accum)]
    with torch.no_grad():
        cached = [encode(part) for part in parts]
    for j, part in enumerate(parts):
        features = [encode(part) if i == j else cached[i] for i in range(accum)]
        loss(*(torch.cat(side) for side in zip(*features, strict=True)), torch.tensor(10.0)).backward()
        for ours, large in zip(loss.exchange.features, gathered, strict=True):
            torch.testing.assert_close(ours, large, rtol=0, atol=1e-6)
    for p, large in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, large, rtol=0, atol=1e-5 * float(large.abs().max()))


@pytest.mark.parametrize(("local_loss", "gather_with_grad"), SETTINGS)
def test_the_divergence_reaches_the_features_of_every_rank(ranks, local_loss, gather_with_grad):
    features = [x.requires_grad_() for x in paired_features(64, seed=2)]
    expected = 2.0 * sinkhorn_divergence(*features)
    expected.backward()
    names = [f"{name}-{local_loss}-{gather_with_grad}" for name in ("divergence", "clip")]
    added = [[ours - clip for ours, clip in zip(*map(rank.get, names), strict=True)] for rank in ranks]
    for each in added:
        torch.testing.assert_close(each[0], expected.detach(), rtol=1e-4, atol=0)
    # As with the contrastive term: what DDP divides by the number of ranks stands here times this number, but for
    # OpenCLIP's global loss without gathered gradients, in which each rank has the gradient of its rows once.
    share = 1 / len(ranks) if local_loss or gather_with_grad else 1
    for index, of_one in enumerate((x.grad for x in features), start=1):
        together = torch.cat([each[index] for each in added]) * share
        torch.testing.assert_close(together, of_one, rtol=0, atol=1e-3 * float(of_one.abs().max()))


@pytest.mark.parametrize(
    "options", [{}, {"trust": "share", "negatives": "plan"}, {"transport_weight": 0.5, "negatives": "similarity"}]
)
def test_compiled_the_loss_has_no_graph_breaks(plan, options):
    """As ClipLoss: OpenCLIP 4 compiles the loss together with the model."""
    loss = OTCOLoss(**options)
    loss.exchange.keeps_features = True
    loss.exchange.set_plans([plan], plan)
    images, texts = paired_features(16)
    for each in (ClipLoss(), loss):
        torch._dynamo.reset()
        found = torch._dynamo.explain(each)(images, texts, SCALE, output_dict=True)
        assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


def test_no_batch_is_kept_that_nobody_takes():
    images, texts = paired_features(8)
    loss = OTCOLoss()
    loss(images, texts, SCALE)
    assert loss.exchange.features is None
    loss.exchange.keeps_features = True
    loss(images.requires_grad_(), texts.requires_grad_(), SCALE)
    taken = loss.exchange.take_features()
    assert all(torch.equal(x, y) for x, y in zip(taken, (images, texts), strict=True))
    assert not any(side.requires_grad for side in taken)  # or the window would keep the graphs of its steps
    assert loss.exchange.take_features() is None


def test_the_docstring_example_runs(plan):
    image_features, text_features = paired_features(8)
    image_features.requires_grad_()
    loss = OTCOLoss()
    loss.exchange.set_plans([plan], newest=plan)
    losses = loss(image_features, text_features, SCALE, output_dict=True)
    sum(losses.values()).backward()
    assert F.normalize(image_features.grad, dim=1).isfinite().all()
