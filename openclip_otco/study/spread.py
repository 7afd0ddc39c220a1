"""A mean over seeds with its interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import t as student_t


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half-width of its 95 % Student-t interval: None for a single value.

    Raises:
        ValueError: no values.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    return mean, float(student_t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


@dataclass(frozen=True)
class Spread:
    """A mean over seeds and the half-width of its 95 % Student-t interval, None for one seed."""

    mean: float
    half: float | None

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Mean and 95 % interval of some values."""
        return cls(*interval(values))

    @classmethod
    def of_difference(cls, own: Mapping[int, float], base: Mapping[int, float]) -> Spread:
        """The spread of `own` minus `base`, both by seed, over the seeds that both have.

        Raises:
            ValueError: there is no such seed.
        """
        return cls.of([own[seed] - base[seed] for seed in sorted(own.keys() & base.keys())])

    @classmethod
    def of_ratio(cls, pairs: Sequence[tuple[float, float]]) -> Spread:
        """The mean of the first values divided by that of the second ones, which are paired by seed.

        The interval is that of the ratio estimator (Cochran, Sampling Techniques, 1977, section 6.4): the mean's of
        `own - ratio * base`, divided by the mean of the second values. A ratio taken seed by seed would be another one.

        Raises:
            ValueError: there is no pair.
            ZeroDivisionError: the second values have the mean 0.
        """
        base_mean = statistics.fmean(base for _, base in pairs)
        ratio = statistics.fmean(own for own, _ in pairs) / base_mean
        _, half = interval([(own - ratio * base) / base_mean for own, base in pairs])
        return cls(ratio, half)

    def __str__(self) -> str:
        return self.to(1)

    def to(self, digits: int, factor: float = 1.0) -> str:
        """Mean and interval as text with so many digits; both are multiplied by `factor`, as for percent."""
        mean = f"{factor * self.mean:.{digits}f}"
        return mean if self.half is None else f"{mean} ± {factor * self.half:.{digits}f}"

    @property
    def signed(self) -> str:
        """As text with a sign, for differences."""
        return f"{'+' if self.mean >= 0 else ''}{self}"

    @property
    def above_0(self) -> bool:
        """Whether the whole interval is above 0."""
        return self.half is not None and self.mean > self.half

    @property
    def holds_0(self) -> bool:
        """Whether 0 lies in the interval, which has to be known."""
        return self.half is not None and abs(self.mean) <= self.half

    @property
    def low(self) -> float:
        """The interval's lower end."""
        return self.mean - (self.half or 0)

    @property
    def high(self) -> float:
        """The interval's upper end."""
        return self.mean + (self.half or 0)
