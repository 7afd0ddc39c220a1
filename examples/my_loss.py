"""A loss of one's own for OpenCLIP's script: InfoNCE with smoothed labels.

A share of each target goes to all captions of the batch alike, so that no pair is believed wholly. It is a common
remedy for wrong labels (Lukasik, Bhojanapalli, Menon, Kumar, *Does label smoothing mitigate label noise?*, ICML 2020).

    pip install ./examples
    openclip-otco train --loss smoothed --smoothing 0.2 ...
"""

from __future__ import annotations

import argparse
from typing import Any

import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch import Tensor


class SmoothedClipLoss(ClipLoss):
    """`open_clip.ClipLoss` whose target is `1 - s + s/n` at the own caption and `s/n` at each other of `n`.

    Args:
        smoothing: `s`, in [0, 1); 0 is OpenCLIP's loss.
        options: as in `open_clip.ClipLoss`.
    """

    def __init__(self, smoothing: float, **options: Any) -> None:
        super().__init__(**options)
        self.smoothing = smoothing

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> dict[str, Tensor] | Tensor:
        """The loss of `(B, d)` unit-norm features, whose rows are pairs; with `output_dict` by its name in the log."""
        # ClipLoss gathers the features of all ranks, and knows which of them are this rank's.
        by_image, by_text = self.get_logits(image_features, text_features, logit_scale, logit_bias)
        own = self.get_ground_truth(by_image.device, len(by_image))
        loss = (
            F.cross_entropy(by_image, own, label_smoothing=self.smoothing)
            + F.cross_entropy(by_text, own, label_smoothing=self.smoothing)
        ) / 2
        return {"smoothed_loss": loss} if output_dict else loss


class MyLossPlugin:
    """What OpenCLIP's script calls; `open_clip_train/plugins.py` says when."""

    name = "my-loss"
    losses = ("smoothed",)

    def add_arguments(self, group: argparse._ArgumentGroup) -> None:
        group.add_argument(
            "--smoothing",
            type=float,
            default=0.1,
            help="Share of a target that all captions get (%(default)s).",
        )

    def check_args(self, parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
        if not 0 <= args.smoothing < 1:
            parser.error(f"argument --smoothing: must be in [0, 1), got {args.smoothing}")

    def prepare_model(self, args: argparse.Namespace, model: object) -> None:
        """Nothing to do: the loss needs the features alone."""

    def create_loss(self, args: argparse.Namespace) -> SmoothedClipLoss:
        return SmoothedClipLoss(
            args.smoothing,
            local_loss=args.local_loss,
            gather_with_grad=args.gather_with_grad,
            cache_labels=True,
            rank=args.rank,
            world_size=args.world_size,
        )

    def create_callbacks(self, args: argparse.Namespace, loss: object) -> list[Any]:
        """None: nothing is kept from step to step."""
        return []
