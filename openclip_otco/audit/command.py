"""`openclip-otco audit`: finds the captions of a data set that do not belong to their images."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openclip_otco.errors import UserError
from openclip_otco.pages.markdown import markdown_table
from openclip_otco.runs.arguments import (
    add_caption_lines,
    add_frozen_features,
    count,
    positive,
    positive_number,
    share,
)

if TYPE_CHECKING:
    from openclip_otco.audit.settings import CleanSettings

OK, INCOMPLETE = 0, 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `audit` to `parser`."""
    parser.add_argument(
        "--checkpoint", metavar="CHECKPOINT", type=Path, help="runs/NAME/checkpoints/epoch_N.pt, if there is one"
    )
    parser.add_argument(
        "--towers",
        metavar="NAME",
        help="pretrained models that need no training on pairs: EfficientNet-Lite0-MiniLM-L6, or IMAGE+TEXT, a timm "
        "model and a Hugging Face model or its folder (default: the checkpoint's locked towers, else its whole model)",
    )
    parser.add_argument(
        "--data", metavar="SHARDS", required=True, help="webdataset shards as for --train-data, or a .csv or .tsv file"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder for table, gallery and parts")
    parser.add_argument("--model", help="model of the checkpoint (default: that of its run, from params.txt)")
    parser.add_argument("--precision", help="as in training (default: that of the run, else fp32)")
    parser.add_argument("--device", help="device to use (default: the run's, if this machine has it)")
    add_frozen_features(parser)
    add_caption_lines(parser)
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="images at once (%(default)s)")
    parser.add_argument("--workers", type=count, default=1, metavar="N", help="processes that decode (%(default)s)")
    parser.add_argument(
        "--ranks",
        type=positive,
        default=os.environ.get("WORLD_SIZE", "1"),
        metavar="N",
        help="processes that share the shards, each started with its --rank (default: torchrun's WORLD_SIZE, else 1)",
    )
    parser.add_argument(
        "--rank",
        type=count,
        default=os.environ.get("RANK", "0"),
        metavar="R",
        help="number of this process, from 0; the first one writes the table (default: torchrun's RANK, else 0)",
    )
    parser.add_argument("--csv-separator", default="\t", help="for csv data, which separator to use (tab)")
    parser.add_argument("--csv-img-key", default="filepath", help="for csv data, the column of paths (%(default)s)")
    parser.add_argument("--csv-caption-key", default="title", help="for csv data, the column of captions (%(default)s)")
    parser.add_argument(
        "--window", type=positive, default=4096, metavar="N", help="pairs judged at a time (%(default)s)"
    )
    parser.add_argument(
        "--epsilon",
        type=positive_number,
        default=0.03,
        help="entropic regularization of the plans, whatever the run's was (%(default)s)",
    )
    parser.add_argument("--top", type=positive, default=100, metavar="N", help="pairs in the gallery (%(default)s)")
    parser.add_argument(
        "--truth", metavar="FILE", type=Path, help="csv whose column key lists wrong pairs: prints the AUROC"
    )
    parser.add_argument(
        "--write-clean",
        metavar="DIR",
        type=Path,
        help="write the data without the dropped pairs, and a list of the kept keys; drops as many pairs as seem wrong",
    )
    least = parser.add_mutually_exclusive_group()
    least.add_argument(
        "--threshold", type=share, metavar="PROBABILITY", help="--write-clean drops the pairs with a lower probability"
    )
    least.add_argument(
        "--drop",
        type=_share_or_auto,
        metavar="SHARE",
        help="--write-clean drops this share, the worst pairs; auto (default): as many as seem to be wrong",
    )
    parser.add_argument(
        "--marks",
        metavar="FILE",
        type=Path,
        help="marks saved by gallery.html: --write-clean keeps or drops these pairs as they say, all others as judged",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command, and return its exit code.

    0: all is done. 1: --write-clean could not write all shards.

    Raises:
        UserError: something that was given cannot be used.
    """
    # Not at the top: they load torch, which `--help` does not need.
    from openclip_otco.audit.audit import run_audit
    from openclip_otco.audit.clean import KEYS
    from openclip_otco.audit.folder import AuditFolder
    from openclip_otco.audit.report import GALLERY, TABLE
    from openclip_otco.audit.score import Truth
    from openclip_otco.audit.settings import JudgeSettings
    from openclip_otco.audit.source import open_source

    with AuditFolder(args.out, args.rank, args.ranks).failure_noted():
        columns = (args.csv_img_key, args.csv_caption_key, args.csv_separator)
        facts = run_audit(
            open_source(args.data, *columns, args.caption_lines),
            args.out,
            JudgeSettings(
                checkpoint=args.checkpoint,
                towers=args.towers,
                model=args.model,
                precision=args.precision,
                device=args.device,
                frozen_features=args.frozen_features,
                window=args.window,
                epsilon=args.epsilon,
                top=args.top,
                batch_size=args.batch_size,
                workers=args.workers,
            ),
            clean=_clean_settings(args),
            truth=None if args.truth is None else Truth(args.truth),
            rank=args.rank,
            ranks=args.ranks,
        )
    if not facts:  # rank 0 has them
        return OK
    print(page(facts))
    print(f"\nAll pairs, the worst first: {args.out / TABLE}\nThe worst as a page: {args.out / GALLERY}")
    if args.write_clean is not None:
        print(f"{facts['clean_samples']} of {facts['images']} samples are kept: {args.write_clean}")
    if args.marks is not None:
        print(f"By their marks, {facts['marked_keep']} pairs are kept and {facts['marked_drop']} are dropped")
    if left := facts.get("not_written", []):
        print(
            f"openclip-otco audit: --write-clean {args.write_clean}: {len(left)} shards are no local files and "
            f"are not written, the first is {left[0]}; copy them here and audit again, or filter by {KEYS}",
            file=sys.stderr,
        )
        return INCOMPLETE
    return OK


def _clean_settings(args: argparse.Namespace) -> CleanSettings | None:
    from openclip_otco.audit.marks import Marks
    from openclip_otco.audit.settings import CleanSettings

    if args.write_clean is not None:
        marks = None if args.marks is None else Marks(args.marks)
        return CleanSettings(folder=args.write_clean, threshold=args.threshold, drop=args.drop, marks=marks)
    for flag, value in (("--threshold", args.threshold), ("--drop", args.drop), ("--marks", args.marks)):
        if value is not None:
            raise UserError(f"{flag}: says what --write-clean DIR leaves out; give it too, or neither")
    return None


def page(facts: dict[str, Any]) -> str:
    """The figures of an audit as Markdown."""
    models = [f"{facts['checkpoint']} ({facts['model']})"] if facts["checkpoint"] else []
    models += [facts["towers"]] if facts["towers"] else []
    lines = [
        f"{' and '.join(models)}, window {facts['window']}, epsilon {facts['epsilon']:g}",
        "",
        f"{facts['pairs']} pairs of {facts['images']} samples; {facts['unreadable']} could not be read, "
        f"{facts['captionless']} have no caption",
        "",
        f"Estimated: {100 * facts['wrong_share']:.1f} % of the pairs do not belong together (95 % interval: "
        f"{100 * facts['wrong_share_low']:.1f} to {100 * facts['wrong_share_high']:.1f} %)",
    ]
    known = {name.removeprefix("auroc_"): value for name, value in facts.items() if name.startswith("auroc_")}
    if known:
        lines += [
            "",
            f"AUROC against {facts['wrong']} wrong pairs:",
            "",
            markdown_table(list(known), [[f"{value:.4f}" for value in known.values()]]),
        ]
    return "\n".join(lines)


def _share_or_auto(text: str) -> float | None:
    return None if text == "auto" else share(text)
