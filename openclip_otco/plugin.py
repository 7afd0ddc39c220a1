"""All that OpenCLIP calls: arguments, checks, loss, callbacks, model configs. The hook's contract is in the patch."""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from openclip_otco.cache import FeatureWindow, PlanCache
from openclip_otco.callback import PlanCacheCallback
from openclip_otco.captions import caption_problem
from openclip_otco.loss import OTCOLoss
from openclip_otco.models import check_model, model_configs, prepare_model, register_models
from openclip_otco.ot.shards import ALONE, DistributedShards
from openclip_otco.solver import INITIAL_PLANS, PlanSolver


@dataclass(frozen=True)
class Option:
    """One `--otco-*` flag: its default, what it accepts, and what it means."""

    flag: str
    default: Any
    help: str
    accepts: Callable[[Any], bool] = lambda value: True
    rule: str = ""
    choices: tuple[str, ...] | None = None

    @property
    def dest(self) -> str:
        return self.flag.removeprefix("--").replace("-", "_")


def _positive(value: float) -> bool:
    return 0 < value < math.inf


def _weight(value: float) -> bool:
    return 0 <= value < math.inf


def _count(value: int) -> bool:
    return value >= 1


OPTIONS = (
    Option("--otco-window", 8, "Optimizer steps between two plan updates.", _count, "at least 1"),
    Option("--otco-epsilon", 0.1, "Entropic regularization of the plans, in units of the cosine cost.", _positive,
           "positive"),
    Option("--otco-initial-plan", "combinatorial", "Plan that the entropic refinement starts from.",
           choices=INITIAL_PLANS),
    Option("--otco-additive-error", 0.01, "Additive error of the combinatorial plan, as a share of the largest cost.",
           lambda value: 0 < value <= 1, "in (0, 1]"),
    Option("--otco-cache-size", 4, "Plans kept, oldest out first.", _count, "at least 1"),
    Option("--otco-plans-per-step", 1, "Cached plans drawn each step to transport the batch.", _count, "at least 1"),
    Option("--otco-transport-weight", 0.0, "Weight of the transported pairs in the loss, 0 = off.", _weight,
           "0 or more"),
    Option("--otco-confidence", 0.25, "Power of the plan confidence that weighs each pair, 0 = off.", _weight,
           "0 or more"),
    Option("--otco-least-share", 0.5, "Least effective share of the batch that confidence leaves, 0 = no limit.",
           lambda value: 0 <= value <= 1, "in [0, 1]"),
    Option("--otco-divergence-weight", 0.0, "Weight of the Sinkhorn divergence between images and texts, 0 = off.",
           _weight, "0 or more"),
    Option("--otco-warmup", 0.05, "Share of all steps before confidence and transported pairs act.",
           lambda value: 0 <= value <= 1, "in [0, 1]"),
    Option("--otco-max-support", 8192, "Most pairs that a plan couples; a larger window is subsampled.", _count,
           "at least 1"),
)  # fmt: skip


class OTCOPlugin:
    """The plugin `otco` of the entry-point group `open_clip_train.plugins`."""

    name = "otco"
    losses = ("otco",)

    def __init__(self) -> None:
        register_models()

    def add_arguments(self, group: argparse._ArgumentGroup) -> None:
        for option in OPTIONS:
            # No argparse default: check_args must see which flags were given.
            group.add_argument(
                option.flag,
                type=type(option.default),
                default=None,
                choices=option.choices,
                help=f"{option.help} (default: {option.default})",
            )

    def check_args(self, parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
        """Fills in defaults and ends with one clear line and exit code 2 on what cannot train."""
        given = [option for option in OPTIONS if getattr(args, option.dest) is not None]
        for option in OPTIONS:
            if option not in given:
                setattr(args, option.dest, option.default)
        try:
            prepare_model(args.model)
        except RuntimeError as error:
            _end(parser, f"argument --model: {error}")
        if (args.loss in self.losses or args.model in model_configs()) and (problem := check_model(args.model)):
            _end(parser, f"argument --model: {problem}")
        if args.loss in self.losses:
            for option in given:
                value = getattr(args, option.dest)
                if not option.accepts(value):
                    _end(parser, f"argument {option.flag}: must be {option.rule}, got {value}")
            self._check_run(parser, args)
        elif given:
            flags = ", ".join(option.flag for option in given)
            warnings.warn(f"{flags} given without --loss otco: no effect with --loss {args.loss}", stacklevel=2)

    def prepare_model(self, args: argparse.Namespace, model: object) -> None:
        """Nothing to do: the loss works on the features alone."""

    def create_loss(self, args: argparse.Namespace) -> OTCOLoss:
        return OTCOLoss(
            confidence=args.otco_confidence,
            transport_weight=args.otco_transport_weight,
            divergence_weight=args.otco_divergence_weight,
            epsilon=args.otco_epsilon,
            least_share=args.otco_least_share,
            local_loss=args.local_loss,
            gather_with_grad=args.gather_with_grad,
            cache_labels=True,
            rank=args.rank,
            world_size=args.world_size,
            use_horovod=args.horovod,
        )

    def create_callbacks(self, args: argparse.Namespace, loss: object) -> list[PlanCacheCallback]:
        if not isinstance(loss, OTCOLoss):
            return []
        return [
            PlanCacheCallback(
                loss=loss,
                window=FeatureWindow(args.otco_window, args.otco_max_support, args.seed),
                cache=PlanCache(args.otco_cache_size, args.seed),
                solver=PlanSolver(
                    epsilon=args.otco_epsilon,
                    initial_plan=args.otco_initial_plan,
                    additive_error=args.otco_additive_error,
                    seed=args.seed,
                    shards=DistributedShards() if args.world_size > 1 else ALONE,
                ),
                plans_per_step=args.otco_plans_per_step,
                warmup=args.otco_warmup,
                device=args.device,
                log_every=args.log_every_n_steps,
                master=args.rank == 0,
                wandb=args.wandb,
            )
        ]

    def _check_run(self, parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
        if "coca" in args.model.lower():
            _end(parser, "argument --loss: otco does not train CoCa models; choose a CLIP model or --loss clip")
        if args.horovod:
            _end(parser, "argument --horovod: not supported by --loss otco; use torchrun, or --loss clip")
        if args.distill_model is not None or args.distill_pretrained is not None:
            _end(parser, "argument --loss: otco does not distill; drop --distill-model or use --loss clip")
        for flag, data in (("--train-data", args.train_data), ("--val-data", args.val_data)):
            # OpenCLIP's own rule for what `auto` takes for shards.
            shards = args.dataset_type == "webdataset" or (args.dataset_type == "auto" and str(data).endswith(".tar"))
            if data and shards and (problem := caption_problem(data)):
                _end(parser, f"argument {flag}: {problem}")


def _end(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """Ends as `parser.error` does, without the usage: OpenCLIP's fills a screen, above which the message is lost."""
    parser.exit(2, f"{parser.prog}: error: {message}\n")
    raise AssertionError("parser.exit returned")
