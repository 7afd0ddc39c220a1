"""Anderson acceleration of a fixed-point iteration, which goes back to plain steps where it does harm.

Anderson, *Iterative procedures for nonlinear integral equations*, J. ACM 12, 1965; Walker, Ni, *Anderson acceleration
for fixed-point iterations*, SIAM J. Numer. Anal. 49, 2011. For Sinkhorn's iteration: Chizat, Roussillon, Léger,
Vialard, Peyré, *Faster Wasserstein distance estimation with the Sinkhorn divergence*, NeurIPS 2020.
"""

from __future__ import annotations

import torch
from torch import Tensor

# So many points are combined. More of them save few iterations, and in float32 they hardly differ.
_MEMORY = 6
# The iteration goes back to the best point and takes a plain step from it in two cases: a combined point has more than
# this factor times the least error, or so many points in a row have not lowered the least error.
_LARGEST_ERROR_RATIO = 1.5
_PATIENCE = 10
# Ridge of the least-squares problem, as a share of its mean diagonal.
_RIDGE = 1e-10
# Steps that hardly differ are combined with huge shares, which move the point far away. As a constant may be added to
# potentials, the error does not show this, until the digits of the point are lost.
_LARGEST_SHARE = 1e4


class Anderson:
    """Chooses each point of the iteration from the plain steps so far.

    Args:
        weight: `(n,)` non-negative weights of the coordinates in the least squares.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.double().sqrt()
        self._images: list[Tensor] = []
        self._residuals: list[Tensor] = []
        self._least_error = torch.inf
        self._image_of_best: Tensor | None = None
        self._since_best = 0
        self._combined = False

    def next(self, point: Tensor, image: Tensor, error: float) -> Tensor:
        """The next point, `(n,)`.

        Plain steps of Sinkhorn's iteration never raise the error. The iteration goes back to a plain step from the best
        point now and then, and so it converges as the plain one does.

        Args:
            point: `(n,)`, the present point.
            image: `(n,)`, where a plain step from it leads.
            error: of `point`.
        """
        self._since_best += 1
        if self._image_of_best is None or error < self._least_error:
            self._least_error, self._image_of_best, self._since_best = error, image, 0
        if self._combined and (not error <= _LARGEST_ERROR_RATIO * self._least_error or self._since_best > _PATIENCE):
            self._images.clear()
            self._residuals.clear()
            self._combined, self._since_best = False, 0
            return self._image_of_best
        self._images = [*self._images[1 - _MEMORY :], image]
        self._residuals = [*self._residuals[1 - _MEMORY :], (image - point).double() * self.weight]
        self._combined = len(self._images) > 1
        if not self._combined:
            return image
        residuals, images = torch.stack(self._residuals), torch.stack(self._images)
        differences = residuals[1:] - residuals[:-1]
        gram = differences @ differences.T
        gram.diagonal().add_(_RIDGE * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny)
        share = torch.linalg.lstsq(gram, (differences @ residuals[-1])[:, None]).solution.squeeze(1)
        if not bool((share.abs() <= _LARGEST_SHARE).all()):
            self._combined = False
            return image
        return image - share.to(image.dtype) @ (images[1:] - images[:-1])
