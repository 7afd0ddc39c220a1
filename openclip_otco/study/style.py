"""Colours, markers and dashes of the pictures of studies: a loss looks the same in all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

from openclip_otco.errors import UserError

matplotlib.use("Agg")  # No display is needed, and none may be there.

from matplotlib import pyplot

# Okabe and Ito's colours, which differ under colour blindness; dashes and markers differ in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", "-.", ":")
# 9 markers and 7 colours have no common divisor, so that no two of 63 losses look the same.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")
_DPI = 150


def line_style(index: int) -> dict[str, Any]:
    """Colour and marker of the loss that stands at place `index` of its study."""
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


def picture(path: Path, draw: bool, make: Callable[[], Any]) -> str:
    """The path, from the page, of the PNG at `path`.

    Args:
        path: in the folder that the page is made from.
        draw: draw the picture anew.
        make: gives the figure.

    Raises:
        UserError: the picture is missing and `draw` is false.
    """
    if draw:
        figure = make()
        figure.savefig(path, dpi=_DPI)
        pyplot.close(figure)
    if not path.is_file():
        raise UserError(f"{path} is missing; give --figures")
    return f"{path.parent.name}/{path.name}"
