"""OpenCLIP's training script with CLIP and OTCO in turns: Δ steps of one, then Δ steps of the other, on one model.

`python benchmarks/alternating.py FILE.json ARGUMENTS OF open_clip_train.main`; the first rank writes the seconds of
each block. Other work on the machine slows down both losses alike.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from open_clip.loss import ClipLoss
from open_clip_train import plugins
from open_clip_train.main import main
from torch import Tensor

from openclip_otco.method.loss import OTCOLoss
from openclip_otco.train.callback import PlanCacheCallback
from openclip_otco.train.plugin import OTCOPlugin
from openclip_otco.train.training_callback import TrainingCallback


class Alternating(OTCOLoss):
    """OTCO's loss while `turn` is `otco`, else CLIP's."""

    clip: ClipLoss
    turn = "otco"

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor] | Tensor:
        out: dict[str, Tensor] | Tensor
        out = super().forward(*args, **kwargs) if self.turn == "otco" else self.clip(*args, **kwargs)
        return out


class AlternatingPlugin(OTCOPlugin):
    """OTCO's plugin, whose callback works in every other block only."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    def create_loss(self, args: argparse.Namespace) -> OTCOLoss:
        loss = super().create_loss(args)
        loss.__class__ = Alternating
        loss.clip = ClipLoss(
            args.local_loss, args.gather_with_grad, cache_labels=True, rank=args.rank, world_size=args.world_size
        )
        return loss

    def create_callbacks(self, args: argparse.Namespace, loss: object) -> list[Any]:
        assert isinstance(loss, Alternating)
        (hook,) = super().create_callbacks(args, loss)
        return [Turns(hook, loss, args.otco_window, self.file if args.rank == 0 else None)]


class Turns(TrainingCallback):
    """Trains the blocks of steps with the two losses in turns, and times each block with its plan."""

    name = "otco"

    def __init__(self, hook: PlanCacheCallback, loss: Alternating, block: int, file: Path | None) -> None:
        self.hook, self.loss, self.block, self.file = hook, loss, block, file
        self.seconds: dict[str, list[float]] = {"clip": [], "otco": []}
        self.started = time.perf_counter()

    def on_train_start(self, *, step: int, total_steps: int, writer: object) -> None:
        self.hook.on_train_start(step=step, total_steps=total_steps)

    def on_step_end(self, *, step: int, **rest: Any) -> None:
        if self.loss.turn == "otco":
            self.hook.on_step_end(step=step, **rest)
        if (step + 1) % self.block:
            return
        now = time.perf_counter()
        self.seconds[self.loss.turn].append(now - self.started)
        self.loss.turn = "clip" if self.loss.turn == "otco" else "otco"
        self.started = now

    def on_train_end(self, *, step: int, writer: object) -> None:
        if self.file is not None:
            found = {"seconds": self.seconds, "made": self.hook.made, "skipped": self.hook.skipped}
            self.file.write_text(json.dumps({**found, "torch": torch.__version__}))


if __name__ == "__main__":
    plugin = AlternatingPlugin(Path(sys.argv[1]))
    load = plugins.load_plugins

    def load_with_turns(parser: argparse.ArgumentParser, losses: list[str]) -> list[str]:
        names = load(parser, losses)
        plugins._plugins[:] = [plugin if p.name == plugin.name else p for p in plugins._plugins]
        return names

    from open_clip_train import params

    params.load_plugins = load_with_turns
    main(sys.argv[2:])
