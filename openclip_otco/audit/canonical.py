"""Canonical spaces: what images and captions have in common, by linear maps of two towers' features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Chosen on Flickr8k, where neither a ridge of 10 nor 64 dimensions does better (docs/audit.md).
RIDGE, DIMENSIONS = 1.0, 128


@dataclass(frozen=True)
class CanonicalSpace:
    """Two linear maps into one space.

    Attributes:
        image_mean, text_mean: `(d,)` and `(e,)`.
        image_map, text_map: `(d, k)` and `(e, k)`.
    """

    image_mean: Tensor
    text_mean: Tensor
    image_map: Tensor
    text_map: Tensor

    def images(self, features: Tensor) -> Tensor:
        """Unit-norm points `(n, k)` of images' features `(n, d)`."""
        return F.normalize((features - self.image_mean) @ self.image_map, dim=1)

    def texts(self, features: Tensor) -> Tensor:
        """Unit-norm points `(n, k)` of captions' features `(n, e)`."""
        return F.normalize((features - self.text_mean) @ self.text_map, dim=1)


def canonical_space(
    images: Tensor, texts: Tensor, weights: Tensor, ridge: float = RIDGE, dimensions: int = DIMENSIONS
) -> CanonicalSpace:
    """Canonical correlation analysis of weighted pairs (Hotelling, *Relations between two sets of variates*, 1936).

    Each direction counts by its correlation, so that those which pairs do not share add no noise (Li et al., *CSA:
    data-efficient mapping of unimodal features to multimodal features*, ICLR 2025).

    Args:
        images, texts: `(N, d)` and `(N, e)`; row `i` of both is pair `i`.
        weights: `(N,)`, at least 0, not all 0.
        ridge: added to the covariances, in units of their mean variance.
        dimensions: `k`, at most; no more than the narrower side has.
    """
    weights = (weights / weights.sum())[:, None]
    image_mean, text_mean = (weights * images).sum(dim=0), (weights * texts).sum(dim=0)
    x, y = images - image_mean, texts - text_mean
    whitening = [_whitening((weights * each).T @ each, ridge) for each in (x, y)]
    shared = whitening[0] @ ((weights * x).T @ y) @ whitening[1].T
    left, correlation, right = torch.linalg.svd(shared, full_matrices=False)
    best = slice(min(dimensions, len(correlation)))
    return CanonicalSpace(
        image_mean,
        text_mean,
        whitening[0].T @ left[:, best] * correlation[best],
        whitening[1].T @ right[best].T * correlation[best],
    )


def _whitening(covariance: Tensor, ridge: float) -> Tensor:
    """The inverse of its Cholesky factor; features that do not vary at all are left as they are."""
    variance = covariance.diagonal().mean().clamp(min=1e-12)
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    factor = torch.linalg.cholesky(covariance + ridge * variance * identity)
    return torch.linalg.solve_triangular(factor, identity, upper=False)
