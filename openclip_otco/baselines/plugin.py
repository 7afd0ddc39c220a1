"""All that OpenCLIP calls for the baselines: arguments, checks, hooks, losses, callbacks."""

from __future__ import annotations

import argparse

import open_clip
from torch import nn

from openclip_otco.baselines.callback import MomentumCallback
from openclip_otco.baselines.key_queue import KeyQueue
from openclip_otco.baselines.moco import MoCoLoss
from openclip_otco.baselines.momentum import MomentumEncoders
from openclip_otco.baselines.otter import OTTERLoss
from openclip_otco.baselines.rcl import RCLLoss
from openclip_otco.baselines.simclr import SimCLRLoss
from openclip_otco.baselines.views import RandomViews, SecondView
from openclip_otco.rules import AT_LEAST_ONE, POSITIVE, SHARE, SHARE_BELOW_ONE
from openclip_otco.train.options import (
    Option,
    add_options,
    check_float64,
    check_options,
    check_run,
    clip_options,
    end,
)

OPTIONS = {
    "moco": (
        Option("--moco-momentum", 0.995, "Momentum of the key encoders.", SHARE_BELOW_ONE),
        Option("--moco-queue-size", 4096, "Pairs of keys in the queues, the negatives of each query.", AT_LEAST_ONE),
    ),
    "simclr": (
        Option("--simclr-weight", 1.0, "Weight of the loss between two views of the image.", POSITIVE),
        Option("--simclr-temperature", 0.1, "Temperature of that loss.", POSITIVE),
    ),
    "otter": (
        Option("--otter-share", 0.5, "Share of the transport plan in the targets, 0 = off.", SHARE),
        Option("--otter-epsilon", 0.15, "Entropic regularization of the plan, in units of the similarity.", POSITIVE),
        Option("--otter-momentum", 0.995, "Momentum of the teacher, 0 = the model's own features.", SHARE_BELOW_ONE),
    ),
    "rcl": (),
}  # fmt: skip


class BaselinesPlugin:
    """The plugin `baselines` of the entry-point group `open_clip_train.plugins`."""

    name = "baselines"
    losses = tuple(OPTIONS)

    def __init__(self) -> None:
        self.model: nn.Module | None = None

    def add_arguments(self, group: argparse._ArgumentGroup) -> None:
        """Adds the plugin's flags to a group of OpenCLIP's parser."""
        for options in OPTIONS.values():
            add_options(group, options)

    def check_args(self, parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
        """Fills in defaults. If the arguments cannot train, ends with exit code 2 and one line that says why."""
        for loss, options in OPTIONS.items():
            check_options(parser, args, options, loss)
        if args.loss not in self.losses:
            return
        check_run(parser, args)
        if args.loss == "otter":
            check_float64(parser, args)
        for flag in ("torchscript", "trace"):
            if getattr(args, flag, False):  # OpenCLIP 4 has them no longer
                end(parser, f"argument --{flag}: not supported by --loss {args.loss}, which hooks into the model")
        if _momentum(args) is not None and getattr(args, "fsdp", False):  # a flag of OpenCLIP 4
            end(parser, f"argument --fsdp: not supported by --loss {args.loss}, which keeps a copy of the model")
        # An update moves a weight by the share 1 - m of a difference only; half precision would round this to nothing.
        if _momentum(args) is not None and args.precision in ("fp16", "bf16", "pure_fp16", "pure_bf16"):
            end(parser, f"argument --precision: --loss {args.loss} averages weights in float32; use amp or amp_bf16")

    def prepare_model(self, args: argparse.Namespace, model: nn.Module) -> None:
        """Lets the model give the loss what it needs beside the features: keys, or features of second views."""
        # The momentum encoders are copied later, in `create_callbacks`: the weights of `--resume` are loaded before it.
        self.model = model if _momentum(args) is not None else None
        if args.loss == "simclr":
            preprocessing = open_clip.get_model_preprocess_cfg(model)
            SecondView(model, RandomViews(preprocessing["mean"], preprocessing["std"]))

    def create_loss(self, args: argparse.Namespace) -> nn.Module:
        """The loss that `--loss` names."""
        if args.loss == "moco":
            return MoCoLoss(KeyQueue(args.moco_queue_size))
        if args.loss == "simclr":
            return SimCLRLoss(args.simclr_weight, args.simclr_temperature, **clip_options(args))
        if args.loss == "rcl":
            return RCLLoss(**clip_options(args))
        return OTTERLoss(args.otter_share, args.otter_epsilon, **clip_options(args))

    def create_callbacks(self, args: argparse.Namespace, loss: object) -> list[MomentumCallback]:
        """The callback that keeps the momentum encoders; none for a loss without them."""
        momentum = _momentum(args)
        if self.model is None or momentum is None:
            return []
        return [
            MomentumCallback(
                name=args.loss,
                encoders=MomentumEncoders(self.model, momentum),
                loss=loss if isinstance(loss, MoCoLoss) else None,
                device=args.device,
                world_size=args.world_size,
                master=args.rank == 0,
            )
        ]


def _momentum(args: argparse.Namespace) -> float | None:
    """The momentum of the encoders that the loss needs; `None` where it needs none."""
    if args.loss == "moco":
        return float(args.moco_momentum)
    if args.loss == "otter" and args.otter_share and args.otter_momentum:
        return float(args.otter_momentum)
    return None
