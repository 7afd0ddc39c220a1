"""All that OpenCLIP calls: arguments, checks, loss, callbacks, model configs. The hook's contract is in the patch."""

from __future__ import annotations

import argparse

from openclip_otco.method.cache import PlanCache
from openclip_otco.method.loss import TRUSTS, OTCOLoss
from openclip_otco.method.solver import COUPLINGS, INITIAL_PLANS, PlanSolver
from openclip_otco.method.weights import NEGATIVES
from openclip_otco.method.window import FeatureWindow
from openclip_otco.models.registry import check_model, model_configs, prepare_model, register_models
from openclip_otco.ot.defaults import ADDITIVE_ERROR, EPSILON
from openclip_otco.ot.group import ALONE, DistributedGroup
from openclip_otco.rules import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, SHARE, SHARE_ABOVE_ZERO
from openclip_otco.train.callback import PlanCacheCallback
from openclip_otco.train.options import (
    Option,
    add_options,
    check_float64,
    check_options,
    check_run,
    clip_options,
    end,
)
from openclip_otco.train.plan_log import PlanLog

OPTIONS = (
    Option("--otco-window", 8, "Optimizer steps between two plan updates.", AT_LEAST_ONE),
    Option("--otco-epsilon", EPSILON, "Entropic regularization of the plans, in units of the cosine cost.", POSITIVE),
    Option("--otco-initial-plan", "combinatorial", "Plan that the entropic refinement starts from.",
           choices=INITIAL_PLANS),
    Option("--otco-additive-error", ADDITIVE_ERROR,
           "Additive error of the combinatorial plan, as a share of the range of the costs.",
           SHARE_ABOVE_ZERO),
    Option("--otco-coupling", "transport",
           "What couples the pairs of a window: transport, an optimal transport plan; or, for comparison, softmax, "
           "two softmaxes without marginals.",
           choices=COUPLINGS),
    Option("--otco-cache-size", 4, "Plans kept, oldest out first.", AT_LEAST_ONE),
    Option("--otco-max-age", 32,
           "Windows after which a plan acts no longer, when newer ones fail; at least --otco-cache-size.",
           AT_LEAST_ONE),
    Option("--otco-plans-per-step", 1, "Cached plans drawn each step to transport the batch.", AT_LEAST_ONE),
    Option("--otco-transport-weight", 0.0, "Weight of the transported pairs in the loss, 0 = off.", NOT_NEGATIVE),
    Option("--otco-own-pair", "in", "Whether a pair's own partner is in the support that transports it.",
           choices=("in", "out")),
    Option("--otco-confidence", 2.0, "Power of the trust that weighs each pair, 0 = off.", NOT_NEGATIVE),
    Option("--otco-trust", "posterior",
           "What --otco-confidence is the power of: posterior, the probability that a pair is matched; or share, the "
           "pair's share of the plan.",
           choices=TRUSTS),
    Option("--otco-least-share", 0.25,
           "Smallest effective share of the batch that the weights of pairs may have, 0 = no limit. With --otco-trust "
           "posterior, all pairs weigh alike in a step in which the plan finds a smaller share of matched pairs.",
           SHARE),
    Option("--otco-divergence-weight", 0.0, "Weight of the Sinkhorn divergence between images and texts, 0 = off.",
           NOT_NEGATIVE),
    Option("--otco-negatives", "price",
           "What decides the weights of negatives: price, their similarity and the plan's prices; or, for comparison, "
           "plan, the plan's density; similarity, their similarity alone; none, equal weights.",
           choices=NEGATIVES),
    Option("--otco-negative-power", 0.6,
           "Power of the weights of negatives, 0 = off; divided by epsilon, it is the factor of the cosine.",
           NOT_NEGATIVE),
    Option("--otco-negative-price", 1.0,
           "How much the plan's price of a negative counts beside its similarity, with --otco-negatives price.",
           NOT_NEGATIVE),
    Option("--otco-warmup", 0.02, "Share of all steps, at the start, in which plans do not act on the loss.", SHARE),
    Option("--otco-max-support", 8192, "Most pairs that a plan couples; a larger window is subsampled.", AT_LEAST_ONE),
)  # fmt: skip


class OTCOPlugin:
    """The plugin `otco` of the entry-point group `open_clip_train.plugins`."""

    name = "otco"
    losses = ("otco",)

    def __init__(self) -> None:
        register_models()

    def add_arguments(self, group: argparse._ArgumentGroup) -> None:
        """Adds the plugin's flags to a group of OpenCLIP's parser."""
        add_options(group, OPTIONS)

    def check_args(self, parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
        """Fills in defaults. If the arguments cannot train, ends with exit code 2 and one line that says why."""
        check_options(parser, args, OPTIONS, self.name)
        try:
            prepare_model(args.model)
        except RuntimeError as error:
            end(parser, f"argument --model: {error}")
        if (args.loss in self.losses or args.model in model_configs()) and (problem := check_model(args.model)):
            end(parser, f"argument --model: {problem}")
        if args.loss in self.losses:
            check_run(parser, args)
            check_float64(parser, args)
            # A full cache holds plans as old as its size, in windows. This age is no sign that newer plans failed.
            if args.otco_max_age < args.otco_cache_size:
                least = f"must be at least --otco-cache-size, which is {args.otco_cache_size}"
                end(parser, f"argument --otco-max-age: {least}; got {args.otco_max_age}")

    def prepare_model(self, args: argparse.Namespace, model: object) -> None:
        """Nothing to do: the loss works on the features alone."""

    def create_loss(self, args: argparse.Namespace) -> OTCOLoss:
        """The loss, with the flags' settings."""
        return OTCOLoss(
            confidence=args.otco_confidence,
            transport_weight=args.otco_transport_weight,
            divergence_weight=args.otco_divergence_weight,
            epsilon=args.otco_epsilon,
            least_share=args.otco_least_share,
            own_pair=args.otco_own_pair == "in",
            trust=args.otco_trust,
            negatives=args.otco_negatives,
            negative_power=args.otco_negative_power,
            negative_price=args.otco_negative_price,
            **clip_options(args),
        )

    def create_callbacks(self, args: argparse.Namespace, loss: object) -> list[PlanCacheCallback]:
        """The callback that makes the plans of the loss; none for a loss of another plugin."""
        if not isinstance(loss, OTCOLoss):
            return []
        return [
            PlanCacheCallback(
                exchange=loss.exchange,
                window=FeatureWindow(args.otco_window, args.otco_max_support, args.seed),
                cache=PlanCache(args.otco_cache_size, args.seed),
                solver=PlanSolver(
                    epsilon=args.otco_epsilon,
                    initial_plan=args.otco_initial_plan,
                    additive_error=args.otco_additive_error,
                    seed=args.seed,
                    coupling=args.otco_coupling,
                    group=DistributedGroup() if args.world_size > 1 else ALONE,
                ),
                plans_per_step=args.otco_plans_per_step,
                warmup=args.otco_warmup,
                max_age=args.otco_max_age,
                device=args.device,
                log=PlanLog(args.log_every_n_steps, master=args.rank == 0, wandb=args.wandb),
            )
        ]
