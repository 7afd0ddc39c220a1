"""The two groups against SciPy's maximum of the likelihood, and against pairs whose densities are known."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import expit

from openclip_otco.method.posterior import log_posterior, matched_share
from openclip_otco.method.weights import tempered

RATIOS = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=60)


def likelihood(share, log_ratio):
    return np.log(share * np.exp(log_ratio) + 1 - share).mean()


@settings(deadline=None, max_examples=200)
@given(RATIOS)
def test_no_share_is_likelier(logs):
    log_ratio = np.array(logs)
    share = float(matched_share(torch.tensor(logs)))
    best = minimize_scalar(lambda p: -likelihood(p, log_ratio), bounds=(0, 1), method="bounded")
    assert 0 <= share <= 1
    assert likelihood(share, log_ratio) >= max(-best.fun, likelihood(0, log_ratio), likelihood(1, log_ratio)) - 1e-5


@settings(deadline=None, max_examples=200)
@given(RATIOS)
def test_the_mean_posterior_is_the_share(logs):
    log_ratio = torch.tensor(logs, dtype=torch.float64)
    share = matched_share(log_ratio)
    posterior = log_posterior(log_ratio, share).exp() * share
    assert bool((posterior <= 1 + 1e-9).all())
    if 0 < share < 1:
        assert float(posterior.mean()) == pytest.approx(float(share), abs=1e-4)
        odds = torch.logit(share) + log_ratio
        torch.testing.assert_close(posterior, torch.from_numpy(expit(odds.numpy())), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("planted", [0.0, 0.3, 0.6, 1.0])
def test_a_planted_share_is_found(planted):
    # Scores of random pairs are N(0, 1), of matched ones N(3, 1): the ratio of the densities is exp(3 s - 9/2).
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4000, generator=generator, dtype=torch.float64)
    matched = torch.arange(4000) < planted * 4000
    log_ratio = 3 * (scores + 3 * matched) - 4.5
    assert float(matched_share(log_ratio)) == pytest.approx(planted, abs=0.02)


def test_where_all_are_matched_all_weigh_the_same():
    log_ratio = torch.tensor([2.0, 9.0, 4.0, 0.5])
    share = matched_share(log_ratio)
    assert float(share) == 1
    assert torch.equal(log_posterior(log_ratio, share), torch.zeros(4))


def test_where_none_is_matched_the_order_is_left():
    log_ratio = torch.tensor([-2.0, -9.0, -4.0])
    share = matched_share(log_ratio)
    assert float(share) == 0
    assert torch.equal(log_posterior(log_ratio, share), log_ratio)


def test_a_nan_stays_one():
    log_ratio = torch.tensor([1.0, float("nan"), -1.0])
    assert bool(log_posterior(log_ratio, matched_share(log_ratio)).isnan().any())


@pytest.mark.parametrize("least_share", [0.0, 0.25])
def test_no_number_is_read_back(least_share):
    # A number that Python needs makes a GPU wait for it. A tensor without data cannot give one, and raises.
    log_ratio = torch.zeros(8, device="meta")
    share = matched_share(log_ratio)
    weights, effective = tempered(log_posterior(log_ratio, share), 2.0, least_share)
    assert weights.shape == (8,)
    assert share.shape == effective.shape == ()
