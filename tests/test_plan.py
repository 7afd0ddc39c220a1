"""TransportPlan against dense float64 formulas written from the method, section 3."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from conftest import paired_features
from torch import Tensor

from openclip_otco import PlanSolver, TransportPlan

EPSILONS = (0.02, 0.1, 0.5)


def plan_of(epsilon: float, n: int = 60) -> TransportPlan:
    return PlanSolver(epsilon, tolerance=1e-5).solve(*paired_features(n))


def dense_shares(queries: Tensor, support: Tensor, potential: Tensor, own: Tensor, own_potential: Tensor, eps: float):
    """Softmax over {support} ∪ {own pair}, `(B, N + 1)`, in float64."""
    logits = (potential.double() + queries.double() @ support.double().T) / eps
    own_logit = (own_potential.double() + (queries * own).double().sum(1)) / eps
    return torch.cat([logits, own_logit[:, None]], dim=1).softmax(dim=1)


def dense_potential(queries: Tensor, support: Tensor, potential: Tensor, eps: float) -> Tensor:
    cost = 1 - queries.double() @ support.double().T
    kernel = torch.exp((potential.double() - cost) / eps)
    return -eps * kernel.mean(dim=1).log()


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_the_c_transform_gives_back_the_potentials_at_the_support(epsilon):
    plan = plan_of(epsilon)
    torch.testing.assert_close(plan.image_potential(plan.image_features), plan.f, atol=1e-4, rtol=0)
    torch.testing.assert_close(plan.text_potential(plan.text_features), plan.g, atol=1e-4, rtol=0)


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_potentials_of_new_points_follow_the_formula(epsilon):
    plan = plan_of(epsilon)
    v, t = paired_features(17, seed=5)
    expected = dense_potential(v, plan.text_features, plan.g, epsilon)
    torch.testing.assert_close(plan.image_potential(v).double(), expected, atol=1e-5, rtol=1e-4)
    expected = dense_potential(t, plan.image_features, plan.f, epsilon)
    torch.testing.assert_close(plan.text_potential(t).double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("own", [False, True])
def test_transport_is_the_normalised_barycentric_projection(epsilon, own):
    plan = plan_of(epsilon)
    v, t = paired_features(17, seed=5)
    g_t = dense_potential(t, plan.image_features, plan.f, epsilon)
    f_v = dense_potential(v, plan.text_features, plan.g, epsilon)
    for query, support, potential, partner, partner_potential, moved in (
        (v, plan.text_features, plan.g, t, g_t, plan.transport_image(v, t if own else None)),
        (t, plan.image_features, plan.f, v, f_v, plan.transport_text(t, v if own else None)),
    ):
        if own:
            shares = dense_shares(query, support, potential, partner, partner_potential, epsilon)
            mean = shares[:, :-1] @ support.double() + shares[:, -1:] * partner.double()
        else:
            mean = ((potential.double() + query.double() @ support.double().T) / epsilon).softmax(1) @ support.double()
        torch.testing.assert_close(moved.double(), F.normalize(mean, dim=1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_confidence_is_the_product_of_both_shares(epsilon):
    plan = plan_of(epsilon)
    v, t = paired_features(17, seed=5)
    t = torch.cat([t[:9], t[9:].roll(1, 0)])  # some wrong captions
    g_t = dense_potential(t, plan.image_features, plan.f, epsilon)
    f_v = dense_potential(v, plan.text_features, plan.g, epsilon)
    row = dense_shares(v, plan.text_features, plan.g, t, g_t, epsilon)[:, -1]
    column = dense_shares(t, plan.image_features, plan.f, v, f_v, epsilon)[:, -1]
    torch.testing.assert_close(plan.confidence(v, t).double(), row * column, rtol=2e-3, atol=1e-7)
    torch.testing.assert_close(plan.log_confidence(v, t).exp(), plan.confidence(v, t))


def test_wrong_captions_get_less_confidence():
    plan = plan_of(0.1)
    v, t = paired_features(64, seed=5)
    assert plan.confidence(v, t).median() > 10 * plan.confidence(v, t.roll(1, 0)).median()


def test_density_at_the_support_is_the_plan():
    plan = plan_of(0.1)
    n = len(plan)
    rows = torch.arange(n).repeat_interleave(n)
    cols = torch.arange(n).repeat(n)
    density = plan.log_mass(plan.image_features[rows], plan.text_features[cols]).double().exp().view(n, n) / n**2
    torch.testing.assert_close(density.sum(0), torch.full((n,), 1 / n).double(), rtol=1e-3, atol=0)
    torch.testing.assert_close(density.sum(1), torch.full((n,), 1 / n).double(), rtol=1e-3, atol=0)


def test_gradient_of_transport_is_that_of_the_dense_projection():
    plan = plan_of(0.1)
    v, t = paired_features(11, seed=5)
    g_t = dense_potential(t, plan.image_features, plan.f, 0.1)
    weight = torch.randn(11, v.shape[1])

    query = v.clone().requires_grad_()
    (plan.transport_image(query, t) * weight).sum().backward()

    reference = v.double().requires_grad_()
    logits = (plan.g.double() + reference @ plan.text_features.double().T) / 0.1
    own = (g_t + (reference * t.double()).sum(1)) / 0.1
    shares = torch.cat([logits, own[:, None]], dim=1).softmax(dim=1)
    mean = shares[:, :-1] @ plan.text_features.double() + shares[:, -1:] * t.double()
    (F.normalize(mean, dim=1) * weight.double()).sum().backward()
    torch.testing.assert_close(query.grad.double(), reference.grad, rtol=1e-3, atol=1e-5)


def test_the_own_pair_counts_as_a_constant():
    plan = plan_of(0.1)
    v, t = (x.clone().requires_grad_() for x in paired_features(11, seed=5))
    plan.transport_image(v, t).sum().backward()
    assert v.grad.abs().max() > 0
    assert t.grad is None
    assert not plan.confidence(v, t).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_queries_are_taken_up_to_float32(dtype):
    plan = plan_of(0.1)
    v, t = (x.to(dtype) for x in paired_features(11, seed=5))
    torch.testing.assert_close(plan.transport_image(v, t), plan.transport_image(v.float(), t.float()))
    torch.testing.assert_close(plan.confidence(v, t), plan.confidence(v.float(), t.float()))


def test_state_survives_a_checkpoint_without_code():
    plan = plan_of(0.1)
    buffer = io.BytesIO()
    torch.save(plan.state_dict(), buffer)
    buffer.seek(0)
    restored = TransportPlan.from_state_dict(torch.load(buffer, weights_only=True))
    v, t = paired_features(11, seed=5)
    assert torch.equal(restored.transport_image(v, t), plan.transport_image(v, t))
    assert (restored.step, restored.epsilon, dict(restored.diagnostics)) == (
        plan.step,
        plan.epsilon,
        dict(plan.diagnostics),
    )


def test_fields_that_do_not_fit_are_refused():
    plan = plan_of(0.1)
    with pytest.raises(ValueError, match="potentials of one N"):
        TransportPlan(plan.image_features, plan.text_features, plan.f[:-1], plan.g, 0.1)


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_without_coupling_shares_are_plain_softmaxes(epsilon):
    plan = PlanSolver(epsilon, coupling="softmax").solve(*paired_features(60))
    v, t = paired_features(17, seed=5)
    zero, none = torch.zeros(60), torch.zeros(17)
    row = dense_shares(v, plan.text_features, zero, t, none, epsilon)[:, -1]
    column = dense_shares(t, plan.image_features, zero, v, none, epsilon)[:, -1]
    torch.testing.assert_close(plan.confidence(v, t).double(), row * column, rtol=1e-4, atol=1e-7)
    moved = F.normalize(
        dense_shares(v, plan.text_features, zero, t, none, epsilon)[:, :-1] @ plan.text_features.double()
        + row[:, None] * t.double()
    )
    torch.testing.assert_close(plan.transport_image(v, t).double(), moved, rtol=0, atol=1e-5)
    again = TransportPlan.from_state_dict(plan.state_dict())
    assert not again.coupled
    assert torch.equal(again.log_confidence(v, t), plan.log_confidence(v, t))
    assert not torch.allclose(plan.confidence(v, t), plan_of(epsilon).confidence(v, t), rtol=1e-2)


@pytest.mark.parametrize("name", ["image_features", "text_features", "f", "g"])
def test_the_digest_tells_plans_apart_that_differ_in_one_bit(name):
    plan = plan_of(0.1)
    state = plan.state_dict()
    assert TransportPlan.from_state_dict(state).digest() == plan.digest()
    changed = state[name].clone()
    changed.view(torch.int32).view(-1)[-1] ^= 1
    assert TransportPlan.from_state_dict({**state, name: changed}).digest() != plan.digest()


@pytest.mark.parametrize("name", ["image_features", "text_features", "f", "g"])
def test_a_saved_plan_of_other_types_or_shapes_is_refused(name):
    state = plan_of(0.1).state_dict()
    for wrong in (state[name].tolist(), state[name].double(), None):
        with pytest.raises(TypeError, match="must be float32 tensors"):
            TransportPlan.from_state_dict({**state, name: wrong})
    for wrong in (state[name].flatten()[:-1], state[name][None], state[name].sum()):
        with pytest.raises(ValueError, match="of one N; got"):
            TransportPlan.from_state_dict({**state, name: wrong})


@pytest.mark.parametrize(("name", "says"), [("image_features", "unit norm"), ("text_features", "unit norm"),
                                            ("f", "within 100 of 0"), ("g", "within 100 of 0")])  # fmt: skip
def test_a_saved_plan_of_impossible_numbers_is_refused(name, says):
    state = plan_of(0.1).state_dict()
    state[name] = state[name].clone()
    state[name][3] = 1e30
    with pytest.raises(ValueError, match=says):
        TransportPlan.from_state_dict(state)


@pytest.mark.parametrize("epsilon", [1e-30, 3e38, float("nan")])
def test_a_saved_epsilon_that_no_plan_can_have_is_refused(epsilon):
    with pytest.raises(ValueError, match="epsilon must lie between"):
        TransportPlan.from_state_dict({**plan_of(0.1).state_dict(), "epsilon": epsilon})
