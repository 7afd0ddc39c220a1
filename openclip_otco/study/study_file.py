"""The file of a study, in TOML: read, checked, and made a `Study`."""

import re
import tomllib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from openclip_otco.errors import UserError
from openclip_otco.study.study import DataSetting, Flags, Flickr8k, Loss, Study

# One of these in a study file would break the run's folder or its identity.
RESERVED_FLAGS = frozenset({"logs", "name", "seed", "resume", "loss", "siglip"})

# Single separators only, so that "--" keeps the parts of a run's name apart.
_NAME = re.compile(r"[A-Za-z0-9]+([._-][A-Za-z0-9]+)*")
_FLAG = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")


def shipped_studies() -> list[str]:
    """Names of the studies in the package."""
    configs = files("openclip_otco.configs").iterdir()
    return sorted(entry.name.removesuffix(".toml") for entry in configs if entry.name.endswith(".toml"))


def load(study: str) -> Study:
    """Read the study file at the path `study`, or the shipped study of that name.

    Raises:
        UserError: no such study, not TOML, or a key that is missing, unknown or of the wrong kind.
    """
    return _load(study, ())


def _load(study: str, readers: tuple[str, ...]) -> Study:
    """The study. `readers` are the studies that take their flags from it, directly or through one another."""
    path = Path(study)
    if path.is_file():
        content = path.read_bytes()
    elif study in shipped_studies():
        content = files("openclip_otco.configs").joinpath(f"{study}.toml").read_bytes()
    else:
        raise UserError(f"{study}: no such file, nor a shipped study ({', '.join(shipped_studies())})")
    try:
        document = tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{study}: not TOML: {error}") from error
    return _Reader(study, (*readers, study)).study(document)


