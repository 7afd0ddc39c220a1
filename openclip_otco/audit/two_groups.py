"""Two groups: from scores of pairs, and of decoys, to how many pairs are wrong and how likely each is matched.

A pair's score comes from one of two densities (Efron, *Microarrays, empirical Bayes and the two-groups model*,
Statistical Science 23, 2008). That of wrong pairs is the decoys'. The other one may have any form: all that is used is
that a higher score never makes a pair less likely to be matched. Decoys in this part are the practice of proteomics
(Käll, Storey, MacCoss, Noble, *Posterior error probabilities and false discovery rates*, J. Proteome Research 7, 2008).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import isotonic_regression, minimize
from scipy.special import expit, logit

Array = NDArray[np.float64]

# Shares of the decoys below whose quantiles next to no matched pair lies.
_QUANTILES = (0.1, 0.2, 0.3)
# No witness is more certain than this.
_CERTAIN = 1e-3
# Of the logistic regression's coefficients, which separated groups would make infinite.
_PENALTY = 1e-4


class WrongShare(NamedTuple):
    """The estimated share of wrong pairs, in `[0, 1]`, and its standard error."""

    value: float
    error: float

    def interval(self) -> tuple[float, float]:
        """The bounds between which it lies with a probability of 95 %."""
        return max(0.0, self.value - 1.96 * self.error), min(1.0, self.value + 1.96 * self.error)


def separate(pairs: Array, decoys: Array) -> tuple[Array, Array]:
    """One score out of several: by logistic regression, the log-odds of being a pair and no decoy but for a constant.

    Though some pairs are wrong, the likelier of two pairs to be matched has the higher score: a mixture with the
    decoys' density rises with the ratio of the two.

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
    """How many pairs are wrong: as many as it takes for the low scores that there are.

    Below the decoys' quantile `q` lies the share `q` of the wrong pairs and next to none of the others, so that the
    share of all pairs that lie there is `q` times what is asked (Storey, *A direct approach to false discovery rates*,
    JRSS B 64, 2002); the mean of a few quantiles. The standard error takes the pairs of an image for one observation.

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


def overall(shares: Sequence[WrongShare], counts: Sequence[int]) -> WrongShare:
    """The share of all pairs, from those of windows of `counts` pairs each."""
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
    order = np.argsort(scores, kind="stable")  # pairs before decoys of the same score, so that they get one mean
    is_pair = np.arange(len(scores)) < len(pairs)
    weights = np.where(is_pair, 1 / len(pairs), 1 / len(decoys))
    real = np.empty(len(scores))
    real[order] = isotonic_regression(is_pair[order].astype(float), weights=weights[order]).x
    real = real[: len(pairs)]
    return 1 - np.clip(wrong * (1 - real) / real.clip(min=1e-9), 0, 1)


def posterior_of_second(first: Array, scores: Array) -> Array:
    """The probability that each pair is matched by a second witness alone, `(N,)`, whose decoys are not to be trusted.

    A model that was trained on the pairs knows the wrong ones by heart to some part, and no decoy. So its witness is
    judged by the first one, which knows none: where both are independent given the truth, the mean of the first one's
    probabilities at a score is the probability asked, shrunk between the means that wrong and matched pairs have. (It
    is what correction for label noise undoes: Natarajan et al., *Learning with noisy labels*, NeurIPS 2013.)

    Args:
        first: `(N,)` probabilities by the first witness.
        scores: `(N,)` of the second, the higher the likelier matched.
    """
    order = np.lexsort((-first, scores))  # equal scores come in falling order, so that they get one mean
    mean = np.empty(len(scores))
    mean[order] = isotonic_regression(first[order]).x
    matched, wrong = first.sum(), (1 - first).sum()
    top = first @ first / matched if matched else 1.0
    bottom = first @ (1 - first) / wrong if wrong else 0.0
    if top - bottom < _CERTAIN:  # the first knows nothing that could teach anything
        return np.full_like(first, first.mean())
    return np.clip((mean - bottom) / (top - bottom), 0, 1)


def together(first: Array, second: Array, wrong: float) -> Array:
    """The probability by two witnesses that are independent given the truth, `(N,)`; the prior is `1 - wrong`."""
    odds = sum(logit(np.clip(each, _CERTAIN, 1 - _CERTAIN)) for each in (first, second))
    return expit(odds - logit(np.clip(1 - wrong, _CERTAIN, 1 - _CERTAIN)))
