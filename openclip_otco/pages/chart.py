"""Charts and heat maps laid out for a template: where lines, ticks and cells go, in the units of an SVG picture.

The pictures are SVG within the page, coloured by its style sheet, so that they follow its light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.ticker import MaxNLocator

# More points than this no screen tells apart, and a long run has a hundred times as many.
_MOST_POINTS = 800


@dataclass(frozen=True)
class Tick:
    """A tick: its place along the axis, and its label."""

    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """One curve of a chart: points `(step, value)` in the order of the steps; values may be missing (not finite)."""

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Chart:
    """Curves over one axis, with all that a template needs to draw them.

    Args:
        title, about: heading, and one sentence on what the curves mean.
        lines: at most four, each with points.
        across: name of the horizontal axis.
    """

    title: str
    about: str
    lines: tuple[Line, ...]
    across: str = "step"

    width, height = 480, 230
    left, right, top, bottom = 62, 468, 12, 192

    @classmethod
    def of(
        cls, title: str, about: str, curves: Mapping[str, Mapping[int, float]], across: str = "step"
    ) -> Chart | None:
        """The chart of `curves`, name to values by step, less those without a finite value; None if none is left."""
        lines = [
            Line(name, thinned(sorted(curve.items())))
            for name, curve in curves.items()
            if any(math.isfinite(value) for value in curve.values())
        ]
        return cls(title, about, tuple(lines), across) if lines else None

    @cached_property
    def _spans(self) -> tuple[tuple[float, float], tuple[float, float]]:
        points = [point for line in self.lines for point in line.points if math.isfinite(point[1])]
        return _span([x for x, _ in points]), _span([y for _, y in points])

    @cached_property
    def x_ticks(self) -> list[Tick]:
        """The ticks of the horizontal axis."""
        return [Tick(self._x(value), f"{value:,.6g}") for value in _ticks(self._spans[0], 6, whole=True)]

    @cached_property
    def y_ticks(self) -> list[Tick]:
        """The ticks of the vertical axis."""
        return [Tick(self._y(value), f"{value:,.6g}") for value in _ticks(self._spans[1], 5)]

    def path(self, line: Line) -> str:
        """The curve as an SVG path; it breaks where a value is missing, and a lone point is a dot."""
        commands, pen = [], False
        for x, y in self.placed(line):
            if y is None:
                pen = False
                continue
            # A move and a line of no length: with round caps, a dot.
            commands.append(f"L{x} {y}" if pen else f"M{x} {y}h0")
            pen = True
        return "".join(commands)

    def placed(self, line: Line) -> list[tuple[float, float | None]]:
        """The points of `line` in the picture; a missing value has no height."""
        return [(round(self._x(x), 1), round(self._y(y), 1) if math.isfinite(y) else None) for x, y in line.points]

    def summary(self) -> str:
        """What a reader who does not see the picture is told of it: the ends of each curve, and its extremes."""
        told = []
        for line in self.lines:
            finite = [(x, y) for x, y in line.points if math.isfinite(y)]
            values = [y for _, y in finite]
            (x0, y0), (x1, y1) = finite[0], finite[-1]
            told.append(
                f"{line.name}: {y0:.4g} at {self.across} {x0:g}, {y1:.4g} at {x1:g}, "
                f"lowest {min(values):.4g}, highest {max(values):.4g}"
            )
        return f"{self.title} over {self.across}s. {'; '.join(told)}."

    def _x(self, value: float) -> float:
        low, high = self._spans[0]
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def _y(self, value: float) -> float:
        low, high = self._spans[1]
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)


@dataclass(frozen=True)
class Cell:
    """One cell of a heat map: row and column from 0, its value, where that lies on the scale, and what it says."""

    row: int
    column: int
    value: float
    share: float
    title: str

    @property
    def colour(self) -> str:
        """Of the share, as CSS has it."""
        return colour(self.share)


def heat(values: Sequence[Sequence[float]], titles: Sequence[Sequence[str]], low: float, high: float) -> list[Cell]:
    """The cells of a heat map of `values`: `low` has the first colour of the scale and `high` the last."""
    span = high - low if high > low else 1.0
    return [
        Cell(row, column, value, (value - low) / span, titles[row][column])
        for row, line in enumerate(values)
        for column, value in enumerate(line)
    ]


def colour(share: float) -> str:
    """The colour at `share`, in `[0, 1]`, of matplotlib's `viridis`: even steps to any eye, also in grey."""
    return to_hex(colormaps["viridis"](min(max(share, 0.0), 1.0)))


def thinned(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """At most 800 of `points`, evenly spaced. The last one stays, and so does the last finite one: runs may diverge."""
    if len(points) <= _MOST_POINTS:
        return tuple(points)
    stride = -(-len(points) // (_MOST_POINTS - 1))
    last_finite = max((at for at, (_, value) in enumerate(points) if math.isfinite(value)), default=None)
    stay = {*range((len(points) - 1) % stride, len(points), stride), *(() if last_finite is None else (last_finite,))}
    return tuple(points[at] for at in sorted(stay))


def _span(values: Sequence[float]) -> tuple[float, float]:
    """From the least to the greatest value; of one value alone, room on both sides of it."""
    low, high = min(values), max(values)
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    room = abs(low) / 2 or 0.5
    return low - room, high + room


def _ticks(span: tuple[float, float], most: int, whole: bool = False) -> list[float]:
    values = MaxNLocator(most, integer=whole, steps=[1, 2, 5, 10]).tick_values(*span)
    return [float(value) for value in values if span[0] <= value <= span[1]]
