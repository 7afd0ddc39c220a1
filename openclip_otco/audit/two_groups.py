"""Two groups: scores of pairs and of decoys tell how many pairs are wrong, and how likely each pair is matched.

A pair's score comes from one of two densities (Efron, *Microarrays, empirical Bayes and the two-groups model*,
Statistical Science 23, 2008). The density of wrong pairs is that of the decoys. The density of matched pairs may have
any form; it is only assumed that a higher score never makes a pair less likely to be matched. Proteomics uses decoys in
this way (Käll, Storey, MacCoss, Noble, *Posterior error probabilities and false discovery rates*, J. Proteome Research
7, 2008).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import isotonic_regression, minimize
from scipy.special import expit, logit

Array = NDArray[np.float64]

# Quantiles of the decoys' scores below which there are almost no matched pairs.
_QUANTILES = (0.1, 0.2, 0.3)
# The probability of a single witness is at least this far from 0 and from 1.
_CERTAIN = 1e-3
# Penalty on the coefficients of the logistic regression, which would be infinite if the groups did not overlap.
_PENALTY = 1e-4


class WrongShare(NamedTuple):
    """The estimated share of wrong pairs, in `[0, 1]`, and its standard error."""

    value: float
    error: float

    def interval(self) -> tuple[float, float]:
        """The bounds between which it lies with a probability of 95 %."""
        return max(0.0, self.value - 1.96 * self.error), min(1.0, self.value + 1.96 * self.error)


def discriminant_scores(pairs: Array, decoys: Array) -> tuple[Array, Array]:
    """One score out of several: by logistic regression, the log-odds of being a pair and no decoy, up to a constant.

    Some pairs are wrong, but the order is right all the same. The density of all pairs is a mixture of matched and
    wrong ones, and its ratio to the density of the decoys rises with the ratio of matched to wrong.

    Args:
        pairs, decoys: `(N, p)` and `(M, p)` scores.

    Returns:
        The scores of both, `(N,)` and `(M,)`.
    """
    mean, scale = decoys.mean(axis=0), decoys.std(axis=0).clip(min=1e-12)
    x = np.concatenate([pairs, decoys])
    x = (x - mean) / scale
    sign = np.concatenate([np.ones(len(pairs)), -np.ones(len(decoys))])
    share = np.concatenate([np.full(len(pairs), 0.5 / len(pairs)), np.full(len(decoys), 0.5 / len(decoys))])

    def loss(parameters: Array) -> tuple[float, Array]:
        constant, slopes = parameters[0], parameters[1:]
        margin = sign * (constant + x @ slopes)
        pull = -share * sign * expit(-margin)
        value = share @ np.logaddexp(0, -margin) + _PENALTY * slopes @ slopes
        return value, np.concatenate([[pull.sum()], pull @ x + 2 * _PENALTY * slopes])

    found = minimize(loss, np.concatenate([[0.0], np.ones(x.shape[1])]), jac=True, method="L-BFGS-B")
    scores = x @ found.x[1:]
    return scores[: len(pairs)], scores[len(pairs) :]


def wrong_share(pairs: Array, decoys: Array, image: ArrayLike, decoy_image: ArrayLike) -> WrongShare:
    """The share of wrong pairs, from the number of low scores.

    Below the quantile `q` of the decoys lies the share `q` of the wrong pairs, and almost no matched pair. So the share
    of all pairs that lie there, divided by `q`, is the share of wrong pairs (Storey, *A direct approach to false
    discovery rates*, JRSS B 64, 2002). The mean over a few quantiles is taken. For the standard error, all pairs of an
    image are one observation.

    Args:
        pairs, decoys: `(N,)` and `(M,)` scores.
        image, decoy_image: `(N,)` and `(M,)`, the number of each one's image.
    """
    limits = np.quantile(decoys, _QUANTILES)

    def below(scores: Array) -> Array:
        return np.mean([(scores <= limit) / q for limit, q in zip(limits, _QUANTILES, strict=True)], axis=0)

    low, decoys_low = below(pairs), below(decoys)
    share = low.mean() / decoys_low.mean()
    images = int(max(np.max(image), np.max(decoy_image))) + 1
    influence = np.bincount(image, low - share, images) / len(pairs)
    influence -= np.bincount(decoy_image, share * (decoys_low / decoys_low.mean() - 1), images) / len(decoys)
    return WrongShare(float(share.clip(0, 1)), float(np.sqrt((influence**2).sum())))


def overall_share(shares: Sequence[WrongShare], counts: Sequence[int]) -> WrongShare:
    """The share of wrong pairs of all windows, from the share and the number of pairs of each."""
    weights = np.array(counts) / sum(counts)
    value = weights @ [share.value for share in shares]
    return WrongShare(float(value), float(np.linalg.norm(weights * [share.error for share in shares])))


def posterior(pairs: Array, decoys: Array, wrong: float) -> Array:
    """The probability that each pair is matched, `(N,)`: `1 - wrong f0/f`, with the ratio by isotonic regression.

    Args:
        pairs, decoys: `(N,)` and `(M,)` scores, the higher the likelier matched.
        wrong: the share of wrong pairs.
    """
    scores = np.concatenate([pairs, decoys])
    # Among equal scores, pairs come before decoys: the regression then gives all of them one mean.
    order = np.argsort(scores, kind="stable")
    is_pair = np.arange(len(scores)) < len(pairs)
    weights = np.where(is_pair, 1 / len(pairs), 1 / len(decoys))
    real = np.empty(len(scores))
    real[order] = isotonic_regression(is_pair[order].astype(float), weights=weights[order]).x
    real = real[: len(pairs)]
    return 1 - np.clip(wrong * (1 - real) / real.clip(min=1e-9), 0, 1)


def posterior_by_reference(first: Array, scores: Array) -> Array:
    """The probability that each pair is matched, `(N,)`, by a second witness alone, which has no fair decoys.

    A model that was trained on the pairs has learned some of the wrong ones, but no decoy. So its decoys would tell
    nothing of its wrong pairs. Its scores are compared with the probabilities of a first witness instead. If both
    witnesses are independent given the truth, then the mean of the first one's probabilities at a score is a linear
    function of the probability that is wanted: it runs from the first one's mean over wrong pairs to its mean over
    matched pairs. This function is inverted. (Corrections for label noise do the same: Natarajan et al., *Learning with
    noisy labels*, NeurIPS 2013.)

    Args:
        first: `(N,)` probabilities by the first witness.
        scores: `(N,)` of the second witness, the higher the likelier matched.
    """
    # Among equal scores, probabilities fall: the regression then gives all of them one mean.
    order = np.lexsort((-first, scores))
    mean = np.empty(len(scores))
    mean[order] = isotonic_regression(first[order]).x
    matched, wrong = first.sum(), (1 - first).sum()
    top = first @ first / matched if matched else 1.0
    bottom = first @ (1 - first) / wrong if wrong else 0.0
    if top - bottom < _CERTAIN:  # the first witness does not tell pairs apart, so nothing can be learned from it
        return np.full_like(first, first.mean())
    return np.clip((mean - bottom) / (top - bottom), 0, 1)


def combined_posterior(first: Array, second: Array, wrong: float) -> Array:
    """The probability that each pair is matched, `(N,)`, by two witnesses that are independent given the truth.

    Args:
        first, second: `(N,)` probabilities of each witness alone.
        wrong: the share of wrong pairs; both probabilities have `1 - wrong` as their prior.
    """
    odds = sum(logit(np.clip(each, _CERTAIN, 1 - _CERTAIN)) for each in (first, second))
    return expit(odds - logit(np.clip(1 - wrong, _CERTAIN, 1 - _CERTAIN)))
