"""What OpenCLIP's training script calls while it trains. A callback overrides what concerns it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor


class ScalarWriter(Protocol):
    """The part of TensorBoard's `SummaryWriter` that writes numbers."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """A number, at a step."""


class PlanWriter(ScalarWriter, Protocol):
    """The part of TensorBoard's `SummaryWriter` that writes numbers and figures of plans."""

    def add_histogram(self, tag: str, values: Any, global_step: int) -> None:
        """Values, at a step."""

    def add_image(self, tag: str, img_tensor: Any, global_step: int, dataformats: str) -> None:
        """A picture, at a step."""


class TrainingCallback:
    """A callback that does nothing; the base class of all callbacks of this package.

    `open_clip_train.plugins.Callback` says when each method is called. It cannot be the base class, because its module
    exists only where OpenCLIP is patched.

    Steps are optimizer steps and count from 0, as epochs do. `losses` are the terms of the step's loss, by their names
    in the log, and `writer` is TensorBoard's, `None` without one.

    Attributes:
        name: key of the callback's state in OpenCLIP's checkpoint.
    """

    name = ""

    def on_load_checkpoint(self, state: Mapping[str, Any] | None) -> None:
        """Loads what `on_save_checkpoint` returned; `None`: the checkpoint has no state of this callback."""

    def on_train_start(self, *, step: int, total_steps: int, writer: PlanWriter | None = None) -> None:
        """Called once, with the first step to run and the number of all steps."""

    def on_step_end(
        self,
        *,
        step: int,
        epoch: int,
        losses: Mapping[str, Tensor],
        writer: PlanWriter | None = None,
        **_: object,
    ) -> None:
        """Called after each optimizer step. OpenCLIP 3 gives the features too, OpenCLIP 4 does not."""

    def on_epoch_end(self, *, epoch: int, step: int, writer: PlanWriter | None = None) -> None:
        """Called after each epoch, before its checkpoint is saved."""

    def on_train_end(self, *, step: int, writer: PlanWriter | None = None) -> None:
        """Called once, after the last epoch."""

    def on_save_checkpoint(self) -> dict[str, Any]:
        """The state that goes into OpenCLIP's checkpoint: tensors and plain types only."""
        return {}
