"""Arguments that several commands share, and the numbers that they take."""

from __future__ import annotations

import argparse
from pathlib import Path

from openclip_otco.models.folder import home
from openclip_otco.rules import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, SHARE, argument

# The types of arguments.
positive = argument(int, AT_LEAST_ONE)
count = argument(int, NOT_NEGATIVE)
positive_number = argument(float, POSITIVE)
share = argument(float, SHARE)


def add_frozen_features(parser: argparse.ArgumentParser) -> None:
    """Adds `--frozen-features [DIR]`, as in training. The folder that the run's `params.txt` names is not used: this
    file may come from a stranger, and must not decide where files are written."""
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
    """Adds `--caption-lines`. Without this flag a `txt` is one caption, as in OpenCLIP's training."""
    parser.add_argument(
        "--caption-lines",
        action="store_true",
        help="each line of a .txt is a caption, as clip-benchmark writes its shards (default: a .txt is one caption)",
    )
