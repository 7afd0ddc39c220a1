"""Arguments that several commands share, and the numbers that arguments take."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from openclip_otco.models.folder import home


def add_frozen_features(parser: argparse.ArgumentParser) -> None:
    """`--frozen-features [DIR]`, as the training has it. The folder in the run's `params.txt` is not taken: it is data,
    and may be a stranger's."""
    parser.add_argument(
        "--frozen-features",
        type=Path,
        nargs="?",
        const=home() / "features",
        metavar="DIR",
        help="for runs with --frozen-features: take features of locked towers from this folder, and keep new ones in "
        "it (without DIR: %(const)s; without the flag nothing is remembered)",
    )


def add_caption_lines(parser: argparse.ArgumentParser) -> None:
    """`--caption-lines`, without which a `txt` is one caption, as for OpenCLIP's training."""
    parser.add_argument(
        "--caption-lines",
        action="store_true",
        help="each line of a .txt is a caption, as clip-benchmark writes its shards (default: a .txt is one caption)",
    )


def positive(text: str) -> int:
    """A whole number of 1 or more, as the `type` of an argument."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def count(text: str) -> int:
    """A whole number of 0 or more."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return number


def positive_number(text: str) -> float:
    """A number above 0, and finite."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError("must be a positive number")
    return number


def share(text: str) -> float:
    """A number from 0 to 1."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError("must be between 0 and 1")
    return number
