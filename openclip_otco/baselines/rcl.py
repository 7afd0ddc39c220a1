"""RCL: complementary contrastive learning, which learns from negatives alone."""

from __future__ import annotations

import torch
from open_clip.loss import ClipLoss
from torch import Tensor


class RCLLoss(ClipLoss):
    """Negatives are pushed away, and no pair is pulled together (Hu, Huang, Peng, Wang, Peng, *Cross-Modal Retrieval
    With Partially Mismatched Pairs*, TPAMI 2023; its logarithmic form).

        L = -½ mean_i Σ_{j≠i} [ log(1 - p_ij) + log(1 - q_ij) ]
        p_i = softmax_j(s · v_i·t_j),   q_i = softmax_j(s · t_i·v_j)

    A caption that is wrong for its own image is nearly always a true negative of another image. No term raises the
    probability of the own pair. The softmax alone raises it, when the probabilities of the negatives fall.

    Args:
        clip_options: `local_loss`, `gather_with_grad`, `cache_labels`, `rank`, `world_size`, as in
            `open_clip.ClipLoss`.

    Example:
        ```python
        loss = RCLLoss()
        loss(image_features, text_features, logit_scale).backward()
        ```
    """

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> dict[str, Tensor] | Tensor:
        """The loss of `(B, d)` unit-norm image and text features; row `i` of both is one pair.

        Args:
            image_features, text_features: this rank's.
            logit_scale: factor of the cosines, a scalar.
            logit_bias: added to the logits, a scalar; `None`: nothing.
            output_dict: whether to return a dict.

        Returns:
            The loss, or with `output_dict` that as `complementary_loss`.
        """
        by_image, by_text = self.get_logits(image_features, text_features, logit_scale, logit_bias)
        labels = self.get_ground_truth(by_image.device, len(by_image))
        loss = (_complementary(by_image, labels) + _complementary(by_text, labels)) / 2
        return {"complementary_loss": loss} if output_dict else loss


def _complementary(logits: Tensor, labels: Tensor) -> Tensor:
    """`-mean_i Σ_{j≠i} log(1 - p_ij)` of `(B, n)` logits."""
    log_p = logits.float().log_softmax(dim=1)
    if log_p.shape[1] < 2:
        return log_p.sum() * 0  # no negatives
    # Of the largest share `1 - p` is the sum of the others, in which nothing cancels. The others are at most a half.
    largest = log_p.argmax(dim=1, keepdim=True)
    others = log_p.scatter(1, largest, -torch.inf)
    log_rest = torch.log1p(-others.exp()).scatter(1, largest, others.logsumexp(dim=1, keepdim=True))
    return -log_rest.scatter(1, labels[:, None], 0.0).sum(dim=1).mean()
