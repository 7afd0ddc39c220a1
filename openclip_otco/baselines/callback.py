"""Momentum callback: after each optimizer step the encoders follow the model, and the step's keys enter the queue."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from openclip_otco.baselines.moco import MoCoLoss
from openclip_otco.baselines.momentum import MomentumEncoders
from openclip_otco.method.features import Features
from openclip_otco.train.training_callback import PlanWriter, TrainingCallback


class MomentumCallback(TrainingCallback):
    """Updates the momentum encoders, and MoCo's queue where there is one. The weights and the queue are equal on all
    ranks, and are saved.

    Args:
        name: of the loss; key of the state in the checkpoint.
        encoders: the momentum encoders.
        loss: the loss whose keys are queued; `None` where no queue is kept.
        device: where a resumed queue goes.
        world_size: number of ranks.
        master: whether this process logs.
    """

    def __init__(
        self,
        name: str,
        encoders: MomentumEncoders,
        loss: MoCoLoss | None = None,
        device: torch.device | str = "cpu",
        world_size: int = 1,
        master: bool = True,
    ) -> None:
        self.name, self.encoders, self.loss = name, encoders, loss
        self.device, self.world_size, self.master = device, world_size, master

    def on_step_end(
        self,
        *,
        step: int,
        epoch: int,
        losses: Mapping[str, Tensor],
        writer: PlanWriter | None = None,
        **_: object,
    ) -> None:
        """Moves the encoders towards the model, and puts the step's keys into the queue."""
        # All ranks have the same weights after a step, so their encoders stay equal without communication.
        self.encoders.update()
        if self.loss is not None and self.loss.keys is not None:
            self.loss.queue.add(gathered(self.loss.keys, self.world_size))

    def on_save_checkpoint(self) -> dict[str, Any]:
        """The state that goes into OpenCLIP's checkpoint: tensors and plain types only."""
        queue = {} if self.loss is None else {"queue": self.loss.queue.state_dict()}
        return {"encoders": self.encoders.state_dict(), **queue}

    def on_load_checkpoint(self, state: Mapping[str, Any] | None) -> None:
        """Loads a saved state. Without one, the encoders start as copies of the resumed model, and the log says so."""
        start = "starting with the model's copy" + ("" if self.loss is None else " and an empty queue")
        if state is None:
            if self.master:
                logging.info(f"=> no {self.name} state in the checkpoint, {start}")
            return
        try:
            self.encoders.load_state_dict(state["encoders"])
            if self.loss is not None:
                self.loss.queue.load_state_dict(state["queue"], self.device)
        except Exception as error:  # another version's state, or a broken one: the run goes on, without this state
            self.encoders.reset()
            if self.loss is not None:
                self.loss.queue.clear()
            if self.master:
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                logging.warning(f"=> {self.name} state in the checkpoint is not usable, {start}. {reason}")
            return
        if self.master:
            queued = "" if self.loss is None else f" and {len(self.loss.queue)} queued pairs"
            logging.info(f"=> resuming {self.name} with its momentum encoders{queued}")


def gathered(pairs: Features, world_size: int) -> Features:
    """The pairs of all ranks, in the order of the ranks, without gradient; with one rank, `pairs` unchanged."""
    if world_size == 1:
        return pairs
    # One collective for both: the towers give features of the same shape and type.
    own = torch.stack([side.detach() for side in pairs]).contiguous()
    parts = [torch.empty_like(own) for _ in range(world_size)]
    dist.all_gather(parts, own)
    return Features(*torch.cat(parts, dim=1))
