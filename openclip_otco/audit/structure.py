"""The structure witness: the image of a right pair lies among the images as its caption lies among the captions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# The factor `k` of `exp(k cos)`.
SHARPNESS = 10.0
_ROWS = 1024
# If less than this share of the weight is heard, rounding decides; the correlation is then 0.
_LEAST_SHARE = 1e-6


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
        # The relatives of a pair have its image or its caption. They say nothing of it, and are 0 in its rows.
        self._is_relative = (image[:, None] == image) | (caption[:, None] == caption)
        self._relatives = self._is_relative.nonzero()[:, 1]
        self._count = self._is_relative.sum(dim=1)
        self._by_image, self._by_text = (
            (side @ side.T).mul_(sharpness).exp_().masked_fill_(self._is_relative, 0) for side in (images, texts)
        )

    def correlation(self, first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
        """Correlations of the rows of images `first` and captions `second`, `(n,)`, in `[-1, 1]`.

        All pairs that have such an image or such a caption are left out of a correlation: a pair must not speak for
        itself.

        Args:
            first, second: `(n,)` int64, numbers of pairs: the image of pair `first[k]` is compared with the caption of
                pair `second[k]`.
            weights: `(N,)`, at least 0: how much each pair counts in the correlations.
        """
        row = torch.arange(len(self._count), device=weights.device).repeat_interleave(self._count)
        heard = weights.sum() - _sums(weights[self._relatives], row, len(weights))
        squares = [self._centre(rows, weights, heard) for rows in (self._by_image, self._by_text)]
        parts = zip(first.split(_ROWS), second.split(_ROWS), strict=True)
        return torch.cat([self._correlation(i, j, weights, heard, *squares) for i, j in parts])

    def _centre(self, rows: Tensor, weights: Tensor, heard: Tensor) -> Tensor:
        """Give all rows the mean 0, which changes no correlation, and return their sums of squares."""
        mean = rows @ weights / heard.clamp(min=1e-12)
        rows.sub_(mean[:, None]).masked_fill_(self._is_relative, 0)
        return torch.cat([part.square() @ weights for part in rows.split(_ROWS)])

    def _correlation(self, i: Tensor, j: Tensor, weights: Tensor, heard: Tensor, x: Tensor, y: Tensor) -> Tensor:
        # Sums over all but the relatives of `i` and `j`: those over all but one's own, less those over the other's.
        weight, x_sum, x_square = self._over_relatives(self._by_image, i, j, weights)
        _, y_sum, y_square = self._over_relatives(self._by_text, j, i, weights)
        weight = heard[i] - weight
        enough = weight > _LEAST_SHARE * weights.sum()
        weight = torch.where(enough, weight, 1)
        both = _dot(self._by_image[i].mul_(weights), self._by_text[j]) - x_sum * y_sum / weight
        of_x = x[i] - x_square - x_sum.square() / weight
        of_y = y[j] - y_square - y_sum.square() / weight
        scale = (of_x.clamp(min=0) * of_y.clamp(min=0)).clamp(min=1e-20).sqrt()
        return torch.where(enough, both / scale, 0).clamp(-1, 1)

    def _over_relatives(self, rows: Tensor, own: Tensor, other: Tensor, weights: Tensor) -> list[Tensor]:
        """Sums of `w`, `w x` and `w x²` over the row `x` of `own` at the relatives of `other` that are not its own."""
        count = self._count[other]
        number = torch.arange(len(own), device=own.device).repeat_interleave(count)
        first = (self._count.cumsum(0) - self._count)[other] - (count.cumsum(0) - count)
        relative = self._relatives[first[number] + torch.arange(len(number), device=own.device)]
        value = rows[own[number], relative]
        weight = weights[relative] * ~self._is_relative[own[number], relative]
        return [_sums(each, number, len(own)) for each in (weight, weight * value, weight * value.square())]


def _sums(values: Tensor, group: Tensor, count: int) -> Tensor:
    """The sum of the values of each of `count` groups."""
    return values.new_zeros(count).index_add_(0, group, values)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """The inner product of each row of `x` with the same row of `y`."""
    return torch.einsum("ij,ij->i", x, y)