class _Reader:
    """Turns a TOML document into a study. Its errors name the file and the key.

    Args:
        source: the study's file or name.
        readers: this study, and those that take their flags from it.

    In the methods `where` is the path of a table in the file, with a dot at its end.
    """

    def __init__(self, source: str, readers: tuple[str, ...]) -> None:
        self.source, self.readers = source, readers

    def study(self, document: dict[str, Any]) -> Study:
        self.refuse_other_keys(document, "", {"study", "flags", "data", "loss"})
        head = self.table(document, "study")
        self.refuse_other_keys(head, "study.", {"name", "note", "seeds", "flags-of"})
        seeds = self.seeds(head)
        name = self.text(head, "study.", "name")
        self.check_name("study.name", name)
        study = Study(
            source=self.source,
            name=name,
            note=self.text(head, "study.", "note") if "note" in head else "",
            seeds=seeds,
            flags={
                **(self.flags_of(head) if "flags-of" in head else {}),
                **self.flags(self.table(document, "flags") if "flags" in document else {}, "flags."),
            },
            data=tuple(self.data(key, table) for key, table in self.named_tables(document, "data")),
            losses=self.losses(document),
        )
        self.check_epochs(study)
        return study

    def seeds(self, head: dict[str, Any]) -> tuple[int, ...]:
        seeds = head.get("seeds", [0])
        if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
            raise self.error("study.seeds", "must be a list of whole numbers, 0 or more")
        if len(set(seeds)) < len(seeds):
            raise self.error("study.seeds", "names a seed twice")
        return tuple(seeds)

    def check_epochs(self, study: Study) -> None:
        """Every run needs a number of epochs, whichever table gives it."""
        for setting in study.data:
            for loss in study.losses:
                epochs = {**study.flags, **setting.flags, **loss.flags}.get("epochs")
                if type(epochs) is not int or epochs < 1:
                    raise self.error("flags.epochs", "must be given, a whole number of 1 or more")

    def flags_of(self, head: dict[str, Any]) -> Flags:
        """The flags of the study that `study.flags-of` names: a file in the folder of this one, or a shipped study."""
        name = self.text(head, "study.", "flags-of")
        neighbour = Path(self.source).parent / f"{name}.toml"
        wanted = str(neighbour) if Path(self.source).is_file() and neighbour.is_file() else name
        if wanted in self.readers:
            raise self.error("study.flags-of", f"leads back to {wanted}")
        try:
            return _load(wanted, self.readers).flags
        except UserError as error:
            raise self.error("study.flags-of", f"names a study that cannot be used: {error}") from error

    def data(self, name: str, table: dict[str, Any]) -> DataSetting:
        where = f"data.{name}."
        made = [key for key in ("scenes", "flickr8k") if key in table]  # data that `compare` makes
        scenes = None
        if "scenes" in table:
            scenes = self.flags(self.table(table, "scenes", where), f"{where}scenes.", reserved=frozenset())
            if type(scenes.get("mismatch", 0)) not in (int, float):  # the tables and pictures read it
                raise self.error(f"{where}scenes.mismatch", "must be a number from 0 to 1")
        flickr8k = None
        if "flickr8k" in table:
            flickr8k = self.flickr8k(self.table(table, "flickr8k", where), f"{where}flickr8k.")
        flags = self.flags({key: value for key, value in table.items() if key not in made}, where)
        if len(made) > 1:
            raise self.error(f"{where}flickr8k", "cannot be given together with scenes")
        if not made and "train-data" not in flags:
            raise self.error(f"data.{name}", "needs scenes, flickr8k or train-data")
        if made and (both := {"train-data", "val-data"} & flags.keys()):
            raise self.error(f"{where}{min(both)}", f"cannot be given together with {made[0]}")
        return DataSetting(name, scenes, flags, flickr8k)

    def flickr8k(self, table: dict[str, Any], where: str) -> Flickr8k:
        self.refuse_other_keys(table, where, {"mismatch", "near", "matched-only", "folder"})
        mismatch = table.get("mismatch", 0)
        if type(mismatch) is not int or not 0 <= mismatch < 100:
            raise self.error(f"{where}mismatch", "must be a whole number of percent, 0 to 99")
        for name in ("near", "matched-only"):
            if type(table.get(name, False)) is not bool:
                raise self.error(f"{where}{name}", "must be true or false")
            if table.get(name) and not mismatch:
                raise self.error(f"{where}{name}", "needs a mismatch above 0")
        folder = self.text(table, where, "folder") if "folder" in table else None
        return Flickr8k(mismatch, table.get("near", False), table.get("matched-only", False), folder)

    def losses(self, document: dict[str, Any]) -> tuple[Loss, ...]:
        found: dict[str, Loss] = {}
        for name, table in self.named_tables(document, "loss"):
            found[name] = self.loss(name, table, found)
        return tuple(found.values())

    def loss(self, name: str, table: dict[str, Any], above: Mapping[str, Loss]) -> Loss:
        """A loss. With the key `like`, it is that one of the losses `above`, with some flags changed."""
        where = f"loss.{name}."
        flags = self.flags({key: value for key, value in table.items() if key not in ("loss", "like")}, where)
        if "like" not in table:
            return Loss(name, self.text(table, where, "loss"), flags)
        if "loss" in table:
            raise self.error(f"{where}loss", "cannot be given together with like")
        like = self.text(table, where, "like")
        if like not in above:
            raise self.error(f"{where}like", f"names no loss above it ({', '.join(above) or 'there is none'})")
        return Loss(name, above[like].loss, {**above[like].flags, **flags})

    def named_tables(self, document: dict[str, Any], key: str) -> list[tuple[str, dict[str, Any]]]:
        tables = self.table(document, key)
        if not tables:
            raise self.error(key, f"needs at least one table [{key}.NAME]")
        for name in tables:
            self.check_name(f"{key}.{name}", name)
        return [(name, self.table(tables, name, f"{key}.")) for name in tables]

    def flags(self, table: dict[str, Any], where: str, reserved: frozenset[str] = RESERVED_FLAGS) -> Flags:
        for key, value in table.items():
            if not _FLAG.fullmatch(key):
                raise self.error(where + key, "is no flag name (lower case, no leading dashes)")
            if key in reserved:
                raise self.error(where + key, "is unknown here: `compare` sets this flag itself")
            values = value if isinstance(value, list) else [value]
            # A flag with no values, or a nested list or table, has no command line.
            if not values or not all(isinstance(item, bool | int | float | str) for item in values):
                raise self.error(where + key, "must be a number, a string, true, false or a list of those")
        return dict(table)

    def table(self, table: dict[str, Any], key: str, where: str = "") -> dict[str, Any]:
        if key not in table:
            raise self.error(where + key, f"is missing (a table [{where}{key}])")
        if not isinstance(table[key], dict):
            raise self.error(where + key, "must be a table")
        return table[key]

    def text(self, table: dict[str, Any], where: str, key: str) -> str:
        if key not in table:
            raise self.error(where + key, "is missing")
        if not isinstance(table[key], str) or not table[key]:
            raise self.error(where + key, "must be a string")
        return table[key]

    def check_name(self, key: str, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise self.error(key, "needs a name of letters and digits, parted by single `.`, `_` or `-`")

    def refuse_other_keys(self, table: dict[str, Any], where: str, known: set[str]) -> None:
        if unknown := sorted(table.keys() - known):
            raise self.error(where + unknown[0], f"is unknown (known: {', '.join(sorted(known))})")

    def error(self, key: str, complaint: str) -> UserError:
        return UserError(f"{self.source}: {key} {complaint}")
