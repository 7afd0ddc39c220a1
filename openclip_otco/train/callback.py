"""Plan-caching callback: feeds the window, makes the plans, and sets those of the next step. No numerics here."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from openclip_otco.method.cache import PlanCache
from openclip_otco.method.loss import OTCOLoss
from openclip_otco.method.plan import TransportPlan
from openclip_otco.method.solver import PlanSolver
from openclip_otco.method.window import FeatureWindow


class ScalarWriter(Protocol):
    """What is used of TensorBoard's `SummaryWriter` for numbers."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...


class PlanWriter(ScalarWriter, Protocol):
    """What is used of TensorBoard's `SummaryWriter` for numbers and figures of plans."""

    def add_histogram(self, tag: str, values: Any, global_step: int) -> None: ...
    def add_image(self, tag: str, img_tensor: Any, global_step: int, dataformats: str) -> None: ...


class PlanCacheCallback:
    """Makes a plan from every window of features and hands cached plans to the loss.

    A plan that fails on one rank is skipped on all, logged and counted, and training goes on with the last good one.
    All ranks see the same gathered features and make each plan together, so they hold the same plans; with `--debug`
    each of them logs a digest of its own. A saved state is taken up by all ranks or by none.

    Args:
        loss: the loss to set plans of; its gathered features feed the window, and are released then.
        window: features of the last `Δ` steps.
        cache: the plans kept.
        solver: from features to plan.
        plans_per_step: `K >= 1`, plans drawn each step.
        warmup: share of all steps, in `[0, 1]`, before the plans act.
        max_age: windows after which a plan is dropped, at least the cache's size. A plan gets as old as that only if
            newer ones fail, and says little by then: without plans the loss is `ClipLoss`.
        device: where resumed plans go; made ones are where the features are.
        log_every: steps between two log lines, and between two figures for TensorBoard; every plan's scalars go there
            and to W&B.
        master: whether this process logs.
        wandb: whether to log to W&B.

    Raises:
        ValueError: `plans_per_step` below one, `warmup` outside `[0, 1]`, `max_age` below the cache's size.
    """

    name = "otco"

    def __init__(
        self,
        loss: OTCOLoss,
        window: FeatureWindow,
        cache: PlanCache,
        solver: PlanSolver,
        plans_per_step: int = 1,
        warmup: float = 0.02,
        max_age: int = 32,
        device: torch.device | str = "cpu",
        log_every: int = 100,
        master: bool = True,
        wandb: bool = False,
    ) -> None:
        if plans_per_step < 1:
            raise ValueError(f"plans_per_step must be at least 1; got {plans_per_step}")
        if not 0 <= warmup <= 1:
            raise ValueError(f"warmup must lie in [0, 1]; got {warmup}")
        if max_age < cache.size:
            raise ValueError(f"max_age must be at least the cache's size, {cache.size}; got {max_age}")
        self.loss, self.window, self.cache, self.solver = loss, window, cache, solver
        loss.keeps_gathered = True
        self.plans_per_step, self.warmup, self.max_age = plans_per_step, warmup, max_age
        self.device, self.log_every, self.master, self.wandb = device, log_every, master, wandb
        self.warmup_steps = 0
        self.made = 0
        self.skipped = 0
        self.steps = 0
        self.acted = 0  # steps in which plans changed the loss
        self._next_line = self._next_warning = 0
        self._failure: Exception | None = None

    def on_train_start(self, *, step: int, total_steps: int, writer: PlanWriter | None = None) -> None:
        """Called once with the first step to run and the number of all steps."""
        self.warmup_steps = math.ceil(self.warmup * total_steps)
        self._next_line = step
        self._set_plans(step)
        if self.master and step < total_steps:
            self._warn_of_idle_plans(step, total_steps)

    def on_step_end(
        self,
        *,
        step: int,
        epoch: int,
        features: Mapping[str, Tensor],
        losses: Mapping[str, Tensor],
        writer: PlanWriter | None = None,
    ) -> None:
        """Called after each optimizer step; every `Δ` of them make a plan."""
        self.steps += 1
        self.acted += self.loss.acting
        self._feed(features, step)
        try:
            plan = self._make_plan(step) if self.window.full else None
        except Exception as error:  # whatever it is, no plan is worth a run
            self.window.clear()
            self._failure = None
            self._skip(step, error)
        else:
            if plan is not None:
                self._log(plan, writer)
        self._set_plans(step + 1)

    def on_epoch_end(self, *, epoch: int, step: int, writer: PlanWriter | None = None) -> None:
        """Nothing to do: windows run on from epoch to epoch."""

    def on_train_end(self, *, step: int, writer: PlanWriter | None = None) -> None:
        if self.master and self.steps:
            logging.log(
                logging.INFO if self.acted else logging.WARNING,
                f"OTCO Plans: {self.made} made, {self.skipped} skipped, {self.window.dropped} non-finite pairs dropped"
                f"; plans acted in {self.acted} of {self.steps} steps",
            )

    def on_save_checkpoint(self) -> dict[str, Any]:
        """The state that goes into OpenCLIP's checkpoint: tensors and plain types only."""
        return {
            "cache": self.cache.state_dict(),
            "window": self.window.state_dict(),
            "made": self.made,
            "skipped": self.skipped,
            "steps": self.steps,
            "acted": self.acted,
        }

    def on_load_checkpoint(self, state: Mapping[str, Any] | None) -> None:
        """Takes up a saved state if all ranks have the same one; else the cache starts empty, and a line says so."""
        group = self.solver.group
        try:
            # Ranks of different plans or windows would part in their losses, or wait for each other.
            mine = group.attempt(lambda: self._take_up(state))
            first = group.first(lambda: mine.clone(), torch.zeros_like(mine))
            group.attempt(lambda: _check_equal(mine, first))
        except Exception as error:  # of another version, or broken: the weights are worth more than the plans
            self.cache.clear()
            self.window.clear()
            self.made = self.skipped = self.steps = self.acted = 0
            if self.master:
                usable = "not usable" if group.count == 1 else "not usable on all ranks"
                reason = f"{type(error).__name__}: {error}"
                logging.warning(f"=> OTCO state in the checkpoint is {usable}, starting with an empty one. {reason}")
            return
        if self.master and state is None:
            logging.info("=> no OTCO state in the checkpoint, starting with an empty plan cache")
        elif self.master:
            logging.info(f"=> resuming OTCO with {len(self.cache)} cached plans (steps {list(self.cache)})")

    def _take_up(self, state: Mapping[str, Any] | None) -> Tensor:
        """A number, a scalar, that is equal on two ranks only if they took up the same plans and window."""
        digest = "none"
        if state is not None:
            made, skipped = int(state["made"]), int(state["skipped"])
            # Older checkpoints do not have these.
            steps, acted = int(state.get("steps", 0)), int(state.get("acted", 0))
            self.cache.load_state_dict(state["cache"], self.device)
            self.window.load_state_dict(state["window"], self.device)
            self.made, self.skipped, self.steps, self.acted = made, skipped, steps, acted
            digest = self.cache.digest() + self.window.digest()
        # 48 bits: a float64, which ranks can send to each other, holds them exactly.
        number = int(hashlib.sha256(digest.encode()).hexdigest()[:12], 16)
        return torch.tensor(float(number), dtype=torch.float64, device=self.device)

    def _warn_of_idle_plans(self, step: int, total_steps: int) -> None:
        """Tells of settings that leave no step to the plans."""
        first_plan = step if len(self.cache) else step + self.window.steps - len(self.window)
        idle = "OTCO: No plan will act, and pairs count as with --loss clip:"
        if first_plan >= total_steps:
            logging.warning(
                f"{idle} --otco-window {self.window.steps} is not full before the last of {total_steps} steps. "
                "Choose a smaller window, or train longer."
            )
        if self.warmup_steps >= total_steps:
            logging.warning(
                f"{idle} --otco-warmup {self.warmup} takes all of {total_steps} steps. Choose a smaller share."
            )

    def _feed(self, features: Mapping[str, Tensor], step: int) -> None:
        try:
            gathered = self.loss.take_gathered() or (features["image_features"], features["text_features"])
            self.window.add(*gathered, step=step)
        except Exception as error:
            # Not the time to tell: the other ranks only listen when a plan is due.
            self._failure = self._failure or error
            self.window.skip()

    def _make_plan(self, step: int) -> TransportPlan:
        # It ends on all ranks as it ends on one: a plan that one of them lacks would part their losses.
        plan = self.solver.group.attempt(
            lambda: self.solver.solve(*self._window_features(), step=step, previous=self.cache.newest)
        )
        self.window.clear()
        self.made += 1
        self.cache.add(plan)
        if logging.getLogger().isEnabledFor(logging.DEBUG):
            logging.debug(f"OTCO Plan: digest {plan.digest()} at step {step} on rank {self.solver.group.rank}")
        return plan

    def _window_features(self) -> tuple[Tensor, Tensor]:
        if self._failure is not None:
            raise self._failure
        return self.window.features()

    def _skip(self, step: int, error: Exception) -> None:
        self.skipped += 1
        # A failure that lasts is told at the log's pace, not at every window.
        if self.master and step >= self._next_warning:
            self._next_warning = step + self.log_every
            reason = f"{type(error).__name__}: {error}"
            going_on = "with the last good one" if len(self.cache) else "without a plan, as with --loss clip"
            logging.warning(f"OTCO plan at step {step} skipped, going on {going_on}. {reason}")

    def _set_plans(self, step: int) -> None:
        had_plans = len(self.cache) > 0
        self.cache.drop_before(step - self.max_age * self.window.steps)
        if self.master and had_plans and not len(self.cache):
            logging.warning(
                f"OTCO: The last good plan is older than --otco-max-age {self.max_age} windows and acts no longer. "
                "Until a plan succeeds, pairs count as with --loss clip."
            )
        if step < self.warmup_steps:
            self.loss.set_plans((), None)
        else:
            self.loss.set_plans(self.cache.draw(self.plans_per_step, step), self.cache.newest)

    def _log(self, plan: TransportPlan, writer: PlanWriter | None) -> None:
        if not self.master:
            return
        metrics = dict(plan.diagnostics)
        # Of the oldest plan that a coming step may draw.
        metrics["cache_age"] = plan.step - min(self.cache)
        if self.loss.effective_share is not None:
            metrics["effective_share"] = float(self.loss.effective_share)
        if self.loss.matched_share is not None:
            metrics["matched_share"] = float(self.loss.matched_share)
        metrics["skipped"] = self.skipped
        due = plan.step >= self._next_line
        if due:
            self._next_line = plan.step + self.log_every
            logging.info(f"OTCO Plan: {self.made} (step {plan.step}, N {len(plan)}) " + _line(metrics))
        if writer is not None:
            for name, value in metrics.items():
                writer.add_scalar(f"train/otco_{name}", value, plan.step)
            if due:  # not for every plan: pictures would fill the disk
                self._add_figures(plan, writer)
        if self.wandb:
            import wandb

            wandb.log({f"train/otco_{name}": value for name, value in metrics.items()}, step=plan.step)

    def _add_figures(self, plan: TransportPlan, writer: PlanWriter) -> None:
        # Not at the top: it loads matplotlib, which a run without TensorBoard does without.
        from openclip_otco.train.figures import add_figures

        try:
            add_figures(writer, plan)
        except Exception as error:  # no picture is worth a run
            logging.warning(f"OTCO plan at step {plan.step}: no figures. {type(error).__name__}: {error}")


def _check_equal(mine: Tensor, first: Tensor) -> None:
    if not torch.equal(mine, first):
        raise ValueError("the state differs from that of the first rank")


def _line(metrics: Mapping[str, float]) -> str:
    """Metrics in the manner of OpenCLIP's loss line: `Name: value Name: value`."""
    values = {name: str(value) if isinstance(value, int) else f"{value:#.4g}" for name, value in metrics.items()}
    return " ".join(f"{name.replace('_', ' ').title()}: {value}" for name, value in values.items())
