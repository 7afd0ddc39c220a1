"""Command line options of a plugin's losses: their table, their checks, and checks that all losses share."""

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
    """Fills in the defaults of `loss`'s options. Ends the program on a bad value; warns of flags without effect."""
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
    """Ends the program if the arguments ask for something that no loss of this package can train."""
    loss = args.loss
    if "coca" in args.model.lower():
        end(parser, f"argument --loss: {loss} does not train CoCa models; choose a CLIP model or --loss clip")
    if getattr(args, "horovod", False):  # OpenCLIP 4 has it no longer
        end(parser, f"argument --horovod: not supported by --loss {loss}; use torchrun, or --loss clip")
    if args.distill_model is not None or args.distill_pretrained is not None:
        end(parser, f"argument --loss: {loss} does not distill; drop --distill-model or use --loss clip")
    for flag, data in (("--train-data", args.train_data), ("--val-data", args.val_data)):
        # OpenCLIP has the same rule: with `auto`, data whose name ends with .tar are shards.
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
    """Ends as `parser.error` does, but without the usage text: OpenCLIP's is so long that it hides the message."""
    parser.exit(2, f"{parser.prog}: error: {message}\n")
    raise AssertionError("parser.exit returned")
