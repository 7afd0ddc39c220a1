"""Retrieval with any number of captions an image, as for Flickr8k, Flickr30k and COCO (Karpathy and Fei-Fei, 2015)."""

import numpy as np
import torch
from torch import Tensor

from openclip_otco.evaluate.ranks import ranks

KS = (1, 5, 10)


def retrieval(
    image_features: Tensor,
    text_features: Tensor,
    text_image: Tensor,
    image_potentials: Tensor | None = None,
    text_potentials: Tensor | None = None,
) -> dict[str, float]:
    """Recall at 1, 5 and 10 both ways, and mean and median rank, under OpenCLIP's names.

    From image to text, it is a hit if any of the image's captions is among the first K. From text to image, every
    caption is a query.

    Args:
        image_features: `(n, d)`, unit norm.
        text_features: `(m, d)`, unit norm.
        text_image: `(m,)`, the image of each text, 0 to n - 1; every image has a text.
        image_potentials: `(n,)`, added to each image's similarities where images are the candidates (`retriever.py`).
        text_potentials: `(m,)`, the same for texts.

    Returns:
        Recalls in 0 to 1, ranks counted from 1; `rsum`, the sum of the six recalls in percent, 0 to 600; `images` n and
        `texts` m.
    """
    numbers = torch.arange(len(image_features))
    found = {
        "image_to_text": ranks(image_features, text_features, numbers, text_image, text_potentials),
        "text_to_image": ranks(text_features, image_features, text_image, numbers, image_potentials),
    }
    metrics = {f"{way}_R@{k}": (rank < k).double().mean().item() for way, rank in found.items() for k in KS}
    rsum = 100 * sum(metrics.values())
    for way, rank in found.items():
        metrics[f"{way}_mean_rank"] = rank.double().mean().item() + 1
        metrics[f"{way}_median_rank"] = float(np.floor(np.median(rank.cpu().numpy()))) + 1  # as OpenCLIP has it
    return {**metrics, "rsum": rsum, "images": len(image_features), "texts": len(text_features)}
