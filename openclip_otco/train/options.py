"""Command line options of a plugin's losses: their table, their checks, and what none of the losses can train."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from openclip_otco.data.shard_check import caption_problem
from openclip_otco.rules import ANY, Rule


@dataclass(frozen=True)
class Option:
    """One flag of a loss: its default, what it means, and what it must be."""

    flag: str
    default: Any
    help: str
    rule: Rule = ANY
    choices: tuple[str, ...] | None = None

    @property
    def dest(self) -> str:
        """Its name among the parsed arguments."""
        return self.flag.removeprefix("--").replace("-", "_")


def add_options(group: argparse._ArgumentGroup, options: Sequence[Option]) -> None:
    """Adds the flags to a group of OpenCLIP's parser; their defaults come later, in `check_options`."""
    for option in options:
        # No argparse default: `check_options` must see which flags were given.
        group.add_argument(
            option.flag,
            type=type(option.default),
            default=None,
            choices=option.choices,
            help=f"{option.help} (default: {option.default})",
        )


def check_options(
    parser: argparse.ArgumentParser, args: argparse.Namespace, options: Sequence[Option], loss: str
) -> None:
    """Fills in the defaults of the options of `loss`; ends on a bad value, and warns of one that has no effect."""
    given = [option for option in options if getattr(args, option.dest) is not None]
    for option in options:
        if option not in given:
            setattr(args, option.dest, option.default)
    if args.loss != loss:
        if given:
            flags = ", ".join(option.flag for option in given)
            warnings.warn(f"{flags} given without --loss {loss}: no effect with --loss {args.loss}", stacklevel=2)
        return
    for option in given:
        value = getattr(args, option.dest)
        if not option.rule.accepts(value):
            end(parser, f"argument {option.flag}: must be {option.rule.text}, got {value}")


def check_run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends on what none of the package's losses can train."""
    loss = args.loss
    if "coca" in args.model.lower():
        end(parser, f"argument --loss: {loss} does not train CoCa models; choose a CLIP model or --loss clip")
    if getattr(args, "horovod", False):  # OpenCLIP 4 has it no longer
        end(parser, f"argument --horovod: not supported by --loss {loss}; use torchrun, or --loss clip")
    if args.distill_model is not None or args.distill_pretrained is not None:
        end(parser, f"argument --loss: {loss} does not distill; drop --distill-model or use --loss clip")
    for flag, data in (("--train-data", args.train_data), ("--val-data", args.val_data)):
        # OpenCLIP's own rule for what `auto` takes for shards.
        shards = args.dataset_type == "webdataset" or (args.dataset_type == "auto" and str(data).endswith(".tar"))
        if data and shards and (problem := caption_problem(data)):
            end(parser, f"argument {flag}: {problem}")


def clip_options(args: argparse.Namespace) -> dict[str, Any]:
    """What OpenCLIP gives to each `ClipLoss`, from its own arguments."""
    return {
        "local_loss": args.local_loss,
        "gather_with_grad": args.gather_with_grad,
        "cache_labels": True,
        "rank": args.rank,
        "world_size": args.world_size,
    }


def check_float64(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends on a device that cannot make plans: parts of them are computed in float64."""
    if args.device.partition(":")[0] == "mps":
        end(parser, f"argument --device: mps has no float64, which --loss {args.loss} needs; use cpu or cuda")


def end(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """Ends as `parser.error` does, without the usage: OpenCLIP's fills a screen, above which the message is lost."""
    parser.exit(2, f"{parser.prog}: error: {message}\n")
    raise AssertionError("parser.exit returned")
