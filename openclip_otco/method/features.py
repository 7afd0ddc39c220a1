"""Image and text features of the same pairs."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Features(NamedTuple):
    """Image and text features, `(n, d)` each; row `i` of both is one pair."""

    images: Tensor
    texts: Tensor

    def detach(self) -> Features:
        """The same features without gradient."""
        return Features(self.images.detach(), self.texts.detach())
