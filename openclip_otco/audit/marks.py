"""Marks: pairs that a person wants to keep or to drop, whatever the models say of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openclip_otco.audit import table
from openclip_otco.errors import UserError

# Number of marks that an error names.
_NAMED = 3


@dataclass(frozen=True)
class Mark:
    """One line of a list of marks. Without a shard it means the key's pairs in all shards; the same for captions."""

    key: str
    shard: str | None
    caption: str | None

    def means(self, row: table.Row) -> bool:
        """Whether the pair of this row is meant."""
        wanted = ((self.key, "key"), (self.shard, "shard"), (self.caption, "caption"))
        return all(text is None or text == _plain(row[name]) for text, name in wanted)


class Marks:
    """A list of marks, as the gallery saves it: one JSON object a line.

    `{"mark": "drop", "key": "0007", "shard": "0000.tar", "caption": "a dog"}`: `mark` is `keep` or `drop`; `shard` and
    `caption` may be left out. It is no CSV file: a spreadsheet would turn the key `0007` into 7, and run a caption that
    begins with `=` as a formula.

    Args:
        path: the file.

    Raises:
        UserError: the file cannot be read, is no such list, or marks a pair in two ways.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._keep: dict[Mark, bool] = {}
        for number, line in enumerate(self._lines(), start=1):
            if line.strip():
                mark, keep = self._read(number, line)
                if self._keep.setdefault(mark, keep) != keep:
                    raise self._marked_twice(mark.key)

    def places(self, parts: Sequence[Path]) -> dict[table.Place, bool]:
        """Whether each marked pair is kept, by its place in the data.

        Args:
            parts: of an audit.

        Raises:
            UserError: a mark means no pair of the audit, or a pair is marked in two ways.
        """
        by_key: dict[str, list[Mark]] = {}
        for mark in self._keep:
            by_key.setdefault(mark.key, []).append(mark)
        found: dict[table.Place, bool] = {}
        used: set[Mark] = set()
        columns = ["key", "shard", "caption", *table.PLACE]
        for row in (row for part in parts for row in table.rows(part, columns)):
            for mark in by_key.get(_plain(row["key"]), ()):
                if mark.means(row):
                    used.add(mark)
                    if found.setdefault(table.place(row), self._keep[mark]) != self._keep[mark]:
                        raise self._marked_twice(mark.key)
        self._check_all_used([mark for mark in self._keep if mark not in used])
        return found

    def _lines(self) -> Iterable[str]:
        try:
            # Not splitlines(): a caption may hold a line separator of Unicode.
            return self.path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, ValueError) as error:
            raise UserError(f"--marks {self.path}: cannot be read: {error}") from error

    def _read(self, number: int, line: str) -> tuple[Mark, bool]:
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict) or found.get("mark") not in ("keep", "drop") or not _is_text(found):
            raise UserError(
                f'--marks {self.path}: line {number} is no mark like {{"mark": "drop", "key": "0007"}}; '
                "give the marks that gallery.html saved"
            )
        texts = (found.get(name) for name in ("shard", "caption"))
        mark = Mark(_plain(found["key"]), *(None if text is None else _plain(text) for text in texts))
        return mark, found["mark"] == "keep"

    def _check_all_used(self, strangers: Sequence[Mark]) -> None:
        if strangers:
            keys = ", ".join([repr(mark.key) for mark in strangers[:_NAMED]] + ["..."] * (len(strangers) > _NAMED))
            raise UserError(
                f"--marks {self.path}: {len(strangers)} of {len(self._keep)} marks are of pairs that this audit does "
                f"not have, with the keys {keys}; give the marks of its own gallery"
            )

    def _marked_twice(self, key: str) -> UserError:
        return UserError(f"--marks {self.path}: a pair with the key {key!r} is marked both keep and drop; remove one")


def _is_text(found: Mapping[str, Any]) -> bool:
    optional = (found.get(name) for name in ("shard", "caption"))
    return isinstance(found.get("key"), str) and all(text is None or isinstance(text, str) for text in optional)


def _plain(text: str) -> str:
    """Text in the form in which it comes back from a page: browsers change white space and invalid characters."""
    return " ".join(text.encode("utf-8", "replace").decode().replace("\0", "\ufffd").split())
