"""Plan-caching callback: feeds the window, makes the plans, and sets those of the next step. No numerics here."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from openclip_otco.method.cache import PlanCache
from openclip_otco.method.exchange import PlanExchange
from openclip_otco.method.plan import TransportPlan
from openclip_otco.method.solver import PlanSolver
from openclip_otco.method.window import FeatureWindow
from openclip_otco.rules import AT_LEAST_ONE, SHARE
from openclip_otco.train.plan_log import PlanLog
from openclip_otco.train.training_callback import PlanWriter, TrainingCallback


class PlanCacheCallback(TrainingCallback):
    """Makes a plan from every window of features and hands cached plans to the loss.

    A plan that fails on one rank is skipped on all, logged and counted, and training goes on with the last good one.
    All ranks see the same gathered features and make each plan together, so they hold the same plans; with `--debug`
    each of them logs a digest of its own. A saved state is taken up by all ranks or by none.

    Args:
        exchange: that of the loss. The callback sets the plans in it, and takes the global batch's features from it.
        window: features of the last `Δ` steps.
        cache: the plans kept.
        solver: from features to plan.
        plans_per_step: `K >= 1`, plans drawn each step.
        warmup: share of all steps, in `[0, 1]`, before the plans act.
        max_age: age, in windows, after which a plan is dropped; at least the cache's size. A plan gets so old only if
            newer ones fail, and then it says little about the model. Without plans, pairs and negatives have equal
            weights.
        device: device of the plans that a checkpoint holds; new plans are on the device of their features.
        log: writes the lines about plans.

    Raises:
        ValueError: `plans_per_step` below one, `warmup` outside `[0, 1]`, `max_age` below the cache's size.
    """

    name = "otco"

    def __init__(
        self,
        exchange: PlanExchange,
        window: FeatureWindow,
        cache: PlanCache,
        solver: PlanSolver,
        plans_per_step: int = 1,
        warmup: float = 0.02,
        max_age: int = 32,
        device: torch.device | str = "cpu",
        log: PlanLog | None = None,
    ) -> None:
        AT_LEAST_ONE.check(plans_per_step=plans_per_step)
        SHARE.check(warmup=warmup)
        if max_age < cache.size:
            raise ValueError(f"max_age must be at least the cache's size, {cache.size}; got {max_age}")
        self.exchange, self.window, self.cache, self.solver = exchange, window, cache, solver
        exchange.keeps_features = True
        self.plans_per_step, self.warmup, self.max_age = plans_per_step, warmup, max_age
        self.device, self.log = device, log or PlanLog()
        self.warmup_steps = 0
        self.made = 0
        self.skipped = 0
        self.steps = 0
        self.acted = 0  # steps in which plans changed the loss
        self._next_step: int | None = None  # as the run counted that has saved the plans
        self._failure: Exception | None = None

    def on_train_start(self, *, step: int, total_steps: int, writer: PlanWriter | None = None) -> None:
        """Called once with the first step to run and the number of all steps."""
        self.warmup_steps = math.ceil(self.warmup * total_steps)
        self.log.start(step)
        if self._next_step is not None:
            # OpenCLIP counts steps from the epoch: with another batch size or number of ranks, it goes on elsewhere.
            self.cache.shift(step - self._next_step)
        self._next_step = step
        self._set_plans(step)
        if step < total_steps:
            self._warn_of_idle_plans(step, total_steps)

    def on_step_end(
        self,
        *,
        step: int,
        epoch: int,
        losses: Mapping[str, Tensor],
        writer: PlanWriter | None = None,
        **_: object,
    ) -> None:
        """Called after each optimizer step; after every `Δ` steps, a plan is made of their features."""
        self.steps += 1
        self._next_step = step + 1
        self.acted += self.exchange.plans_acted
        self._feed(step)
        try:
            plan = self._make_plan(step) if self.window.full else None
        except Exception as error:  # no error of a plan may stop the training
            self.window.clear()
            self._failure = None
            self.skipped += 1
            self.log.failed(step, error, self.cache)
        else:
            if plan is not None:
                counts = {"made": self.made, "skipped": self.skipped}
                self.log.succeeded(plan, self.cache, self.exchange, **counts, writer=writer)
        self._set_plans(step + 1)

    def on_train_end(self, *, step: int, writer: PlanWriter | None = None) -> None:
        """Logs how many plans were made, and in how many steps they acted."""
        if self.steps:
            tell = self.log.info if self.acted else self.log.warning
            tell(
                f"OTCO Plans: {self.made} made, {self.skipped} skipped, {self.window.dropped} non-finite pairs dropped"
                f"; plans acted in {self.acted} of {self.steps} steps"
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
            "next_step": self._next_step,
        }

    def on_load_checkpoint(self, state: Mapping[str, Any] | None) -> None:
        """Loads a saved state if all ranks have the same one; else starts with an empty cache, and logs so."""
        group = self.solver.group
        try:
            # Ranks with different plans or windows would compute different losses, or wait for each other.
            mine = group.attempt(lambda: self._take_up(state))
            first = group.first(lambda: mine.clone(), torch.zeros_like(mine))
            group.attempt(lambda: _check_equal(mine, first))
        except Exception as error:  # another version's state, or a broken one: the run goes on, without these plans
            self.cache.clear()
            self.window.clear()
            self.made = self.skipped = self.steps = self.acted = 0
            self._next_step = None
            usable = "not usable" if group.count == 1 else "not usable on all ranks"
            reason = f"{type(error).__name__}: {error}"
            self.log.warning(f"=> OTCO state in the checkpoint is {usable}, starting with an empty one. {reason}")
            return
        if state is None:
            self.log.info("=> no OTCO state in the checkpoint, starting with an empty plan cache")
        else:
            self.log.info(f"=> resuming OTCO with {len(self.cache)} cached plans (steps {list(self.cache)})")

    def _take_up(self, state: Mapping[str, Any] | None) -> Tensor:
        """Loads `state`; returns a scalar that is equal on two ranks only if they loaded the same plans and window."""
        digest = "none"
        if state is not None:
            made, skipped = int(state["made"]), int(state["skipped"])
            # Older checkpoints do not have these.
            steps, acted = int(state.get("steps", 0)), int(state.get("acted", 0))
            next_step = None if state.get("next_step") is None else int(state["next_step"])
            self.cache.load_state_dict(state["cache"], self.device)
            self.window.load_state_dict(state["window"], self.device)
            self.made, self.skipped, self.steps, self.acted = made, skipped, steps, acted
            self._next_step = next_step
            digest = self.cache.digest() + self.window.digest()
        # 48 bits: a float64, which ranks can send to each other, holds them exactly.
        number = int(hashlib.sha256(digest.encode()).hexdigest()[:12], 16)
        return torch.tensor(float(number), dtype=torch.float64, device=self.device)

    def _warn_of_idle_plans(self, step: int, total_steps: int) -> None:
        first_plan = step if len(self.cache) else step + self.window.steps - len(self.window)
        if first_plan >= total_steps:
            self.log.no_plan_will_act(
                f"--otco-window {self.window.steps} is not full before the last of {total_steps} steps. "
                "Choose a smaller window, or train longer."
            )
        if self.warmup_steps >= total_steps:
            self.log.no_plan_will_act(
                f"--otco-warmup {self.warmup} takes all of {total_steps} steps. Choose a smaller share."
            )

    def _feed(self, step: int) -> None:
        try:
            batch = self.exchange.take_features()
            if batch is None:
                raise RuntimeError("the loss was not called in this step")
            self.window.add(*batch, step=step)
        except Exception as error:
            # The error is raised later, when the plan is due: only then do the other ranks wait for news of a failure.
            self._failure = self._failure or error
            self.window.skip()

    def _make_plan(self, step: int) -> TransportPlan:
        # If it fails on one rank, it fails on all: ranks with different plans would compute different losses.
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

    def _set_plans(self, step: int) -> None:
        had_plans = len(self.cache) > 0
        self.cache.drop_before(step - self.max_age * self.window.steps)
        if had_plans and not len(self.cache):
            self.log.warning(
                f"OTCO: The last good plan is older than --otco-max-age {self.max_age} windows and acts no longer. "
                "Until a plan succeeds, pairs count as with --loss clip."
            )
        if step < self.warmup_steps:
            self.exchange.set_plans((), None)
        else:
            self.exchange.set_plans(self.cache.draw(self.plans_per_step, step), self.cache.newest)


def _check_equal(mine: Tensor, first: Tensor) -> None:
    if not torch.equal(mine, first):
        raise ValueError("the state differs from that of the first rank")
