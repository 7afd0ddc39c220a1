"""The structure witness: the image of a right pair lies among the images as its caption lies among the captions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# The factor `k` of `exp(k cos)`.
SHARPNESS = 10.0
_ROWS = 1024


def centred(features: Tensor) -> Tensor:
    """Features `(N, d)` minus their mean, of unit norm. Features that are not centred point in about one direction."""
    features = features.float()
    return F.normalize(features - features.mean(dim=0), dim=1)


class Structure:
    """How alike two similarity structures are at each pair.

    The rows `exp(k cos(v_i, v_j))` over all images `j` and `exp(k cos(t_i, t_j))` over their captions are correlated.
    No image is compared with a caption, so neither tower need know of the other. It is the idea of the
    Gromov-Wasserstein distance (Peyré, Cuturi, Solomon, *Gromov-Wasserstein averaging of kernel and distance matrices*,
    ICML 2016); as a test for wrong captions: Zhao et al., *Mitigating noisy correspondence by geometrical structure
    consistency learning*, CVPR 2024.

    Args:
        images, texts: `(N, d)` and `(N, e)`, centred; row `i` of both is pair `i`.
        image, caption: `(N,)` int64; equal numbers are equal images, or equal captions.
        sharpness: `k`. If it is large, only the nearest neighbours count.
    """

    def __init__(
        self, images: Tensor, texts: Tensor, image: Tensor, caption: Tensor, sharpness: float = SHARPNESS
    ) -> None:
        self.image, self.caption = image, caption
        self._by_image = (images @ images.T).mul_(sharpness).exp_()
        self._by_text = (texts @ texts.T).mul_(sharpness).exp_()

    def correlation(self, first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
        """Correlations of the rows of images `first` and captions `second`, `(n,)`, in `[-1, 1]`.

        All pairs that have such an image or such a caption are left out of a correlation: a pair must not speak for
        itself.

        Args:
            first, second: `(n,)` int64, numbers of pairs: the image of pair `first[k]` is compared with the caption of
                pair `second[k]`.
            weights: `(N,)`, at least 0: how much each pair counts in the correlations.
        """
        parts = zip(first.split(_ROWS), second.split(_ROWS), strict=True)
        return torch.cat([self._correlation(i, j, weights) for i, j in parts])

    def _correlation(self, i: Tensor, j: Tensor, weights: Tensor) -> Tensor:
        share = weights.repeat(len(i), 1)
        for group in (self.image, self.caption):
            share[(group == group[i, None]) | (group == group[j, None])] = 0
        share /= share.sum(dim=1, keepdim=True).clamp(min=1e-12)
        x, y = self._by_image[i], self._by_text[j]  # copies
        x -= _dot(share, x)[:, None]
        y -= _dot(share, y)[:, None]
        both = _dot(share * x, y)
        scale = _dot(share * x, x) * _dot(share * y, y)
        return (both / scale.clamp(min=1e-20).sqrt()).clamp(-1, 1)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """The inner product of each row of `x` with the same row of `y`."""
    return torch.einsum("ij,ij->i", x, y)
