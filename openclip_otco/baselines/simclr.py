"""SimCLR beside the image-text loss, as in SLIP: NT-Xent between two views of each image."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, gather_features
from torch import Tensor

from openclip_otco.rules import POSITIVE


class SimCLRLoss(ClipLoss):
    """`ClipLoss`, plus NT-Xent (Chen et al., ICML 2020, equation 1) between two views of the image.

        L = ClipLoss(v, t) + w · 1/2N Σ_a -log exp(z_a·z_p(a)/τ) / Σ_{b≠a} exp(z_a·z_b/τ)

    The sum runs over the `2N` views `z = (v, v')` of the global batch, `p(a)` is the other view of `a`'s image. SLIP
    (Mu, Kirillov, Wagner, Xie, ECCV 2022) adds the two losses in this way.

    Args:
        weight: `w > 0`.
        temperature: `τ > 0`.
        clip_options: `local_loss`, `gather_with_grad`, `cache_labels`, `rank`, `world_size`, as in
            `open_clip.ClipLoss`.

    Raises:
        ValueError: weight or temperature not positive.
    """

    def __init__(
        self,
        weight: float = 1.0,
        temperature: float = 0.1,
        **clip_options: Any,
    ) -> None:
        super().__init__(**clip_options)
        POSITIVE.check(weight=weight, temperature=temperature)
        self.weight, self.temperature = weight, temperature

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        *,
        view_features: Tensor,
        output_dict: bool = False,
    ) -> dict[str, Tensor] | Tensor:
        """The loss of `(B, d)` unit-norm features; row `i` of all is one sample.

        Args:
            image_features, text_features: this rank's.
            logit_scale: factor of the cosines, a scalar.
            logit_bias: added to the logits, a scalar; `None`: nothing.
            view_features: `(B, d)`, this rank's, of second views of the images.
            output_dict: whether to return a dict.

        Returns:
            The sum, or with `output_dict` its weighted terms `contrastive_loss` and `simclr_loss`.
        """
        contrastive = super().forward(image_features, text_features, logit_scale, logit_bias)
        simclr = self.weight * self._nt_xent(image_features, view_features)
        if output_dict:
            return {"contrastive_loss": contrastive, "simclr_loss": simclr}
        return contrastive + simclr

    def _nt_xent(self, first: Tensor, second: Tensor) -> Tensor:
        all_first, all_second = first, second
        if self.world_size > 1:
            all_first, all_second = gather_features(
                first,
                second,
                local_loss=self.local_loss,
                gather_with_grad=self.gather_with_grad,
                rank=self.rank,
                world_size=self.world_size,
            )
            if not self.local_loss:
                first, second = all_first, all_second
        labels = self.get_ground_truth(first.device, len(first))
        itself = F.one_hot(labels, len(all_first)).bool()
        loss = torch.zeros((), device=first.device)
        for views, same, other in ((first, all_first, all_second), (second, all_second, all_first)):
            # Positives lie on the diagonal of the first block; no view is compared with itself.
            logits = torch.cat([views @ other.T, (views @ same.T).masked_fill(itself, -torch.inf)], dim=1)
            loss = loss + F.cross_entropy(logits / self.temperature, labels)
        return loss / 2
