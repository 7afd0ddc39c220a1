"""OTTER: in-batch transport plans as soft targets beside the one-hot ones."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch import Tensor

from openclip_otco.baselines.callback import gathered
from openclip_otco.method.features import Features
from openclip_otco.ot import sinkhorn
from openclip_otco.rules import POSITIVE, SHARE

# η of the paper, in units of max(1, ε). It takes practically all mass from own pairs: exp(-100) is below 1e-43.
_DIAGONAL = 100.0


class OTTERLoss(ClipLoss):
    """`ClipLoss` with targets that are in part a transport plan's (Wu et al., *Data efficient language-supervised
    zero-shot recognition with optimal transport distillation*, ICLR 2022).

        L = (1 - α) · ClipLoss(v, t) + α · ½ [ CE(M, softmax(s · V Tᵀ)) + CE(Mᵀ, softmax(s · T Vᵀ)) ]
        M = argmax_{M ∈ Π} <M, S> + ε H(M),   S = V' T'ᵀ + V' V'ᵀ + T' T'ᵀ - η I

    `v', t'` are the teacher's features of the global batch, without gradient, and `Π` the couplings of uniform
    marginals. `η` keeps own pairs out of the plan: the first term is about them already.

    Args:
        share: `α` in `[0, 1]`; with 0 it is `ClipLoss` to the bit.
        epsilon: `ε > 0`, the paper's `λ`.
        clip_options: `local_loss`, `gather_with_grad`, `cache_labels`, `rank`, `world_size`, as in
            `open_clip.ClipLoss`.

    Raises:
        ValueError: `share` outside `[0, 1]` or `epsilon` not positive.
    """

    def __init__(
        self,
        share: float = 0.5,
        epsilon: float = 0.15,
        **clip_options: Any,
    ) -> None:
        super().__init__(**clip_options)
        SHARE.check(share=share)
        POSITIVE.check(epsilon=epsilon)
        self.share, self.epsilon = share, epsilon

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        *,
        image_keys: Tensor | None = None,
        text_keys: Tensor | None = None,
        output_dict: bool = False,
    ) -> dict[str, Tensor] | Tensor:
        """The loss of `(B, d)` unit-norm image and text features; row `i` of all is one pair.

        Args:
            image_features, text_features: this rank's.
            logit_scale: factor of the cosines, a scalar.
            logit_bias: added to the logits, a scalar; `None`: nothing.
            image_keys, text_keys: `(B, d)`, the teacher's features of the same pairs; `None`: the model teaches itself.
            output_dict: whether to return a dict.

        Returns:
            The sum, or with `output_dict` its weighted terms `contrastive_loss` and `otter_loss`.
        """
        by_image, by_text = self.get_logits(image_features, text_features, logit_scale, logit_bias)
        labels = self.get_ground_truth(by_image.device, len(by_image))
        contrastive = (F.cross_entropy(by_image, labels) + F.cross_entropy(by_text, labels)) / 2
        if not self.share:
            return {"contrastive_loss": contrastive} if output_dict else contrastive
        teacher = Features(
            image_features if image_keys is None else image_keys, text_features if text_keys is None else text_keys
        )
        texts, images = soft_targets(gathered(teacher, self.world_size), self.epsilon)
        # The labels are also the numbers of this rank's rows in the global batch.
        soft = F.cross_entropy(by_image, texts[labels].to(by_image.dtype))
        soft = (soft + F.cross_entropy(by_text, images[labels].to(by_text.dtype))) / 2
        terms = {"contrastive_loss": (1 - self.share) * contrastive, "otter_loss": self.share * soft}
        return terms if output_dict else terms["contrastive_loss"] + terms["otter_loss"]


@torch.no_grad()
def soft_targets(teacher: Features, epsilon: float) -> tuple[Tensor, Tensor]:
    """The plan between all images and texts of `(N, d)` teacher features, and its transpose, rows scaled to sum 1.

    `epsilon` is that of the plan, in units of the similarity.
    """
    with torch.autocast(teacher.images.device.type, enabled=False):
        images, texts = (side.float() for side in teacher)
        n = len(images)
        similarity = images @ texts.T + images @ images.T + texts @ texts.T
        similarity -= _DIAGONAL * max(1.0, epsilon) * torch.eye(n, device=similarity.device)
        if not bool(torch.isfinite(similarity).all()):
            nan = torch.full_like(similarity, torch.nan)  # the training loop has to notice it, as with ClipLoss
            return nan, nan
        plan = sinkhorn(-similarity, epsilon)
        # A softmax normalizes each row and each column of the plan, so they sum to 1 even if Sinkhorn stopped early.
        by_image = torch.softmax((similarity + plan.g) / epsilon, dim=1)
        by_text = torch.softmax((similarity + plan.f[:, None]) / epsilon, dim=0).T
    return by_image, by_text
