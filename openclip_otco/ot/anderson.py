"""Anderson acceleration of a fixed-point iteration, kept from doing harm.

Anderson, *Iterative procedures for nonlinear integral equations*, J. ACM 12, 1965; Walker, Ni, *Anderson acceleration
for fixed-point iterations*, SIAM J. Numer. Anal. 49, 2011. For Sinkhorn's iteration: Chizat, Roussillon, Léger,
Vialard, Peyré, *Faster Wasserstein distance estimation with the Sinkhorn divergence*, NeurIPS 2020.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Points that are combined; more of them save little and are harder to tell apart in float32.
_MEMORY = 6
# Combined points may be this much worse than the best one, and this many may fail to better it, before the iteration
# goes back to the best one and takes a plain step.
_WORSE = 1.5
_PATIENCE = 10
# Ridge of the least-squares problem, as a share of its mean diagonal.
_RIDGE = 1e-10
# Steps that hardly differ ask for huge shares of each other. Potentials are free up to a constant, so that no error
# would tell how far such a point has gone, until its digits are lost.
_LARGEST_SHARE = 1e4


class Anderson:
    """Where to go on from, given where a plain step has led.

    Args:
        weight: `(n,)` non-negative weights of the coordinates in the least squares.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.double().sqrt()
        self._images: list[Tensor] = []
        self._residuals: list[Tensor] = []
        self._best = torch.inf
        self._best_image: Tensor | None = None
        self._stale = 0
        self._combined = False

    def next(self, point: Tensor, image: Tensor, error: float) -> Tensor:
        """The next point, `(n,)`, after the plain step took `point` to `image`, where `error` is that of `point`.

        Plain steps of Sinkhorn's never raise the error, so going back to one from the best point now and then keeps
        what it guarantees.
        """
        self._stale += 1
        if self._best_image is None or error < self._best:
            self._best, self._best_image, self._stale = error, image, 0
        if self._combined and (not error <= _WORSE * self._best or self._stale > _PATIENCE):
            self._images.clear()
            self._residuals.clear()
            self._combined, self._stale = False, 0
            return self._best_image
        self._images = [*self._images[1 - _MEMORY :], image]
        self._residuals = [*self._residuals[1 - _MEMORY :], (image - point).double() * self.weight]
        self._combined = len(self._images) > 1
        if not self._combined:
            return image
        residuals, images = torch.stack(self._residuals), torch.stack(self._images)
        changes = residuals[1:] - residuals[:-1]
        gram = changes @ changes.T
        gram.diagonal().add_(_RIDGE * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny)
        share = torch.linalg.lstsq(gram, (changes @ residuals[-1])[:, None]).solution.squeeze(1)
        if not bool((share.abs() <= _LARGEST_SHARE).all()):
            self._combined = False
            return image
        return image - share.to(image.dtype) @ (images[1:] - images[:-1])
