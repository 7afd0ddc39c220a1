"""A reliability diagram: the probability that a pair is right as the audit says it, against how often that is so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from openclip_otco.errors import UserError


def reliability_picture(path: Path, lines: Sequence[Mapping[str, Any]], draw: bool) -> str:
    """The path, from the page, of the picture that lies beside the list of measurements at `path`.

    Args:
        path: of the list; the picture is `NAME-reliability.png` for `NAME.jsonl`.
        lines: measurements of the list, one curve each. `data` is its name, and `wrong` the share of wrong pairs. Each
            of `bins` is `[said, right, pairs]`: the mean probability that the audit says and the share of right pairs,
            both in `[0, 1]`, and the number of pairs.
        draw: draw the picture anew.

    Raises:
        UserError: a line has no bins, or the picture is missing and `draw` is false.
    """
    picture = path.with_name(f"{path.stem}-reliability.png")
    if not lines or not all("bins" in line for line in lines):
        raise UserError(f"{path}: a reliability diagram needs lines with bins, and only those")
    # Not at the top: it loads matplotlib, which a page without --figures does without.
    from openclip_otco.study import style

    return style.picture(picture, draw, lambda: reliability_figure(lines))


def reliability_figure(lines: Sequence[Mapping[str, Any]]) -> Any:
    """The diagram of DeGroot and Fienberg (*The comparison and evaluation of forecasters*, The Statistician 32, 1983).

    Data without wrong pairs have no curve, as all of their pairs are right.
    """
    from openclip_otco.study.style import COLOURS, MARKERS, pyplot

    planted = sorted((line for line in lines if line["wrong"]), key=lambda line: str(line["data"]))
    figure, axis = pyplot.subplots(figsize=(5.5, 5), layout="constrained")
    axis.plot([0, 100], [0, 100], color="grey", linestyle="--", linewidth=1, label="said = right")
    for line, colour, marker in zip(planted, COLOURS, MARKERS, strict=False):
        said, right = ([100 * row[column] for row in line["bins"]] for column in (0, 1))
        axis.plot(said, right, color=colour, marker=marker, markersize=5, linewidth=1.8, label=line["data"])
    axis.set_xlabel("probability said by the audit (mean of a bin), %")
    axis.set_ylabel("share of the bin's pairs that are right, %")
    axis.set_xlim(-2, 102)
    axis.set_ylim(-2, 102)
    axis.set_aspect("equal")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure
