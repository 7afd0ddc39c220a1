"""Cross-modal MoCo: each query against its own key and a queue of older keys of the other modality."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openclip_otco.baselines.key_queue import KeyQueue
from openclip_otco.method.features import Features


class MoCoLoss(nn.Module):
    """InfoNCE with momentum keys and queues (He et al., CVPR 2020, equation 1), both ways between the modalities.

        L = ½ mean_i [ -log softmax_0(s · v_i·[t^k_i, T_Q]) - log softmax_0(s · t_i·[v^k_i, V_Q]) ]

    `v, t` are the features, `v^k, t^k` the momentum encoders' keys of the same pairs, `V_Q, T_Q` the queued keys, `s`
    the model's `logit_scale`. As in the paper, only keys of the queue are negatives; the batch's keys enter the queue
    after the step. Until the queue is full, there are fewer negatives. In the first step of a run there are none, so
    the loss of this step is zero.

    Nothing is gathered here: all ranks hold the same queue, each has its own queries, and DDP's mean over ranks is the
    global batch's loss, whatever `--local-loss` and `--gather-with-grad` say.

    Args:
        queue: the keys of the last steps, filled by the callback.
    """

    def __init__(self, queue: KeyQueue) -> None:
        super().__init__()
        self.queue = queue
        self.keys: Features | None = None

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        *,
        image_keys: Tensor,
        text_keys: Tensor,
        output_dict: bool = False,
    ) -> dict[str, Tensor] | Tensor:
        """The loss of `(B, d)` unit-norm features and keys; row `i` of all four is one pair.

        Args:
            image_features, text_features: this rank's.
            logit_scale: factor of the cosines, a scalar.
            logit_bias: ignored. It would add the same number to all logits of a softmax, which changes nothing.
            image_keys, text_keys: `(B, d)`, the momentum encoders' features of the same pairs.
            output_dict: whether to return the loss as `contrastive_loss` in a dict.
        """
        # With gradient accumulation the last call of a step holds the keys of all its batches.
        self.keys = Features(image_keys.detach(), text_keys.detach())
        queued = self.queue.keys or Features(image_keys[:0], text_keys[:0])
        loss = (
            _info_nce(image_features, self.keys.texts, queued.texts, logit_scale)
            + _info_nce(text_features, self.keys.images, queued.images, logit_scale)
        ) / 2
        return {"contrastive_loss": loss} if output_dict else loss


def _info_nce(queries: Tensor, keys: Tensor, queued: Tensor, logit_scale: Tensor) -> Tensor:
    own = (queries * keys).sum(dim=1, keepdim=True)
    others = queries @ queued.to(queries.dtype).T
    logits = logit_scale * torch.cat([own, others.to(own.dtype)], dim=1)
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))
