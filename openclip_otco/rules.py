"""What numbers and names a setting takes: one rule for classes, flags of the training and arguments of commands."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Rule:
    """What a setting must be.

    Args:
        text: ends the sentence "it must be ...".
        accepts: whether a value keeps the rule. NaN keeps none of the rules below.
    """

    text: str
    accepts: Callable[[Any], bool]

    def check(self, **settings: Any) -> None:
        """Nothing, if all keep the rule.

        Raises:
            ValueError: names the first one that does not, and its value.
        """
        for name, value in settings.items():
            if not self.accepts(value):
                raise ValueError(f"{name} must be {self.text}; got {value!r}")


ANY = Rule("anything", lambda value: True)
POSITIVE = Rule("positive", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Rule("0 or more", lambda value: 0 <= value < math.inf)
AT_LEAST_ONE = Rule("at least 1", lambda value: 1 <= value < math.inf)
SHARE = Rule("in [0, 1]", lambda value: 0 <= value <= 1)
SHARE_ABOVE_ZERO = Rule("in (0, 1]", lambda value: 0 < value <= 1)
SHARE_BELOW_ONE = Rule("in [0, 1)", lambda value: 0 <= value < 1)


def one_of(choices: tuple[str, ...]) -> Rule:
    """The rule that a setting is one of these names."""
    return Rule(f"one of {', '.join(choices)}", lambda value: value in choices)


def argument(number: type[Number], rule: Rule) -> Callable[[str], Number]:
    """The `type` of a command's argument: an `int` or a `float` that keeps the rule."""

    def parse(text: str) -> Number:
        try:
            value = number(text)
        except ValueError:
            kind = "a whole number" if number is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {kind}; got {text!r}") from None
        if not rule.accepts(value):
            raise argparse.ArgumentTypeError(f"must be {rule.text}; got {text}")
        return value

    return parse
