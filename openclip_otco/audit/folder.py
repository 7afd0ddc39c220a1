"""The folder of an audit: its settings, and the windows that are done."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import duckdb
from filelock import FileLock, Timeout

from openclip_otco.audit import table
from openclip_otco.audit.pairs import Cursor
from openclip_otco.audit.two_groups import WrongShare
from openclip_otco.errors import UserError, first_line
from openclip_otco.files import locked, remove_partial, write_text

# Goes up whenever the same settings begin to give other parts.
_VERSION = 5
_STATE = "state.json"


class AuditFolder:
    """What an audit has done so far: a Parquet file, called a part, for each window.

    A process that is killed at any moment leaves only whole parts, and the next process continues after them. If a part
    is broken nevertheless, for example by a failure of the disk, it is made again; the parts after it stay.

    Args:
        path: the folder.
        rank, ranks: number of this process, from 0, and number of processes that share the work; each has its own
            parts.
    """

    def __init__(self, path: Path, rank: int = 0, ranks: int = 1) -> None:
        self.path, self.rank, self.ranks = path, rank, ranks
        self._all_parts = path / "parts"
        self._parts = self._all_parts if ranks == 1 else self._all_parts / f"rank-{rank:05d}"

    def of_ranks(self) -> list[AuditFolder]:
        """The folder of each rank."""
        return [AuditFolder(self.path, rank, self.ranks) for rank in range(self.ranks)]

    @contextlib.contextmanager
    def opened(self, settings: dict[str, Any]) -> Iterator[None]:
        """Locks the folder for the audit with these settings; makes the folder if it is missing.

        Args:
            settings: all that decides the rows of the table, by flag: plain values.

        Raises:
            UserError: the folder belongs to another audit or to something else, is in use, or cannot be written.
        """
        state = json.loads(json.dumps({"version": _VERSION, **settings}))
        with contextlib.ExitStack() as held:
            with self.accessed():
                self._check_holds_nothing_else()
                self._parts.mkdir(parents=True, exist_ok=True)
                with locked(self._all_parts / ".state"):
                    self._claim(state)
                held.enter_context(FileLock(self._parts / ".lock").acquire(blocking=False))
                self._note.unlink(missing_ok=True)
                self._drop_broken()
            yield

    @contextlib.contextmanager
    def accessed(self) -> Iterator[None]:
        """Turns errors of its block into errors for the user. The block reads or writes only files of this folder.

        Raises:
            UserError: a file cannot be read or written, or another process is at work in the folder.
        """
        try:
            yield
        except Timeout:
            raise UserError(f"--out {self.path}: another audit is at work in it; wait for its end") from None
        except (OSError, duckdb.Error) as error:
            raise UserError(f"--out {self.path}: cannot be used: {first_line(error)}") from error

    def _claim(self, state: dict[str, Any]) -> None:
        found = self._state()
        if found is None and any(self._all_parts.rglob("*.parquet")):
            raise UserError(f"--out {self.path}: holds something that is no audit; name a new folder")
        if found is None:
            write_text(self.path / _STATE, json.dumps(state, indent=1) + "\n")
        elif differ := [name for name in state if found.get(name) != state[name]]:
            raise UserError(
                f"--out {self.path}: holds another audit, which differs in {', '.join(differ)}; "
                "name another folder, or delete this one"
            )

    @contextlib.contextmanager
    def failure_noted(self) -> Iterator[None]:
        """Leaves a note in the folder, for rank 0, if the block fails on another rank; see `failure`.

        The block may fail before the folder is opened. There is no note if the process was killed, if the folder holds
        something that is no audit, or if another process is at work as this rank.
        """
        try:
            yield
        except BaseException as error:  # also of Ctrl-C
            if 0 < self.rank < self.ranks:
                with contextlib.suppress(OSError, UserError):  # an error of the note must not hide why the rank failed
                    self._leave_note(_reason(error))
            raise

    def _leave_note(self, reason: str) -> None:
        self._check_holds_nothing_else()
        self._parts.mkdir(parents=True, exist_ok=True)
        with FileLock(self._parts / ".lock").acquire(blocking=False):
            write_text(self._note, f"{reason}\n")

    def failure(self) -> str | None:
        """Why this rank failed when it was last at work; None if it left no note."""
        try:
            return self._note.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return None

    def parts(self) -> list[Path]:
        """The finished parts, in the order of the data."""
        found = list[Path]()
        while (path := self._part(len(found))).is_file():
            found.append(path)
        return found

    def add(self, rows: list[table.Row], wrong: WrongShare, *, middle: Cursor, end: Cursor, last: bool) -> bool:
        """Write the next part.

        Args:
            rows: of the schema `PART`, in any order.
            wrong: the estimated share of wrong pairs in their window.
            middle: where the second half of the window begins.
            end: where the next part begins.
            last: whether there is no next part.

        Returns:
            Whether the next part is there already.

        Raises:
            UserError: it cannot be written.
        """
        note = json.dumps({"middle": asdict(middle), "end": asdict(end), "last": last, "wrong": wrong})
        schema = table.PART.with_metadata({"audit": note})
        number = len(self.parts())
        with self.accessed():
            table.write(self._part(number), sorted(rows, key=table.order), schema)
        return self._part(number + 1).is_file()

    def progress(self) -> tuple[Cursor, bool]:
        """Where the finished parts end, and whether the data end there."""
        note = self._last_note()
        return (Cursor(**note["end"]), note["last"]) if note else (Cursor(), False)

    def middle(self) -> Cursor | None:
        """Where the second half of the last finished window begins; None if no window is finished."""
        note = self._last_note()
        return Cursor(**note["middle"]) if note else None

    def _last_note(self) -> dict[str, Any] | None:
        """What `add` noted of the last finished part."""
        parts = self.parts()
        if not parts:
            return None
        with self.accessed():
            note: dict[str, Any] = json.loads(table.metadata(parts[-1])["audit"])
        return note

    def wrong_shares(self) -> list[WrongShare]:
        """The estimated share of wrong pairs of each finished part."""
        return [WrongShare(*json.loads(table.metadata(part)["audit"])["wrong"]) for part in self.parts()]

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """An empty folder, which is deleted afterwards."""
        path = self._all_parts / ".scratch"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def _drop_broken(self) -> None:
        remove_partial(self._parts)
        if self.rank == 0:  # only this rank writes the table
            remove_partial(self.path)
        for path in sorted(self._parts.glob("*.parquet")):
            if not table.is_whole(path):
                print(f"{path} is broken and will be made again", file=sys.stderr)
                path.unlink()

    def _state(self) -> dict[str, Any] | None:
        try:
            found = json.loads((self.path / _STATE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise UserError(f"--out {self.path}: its {_STATE} is not an audit's; name another folder")
        return found

    def _check_holds_nothing_else(self) -> None:
        """Raises a `UserError` where the folder holds files of something else than an audit."""
        if self._state() is not None or not self.path.exists():
            return
        if any(path.name not in (self._all_parts.name, f"{_STATE}.part") for path in self.path.iterdir()):
            raise UserError(f"--out {self.path}: holds something that is no audit; name a new folder")

    @property
    def _note(self) -> Path:
        return self._parts / "failure.txt"

    def _part(self, number: int) -> Path:
        return self._parts / f"{number:06d}.parquet"


def _reason(error: BaseException) -> str:
    """One line for an error, with its type unless it is an error that was written for users."""
    line = next(iter(str(error).splitlines()), "")
    if isinstance(error, UserError):
        return line
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
