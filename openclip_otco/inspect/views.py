"""Views: where each cached plan would move a sample, and how much the plans differ in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openclip_otco.method.plan import TransportPlan


@dataclass(frozen=True)
class Views:
    """How alike the `K` plans' views of `n` samples are; the plans are in the order in which they were given.

    Args:
        per_sample: `(n,)` mean cosine between the views that two different plans have of one sample, in `[-1, 1]`.
        between_plans: `(K, K)` mean cosine over the samples between the views of two plans; ones on the diagonal.
    """

    per_sample: Tensor
    between_plans: Tensor


def compare_views(plans: Sequence[TransportPlan], images: Tensor, texts: Tensor) -> Views | None:
    """How alike two plans' transported views `v'` and `t'` of the pairs are; None for fewer than two plans.

    The views are those of the loss (method, section 4), with the own pair in the support. A cosine is the mean of two:
    between two views of the image, and between two views of the text.

    Args:
        plans: of the run's cache.
        images, texts: `(n, d)` unit-norm features of the samples.
    """
    if len(plans) < 2:
        return None
    moved_images = torch.stack([plan.transport_image(images, texts) for plan in plans])
    moved_texts = torch.stack([plan.transport_text(texts, images) for plan in plans])
    # (n, K, K)
    cosines = (torch.einsum("knd,lnd->nkl", moved_images, moved_images)
               + torch.einsum("knd,lnd->nkl", moved_texts, moved_texts)) / 2  # fmt: skip
    different = ~torch.eye(len(plans), dtype=torch.bool)
    return Views(cosines[:, different].mean(dim=1), cosines.mean(dim=0))
