"""`openclip-otco inspect`: one page on a run, finished or not."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openclip_otco.errors import UserError
from openclip_otco.runs.arguments import count, positive

if TYPE_CHECKING:
    from openclip_otco.inspect.saved import SavedRun

OK = 0
PAGE = "inspect.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `inspect` to `parser`."""
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="folder of a run: LOGS/NAME of the training")
    parser.add_argument(
        "--data", metavar="SHARDS", help="webdataset shards to show pairs of (default: --train-data of the run)"
    )
    parser.add_argument("--pairs", type=positive, default=512, metavar="N", help="pairs to couple (%(default)s)")
    parser.add_argument("--samples", type=positive, default=6, metavar="N", help="pairs to show (%(default)s)")
    parser.add_argument(
        "--negatives", type=positive, default=4, metavar="N", help="hardest negatives of each sample (%(default)s)"
    )
    parser.add_argument("--precision", help="as in training (default: that of the run)")
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="images at once (%(default)s)")
    parser.add_argument("--workers", type=count, default=1, metavar="N", help="processes that decode (%(default)s)")
    parser.add_argument("--device", help="device to use (default: the run's, if this machine has it)")
    parser.add_argument("--out", metavar="FILE", type=Path, help=f"write the page here (default: RUN_DIR/{PAGE})")


def run(args: argparse.Namespace) -> int:
    """Do what `args` ask for, and return 0.

    Raises:
        UserError: as `inspect`.
    """
    print(inspect(args))
    return OK


def inspect(args: argparse.Namespace) -> Path:
    """Write the page of the run `args.run_dir`. The page leaves out what cannot be read, and says so.

    Returns:
        The page's file.

    Raises:
        UserError: the folder holds no run, shards that were asked for are missing, or the page cannot be written.
    """
    # Not at the top: they load torch, which `--help` does without.
    from openclip_otco.data import samples
    from openclip_otco.inspect.history import read_history
    from openclip_otco.inspect.plan_section import plan_section
    from openclip_otco.inspect.report import curves, facts
    from openclip_otco.inspect.saved import newest_checkpoint
    from openclip_otco.pages.page import write_page
    from openclip_otco.runs import checkpoint

    folder: Path = args.run_dir
    if not any((folder / name).exists() for name in ("params.txt", "out.log", "checkpoints", "tensorboard")):
        raise UserError(f"RUN_DIR {folder}: no run of OpenCLIP: name the folder that holds its params.txt")
    if args.data is not None:
        samples.shards(args.data)
    params = checkpoint.params(folder / "checkpoints" / "epoch_N.pt")
    history, saved = read_history(folder, params), newest_checkpoint(folder)
    charts, missing = curves(history)
    section = plan_section(saved, lambda: _pairs(args, saved, params), params, args.samples, args.negatives)
    path: Path = args.out or folder / PAGE
    try:
        write_page(
            path,
            "inspect",
            title=f"Run {params.get('name') or folder.resolve().name}",
            facts=facts(params, history, saved),
            charts=charts,
            missing=missing,
            sources=history.sources,
            plan=section,
        )
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written: {error.strerror}; name another file") from error
    return path


def _pairs(args: argparse.Namespace, saved: SavedRun | None, params: Mapping[str, Any]) -> Any:
    """Pairs of `--data`, or of the run's own shards, encoded with the checkpoint's weights.

    Raises:
        UserError: there are none; the message says what to do about it.
    """
    from openclip_otco.data import samples
    from openclip_otco.data.shard import is_local
    from openclip_otco.inspect.pairs import encode_pairs
    from openclip_otco.runs import checkpoint

    data = args.data or params.get("train_data")
    # A stranger may have written the run's folder, and a `pipe:` in it is a command.
    if args.data is None and isinstance(data, str) and not all(map(is_local, samples.expanded(data))):
        raise UserError(f"The run's --train-data {data} is no local file. Name shards to show by --data")
    if saved is None:
        raise UserError(
            "There is no checkpoint yet. OpenCLIP saves one after each --save-frequency epochs and at the end; "
            "run this command again then"
        )
    if not isinstance(data, str) or ".csv" in data or params.get("dataset_type") in ("csv", "synthetic"):
        raise UserError("The run was not trained on webdataset shards. Name some of its kind by --data")
    try:
        encoder = checkpoint.load(saved.checkpoint, precision=args.precision, device=args.device)
        return encode_pairs(encoder, data, args.pairs, args.batch_size, args.workers)
    except UserError as error:
        raise UserError(f"{error}. If the shards moved, name them by --data") from error
