"""What a training reports about its plans: in OpenCLIP's log, in TensorBoard and in Weights & Biases."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from openclip_otco.method.cache import PlanCache
from openclip_otco.method.exchange import PlanExchange
from openclip_otco.method.plan import TransportPlan
from openclip_otco.train.training_callback import PlanWriter


class PlanLog:
    """Reports plans that were made, plans that failed, and settings with which no plan can act.

    Args:
        every: steps between two lines of the log, and between two figures for TensorBoard. The scalars of every plan go
            to TensorBoard and to Weights & Biases. If plan after plan fails, a warning comes only every so many steps.
        master: whether this process reports anything; on other ranks it is `False`.
        wandb: whether to log to Weights & Biases.
    """

    def __init__(self, every: int = 100, master: bool = True, wandb: bool = False) -> None:
        self.every, self.master, self.wandb = every, master, wandb
        self._next_line = self._next_warning = 0

    def start(self, step: int) -> None:
        """The first plan from this step on has a line."""
        self._next_line = step

    def info(self, line: str) -> None:
        """Logs a line, if this process tells anything."""
        if self.master:
            logging.info(line)

    def warning(self, line: str) -> None:
        """Logs a line as a warning, if this process tells anything."""
        if self.master:
            logging.warning(line)

    def failed(self, step: int, error: Exception, cache: PlanCache) -> None:
        """The plan of this step failed with `error`; training goes on with what the cache holds."""
        if step >= self._next_warning:
            self._next_warning = step + self.every
            going_on = "with the last good one" if len(cache) else "without a plan, as with --loss clip"
            reason = f"{type(error).__name__}: {error}"
            self.warning(f"OTCO plan at step {step} skipped, going on {going_on}. {reason}")

    def no_plan_will_act(self, why: str) -> None:
        """Warns that no step of this run will use a plan; `why` names the flag, and says what to choose."""
        self.warning(f"OTCO: No plan will act, and pairs count as with --loss clip: {why}")

    def succeeded(
        self,
        plan: TransportPlan,
        cache: PlanCache,
        exchange: PlanExchange,
        *,
        made: int,
        skipped: int,
        writer: PlanWriter | None = None,
    ) -> None:
        """There is a new plan.

        Args:
            plan: the new one.
            cache: with it, the plans that a coming step may draw.
            exchange: what the loss found in the last step.
            made, skipped: how many plans were made, and failed, so far.
            writer: of TensorBoard, if there is one.
        """
        if not self.master:
            return
        metrics = {**plan.diagnostics, **_metrics(plan, cache, exchange), "skipped": skipped}
        due = plan.step >= self._next_line
        if due:
            self._next_line = plan.step + self.every
            logging.info(f"OTCO Plan: {made} (step {plan.step}, N {len(plan)}) " + _line(metrics))
        if writer is not None:
            for name, value in metrics.items():
                writer.add_scalar(f"train/otco_{name}", value, plan.step)
            if due:  # not for every plan: pictures would fill the disk
                _add_figures(plan, writer)
        if self.wandb:
            import wandb

            wandb.log({f"train/otco_{name}": value for name, value in metrics.items()}, step=plan.step)


def _metrics(plan: TransportPlan, cache: PlanCache, exchange: PlanExchange) -> dict[str, float]:
    # The age is that of the oldest plan that a coming step may draw.
    metrics: dict[str, float] = {"cache_age": plan.step - min(cache)}
    if exchange.effective_share is not None:
        metrics["effective_share"] = float(exchange.effective_share)
    if exchange.matched_share is not None:
        metrics["matched_share"] = float(exchange.matched_share)
    return metrics


def _add_figures(plan: TransportPlan, writer: PlanWriter) -> None:
    # Not at the top: it loads matplotlib, which a run without TensorBoard does not need.
    from openclip_otco.train.figures import add_figures

    try:
        add_figures(writer, plan)
    except Exception as error:  # no error of a figure may stop the training
        logging.warning(f"OTCO plan at step {plan.step}: no figures. {type(error).__name__}: {error}")


def _line(metrics: Mapping[str, float]) -> str:
    """Metrics in the manner of OpenCLIP's loss line: `Name: value Name: value`."""
    values = {name: str(value) if isinstance(value, int) else f"{value:#.4g}" for name, value in metrics.items()}
    return " ".join(f"{name.replace('_', ' ').title()}: {value}" for name, value in values.items())
