"""A mean over seeds with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from openclip_otco.study.table import interval


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
    def low(self) -> float:
        """The interval's lower end."""
        return self.mean - (self.half or 0)

    @property
    def high(self) -> float:
        """The interval's upper end."""
        return self.mean + (self.half or 0)
