"""Canonical spaces: linear maps take the features of two towers into one space, where images and captions compare."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

# In units of the mean variance of a feature.
RIDGE = 1.0
# Number of directions that are kept.
DIMENSIONS = 128
# If all features are equal, for example those of one picture, rounding still gives a variance, but below this one.
_LEAST_VARIANCE = 1e-5


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


@dataclass(frozen=True)
class Moments:
    """Weighted sums over pairs, from which canonical correlation analysis starts; those of two sets can be added.

    Attributes:
        weight: the sum of the weights, a scalar.
        image, text: weighted sums of the features, `(d,)` and `(e,)`.
        image_image, text_text, image_text: weighted sums of outer products, `(d, d)`, `(e, e)` and `(d, e)`.
    """

    weight: Tensor
    image: Tensor
    text: Tensor
    image_image: Tensor
    text_text: Tensor
    image_text: Tensor

    @classmethod
    def of(cls, images: Tensor, texts: Tensor, weights: Tensor) -> Moments:
        """The moments of `N` pairs.

        Args:
            images, texts: `(N, d)` and `(N, e)` features, with means near 0; row `i` of both is pair `i`.
            weights: `(N,)`, at least 0.
        """
        x, y = weights[:, None] * images, weights[:, None] * texts
        return cls(weights.sum(), x.sum(dim=0), y.sum(dim=0), x.T @ images, y.T @ texts, x.T @ texts)

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))


def canonical_space(moments: Moments, ridge: float = RIDGE, dimensions: int = DIMENSIONS) -> CanonicalSpace:
    """Canonical correlation analysis (Hotelling, *Relations between two sets of variates*, Biometrika 28, 1936).

    Each direction is scaled by its correlation: so directions that images and captions do not share add no noise (Li et
    al., *CSA: data-efficient mapping of unimodal features to multimodal features*, ICLR 2025).

    Args:
        moments: of the pairs; not all weights are 0.
        ridge: added to the diagonals of the covariances, in units of their mean variance.
        dimensions: the largest `k`. `k` is also at most the number of features of the narrower side.
    """
    weight = moments.weight
    image_mean, text_mean = moments.image / weight, moments.text / weight
    images = moments.image_image / weight - torch.outer(image_mean, image_mean)
    texts = moments.text_text / weight - torch.outer(text_mean, text_mean)
    both = moments.image_text / weight - torch.outer(image_mean, text_mean)
    of_images, of_texts = _whitening(images, ridge), _whitening(texts, ridge)
    image_side, text_side = _scaled_singular_vectors(of_images @ both @ of_texts.T, dimensions)
    return CanonicalSpace(image_mean, text_mean, of_images.T @ image_side, of_texts.T @ text_side)


def _scaled_singular_vectors(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The left and right vectors of the largest singular values, each times its value: `(d, k)` and `(e, k)`.

    They are made of the eigenvectors of the smaller Gram matrix, which takes a small part of the time of an SVD. Values
    far below the largest one are inexact; so are their vectors, but these are scaled by them.
    """
    if matrix.shape[0] < matrix.shape[1]:
        right, left = _scaled_singular_vectors(matrix.T, count)
        return left, right
    squares, vectors = torch.linalg.eigh(matrix.T @ matrix)
    right = vectors[:, -count:].flip(1)
    values = squares[-count:].flip(0).clamp(min=0).sqrt()
    return matrix @ right, right * values


def _whitening(covariance: Tensor, ridge: float) -> Tensor:
    """The inverse of the Cholesky factor of `covariance` with its ridge."""
    variance = covariance.diagonal().mean().clamp(min=_LEAST_VARIANCE)
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    factor = torch.linalg.cholesky(covariance + ridge * variance * identity)
    return torch.linalg.solve_triangular(factor, identity, upper=False)
