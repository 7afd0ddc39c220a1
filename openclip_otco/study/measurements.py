"""Lists of measurements that a page of results quotes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openclip_otco.errors import UserError
from openclip_otco.study.spread import Spread


@dataclass(frozen=True)
class Measurements:
    """A list of measurements, as a template asks it: JSON objects, one a line, written by a script of `benchmarks/`.

    A value inside an object of the line is named with a dot, as `retrieval.rsum`.

    Attributes:
        path: of the list.
        all: the objects, in their order.
    """

    path: Path
    all: list[dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Measurements:
        """The list at `path`.

        Raises:
            UserError: the file is missing, or a line is no JSON object.
        """
        try:
            found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from error
        if not all(isinstance(each, dict) for each in found):
            raise UserError(f"{path}: has a line that is no JSON object")
        return cls(path, found)

    def where(self, **values: Any) -> Measurements:
        """The measurements that have these values."""
        missing = object()
        found = [each for each in self.all if all(each.get(name, missing) == value for name, value in values.items())]
        return Measurements(self.path, found)

    def of(self, name: str) -> list[Any]:
        """The values under `name`, of those measurements that have it.

        Raises:
            UserError: there is none.
        """
        found = [value for each in self.all if (value := _value(each, name)) is not None]
        if not found:
            raise UserError(f"{self.path}: none of the lines asked for has {name}")
        return found

    def one(self, name: str) -> Any:
        """The only value under `name`.

        Raises:
            UserError: there is none, or more than one.
        """
        found = self.of(name)
        if len(found) > 1:
            raise UserError(f"{self.path}: {len(found)} of the lines asked for have {name}, and not one")
        return found[0]

    def spread(self, name: str) -> Spread:
        """Mean and interval of the values under `name`."""
        return Spread.of([float(value) for value in self.of(name)])

    def ahead(self, other: Measurements, name: str, by: str = "seed") -> Spread:
        """Mean and interval of the difference to `other` in the values under `name`, paired by those under `by`.

        Raises:
            UserError: nothing can be paired, or a value under `by` comes twice in one of the lists.
        """
        own, bases = self._by(by, name), other._by(by, name)
        found = [value - bases[key] for key, value in own.items() if key in bases]
        if not found:
            raise UserError(f"{self.path}: no {by} has a {name} in both of the lists that are compared")
        return Spread.of(found)

    def _by(self, key: str, name: str) -> dict[Any, Any]:
        """The values under `name` by those under `key`; lines without the first are left out."""
        found = [(line[key], value) for line in self.all if (value := _value(line, name)) is not None]
        if (twice := len(found) - len(dict(found))) > 0:
            raise UserError(f"{self.path}: {twice} of the lines to compare have the same {key} as another")
        return dict(found)


def _value(line: dict[str, Any], name: str) -> Any:
    """The value that `name` leads to, key by key; None where there is none."""
    found: Any = line
    for key in name.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return found
