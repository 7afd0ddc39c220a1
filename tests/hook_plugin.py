"""Plugins for test_hook.py, which installs them beside OpenCLIP: a good one, and some that can not be loaded.

They inherit from nothing and import torch late, as a plugin may.
"""

import argparse
import itertools
import json
import os
import signal
import time
from pathlib import Path
from typing import Any


class ExamplePlugin:
    name = "example"
    losses = ("example",)

    def add_arguments(self, group: Any) -> None:
        group.add_argument("--example-scale", type=float, help="Factor of the loss (default: 1).")
        group.add_argument("--example-record", type=Path, help="Where callbacks write down what they are called with.")

    def check_args(self, parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
        if args.example_scale is None:
            args.example_scale = 1.0
        if args.example_scale < 0:
            parser.error("--example-scale must not be negative")

    def prepare_model(self, args: argparse.Namespace, model: Any) -> None:
        if args.example_record:
            locked = not model.visual.conv1.weight.requires_grad
            Recorder(args, None).record("prepare_model", kind=type(model).__name__, locked=locked)
        if args.loss in self.losses:
            model.register_forward_hook(self.add_echo)

    @staticmethod
    def add_echo(model: Any, inputs: Any, output: Any) -> Any:
        return {**output, "echo": output["image_features"].detach()} if model.training else output

    def create_loss(self, args: argparse.Namespace) -> Any:
        import open_clip

        class ScaledClipLoss(open_clip.ClipLoss):
            def forward(self, *arguments: Any, echo: Any, **options: Any) -> Any:
                assert echo.equal(options["image_features"].detach())
                losses = super().forward(*arguments, **options)
                return {"scaled_loss": args.example_scale * losses["contrastive_loss"]}

        return ScaledClipLoss(rank=args.rank, world_size=args.world_size)

    def create_callbacks(self, args: argparse.Namespace, loss: Any) -> list[Any]:
        return [Recorder(args, loss)] if args.example_record else []


class Recorder:
    name = "recorder"
    SECONDS = 0.1

    def __init__(self, args: argparse.Namespace, loss: Any) -> None:
        self.file = args.example_record.with_suffix(f".{args.rank}")
        self.folder = Path(args.checkpoint_path)
        self.loss = type(loss).__name__
        self.steps = 0

    def record(self, event: str, **values: Any) -> None:
        if "writer" in values:
            values["writer"] = values["writer"] is not None
        # Only the first rank makes the folder, and a model may be prepared before that.
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            file.write(json.dumps({"event": event, **values}) + "\n")

    def on_load_checkpoint(self, state: dict[str, Any] | None) -> None:
        self.steps = state["steps"] if state else 0
        self.record("load", state=None if state is None else {**state, "tensor": state["tensor"].tolist()})

    def on_train_start(self, **values: Any) -> None:
        self.record("train_start", loss=self.loss, **values)

    def on_step_end(self, *, features: dict[str, Any], losses: dict[str, Any], **values: Any) -> None:
        self.steps += 1
        assert not any(tensor.requires_grad for tensor in (*features.values(), *losses.values()))
        shapes = {name: list(tensor.shape) for name, tensor in features.items()}
        self.record("step_end", shapes=shapes, losses={k: v.item() for k, v in losses.items()}, **values)
        time.sleep(self.SECONDS)

    def on_epoch_end(self, *, epoch: int, **values: Any) -> None:
        results = self.folder / "results.jsonl"
        evaluations = len(results.read_text().splitlines()) if results.exists() else 0
        saved = (self.folder / f"epoch_{epoch}.pt").exists()
        self.record("epoch_end", epoch=epoch, evaluations=evaluations, saved=saved, **values)

    def on_save_checkpoint(self) -> dict[str, Any]:
        import torch

        self.record("save")
        return {"steps": self.steps, "tensor": torch.arange(self.steps)}

    def on_train_end(self, **values: Any) -> None:
        self.record("train_end", **values)


class ConflictingPlugin(ExamplePlugin):
    name = "conflicting"
    losses = ("conflicting",)

    def add_arguments(self, group: Any) -> None:
        group.add_argument("--conflicting-first")
        group.add_argument("--lr")


class SiglipPlugin(ExamplePlugin):
    name = "thief"
    losses = ("siglip",)

    def add_arguments(self, group: Any) -> None:
        group.add_argument("--thief")


class TwinPlugin(SiglipPlugin):
    name = "twin"
    losses = ("example",)


class UnfinishedPlugin(ExamplePlugin):
    def __init__(self) -> None:
        raise RuntimeError("not today")


def DyingPlugin() -> Any:
    """OTCO on several ranks, of which the second one is killed in the middle of its second plan."""
    from openclip_otco.method.solver import PlanSolver
    from openclip_otco.ot.group import DistributedGroup
    from openclip_otco.train.plugin import OTCOPlugin

    solve, total = PlanSolver.solve, DistributedGroup.total
    plans: list[list[Any]] = []

    def counting_solve(self: Any, *arguments: Any, **options: Any) -> Any:
        plans.append([])
        return solve(self, *arguments, **options)

    def dying_total(self: Any, part: Any) -> Any:
        if plans:
            plans[-1].append(part)
            if self.rank == 1 and len(plans) == 2 and len(plans[-1]) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
        return total(self, part)

    PlanSolver.solve, DistributedGroup.total = counting_solve, dying_total
    return OTCOPlugin()


def ListeningPlugin() -> Any:
    """OTCO, and a model that writes down the tokens of each caption that it is trained on, a line each.

    `--remove FILE --remove-at BATCH` removes a file before that batch.
    """
    from openclip_otco.train.plugin import OTCOPlugin

    class Listening(OTCOPlugin):
        def add_arguments(self, group: Any) -> None:
            super().add_arguments(group)
            group.add_argument("--remove", type=Path)
            group.add_argument("--remove-at", type=int)

        def prepare_model(self, args: argparse.Namespace, model: Any) -> None:
            batches = itertools.count()

            def listen(model: Any, inputs: Any) -> None:
                if next(batches) == args.remove_at:
                    args.remove.unlink()
                with (Path(args.logs) / args.name / "captions.jsonl").open("a") as lines:
                    lines.writelines(json.dumps(row) + "\n" for row in inputs[1].tolist())

            model.register_forward_pre_hook(listen)

    return Listening()
