"""Arguments that several commands share: how a checkpoint's towers remember, and what a caption is."""

from __future__ import annotations

import argparse
from pathlib import Path

from openclip_otco.models import home


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
