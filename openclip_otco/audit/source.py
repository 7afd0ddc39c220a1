"""Sources of pairs: the samples of WebDataset shards, or the rows of a CSV file, read from any place on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from openclip_otco.data import samples
from openclip_otco.data.shard import is_local, shard_samples
from openclip_otco.errors import UserError, last_line

# OpenCLIP's `--dataset-type auto` takes files with these endings for CSV files, too.
CSV_ENDINGS = (".csv", ".tsv")
_ROWS_AT_A_TIME = 10_000


@dataclass(frozen=True)
class RawSample:
    """A sample as it was stored: its files by type, or the path of its image and its caption.

    Attributes:
        shard, number: place of the shard in the data, and of the sample in the shard.
        key: the name of the sample in the data; it is never used as the name of a file.
        files: contents by type (`jpg`, `txt`), for a sample of a shard.
        path, caption: path of the image, and caption, for a row of a CSV file.
    """

    shard: int
    number: int
    key: str
    files: dict[str, bytes] = field(default_factory=dict)
    path: str | None = None
    caption: str | None = None


class Source(Protocol):
    """Samples in an order that is always the same."""

    @property
    def names(self) -> Sequence[str]:
        """The names of its shards."""
        ...

    def samples(self, shard: int = 0, number: int = 0) -> Iterator[RawSample]:
        """The samples from sample `number` of shard `shard` on.

        Raises:
            UserError: a shard cannot be read.
        """
        ...

    def captions(self, sample: RawSample) -> list[str]:
        """The captions of a sample.

        Raises:
            ValueError: they cannot be read.
        """
        ...

    def total(self) -> int | None:
        """Number of samples, for the progress bar; None if it is not known."""
        ...

    def fingerprint(self) -> list[Any]:
        """Plain values that change whenever the data change.

        Raises:
            UserError: a local shard is gone.
        """
        ...


class Shards:
    """WebDataset shards, named as for OpenCLIP's `--train-data`: with brace ranges, and `::` between several sources.

    Args:
        data: the names.
        caption_lines: each line of a `txt` is a caption; without it, the whole `txt` is one caption.

    Raises:
        UserError: a local shard is missing.
    """

    def __init__(self, data: str, caption_lines: bool = False) -> None:
        self.data, self.caption_lines = data, caption_lines
        self.names = samples.shards(data)

    def samples(self, shard: int = 0, number: int = 0) -> Iterator[RawSample]:
        """The samples from this shard and this number on, in the order of the data."""
        for index in range(shard, len(self.names)):
            for place, (key, files) in enumerate(shard_samples(self.names[index])):
                if index > shard or place >= number:
                    yield RawSample(index, place, key, {file.kind: file.content for file in files})

    def captions(self, sample: RawSample) -> list[str]:
        """The captions of a sample; none where it has none."""
        return samples.captions(sample.files, self.caption_lines)

    def total(self) -> int | None:
        """Number of images in the shards; None if a shard is not local."""
        return samples.images(self.data)

    def fingerprint(self) -> list[Any]:
        """Names, sizes and times of the shards: plain values, which change when the data change."""
        names = [[name, *_stat(Path(name))] if is_local(name) else [name] for name in self.names]
        return [*names, ["--caption-lines"]] if self.caption_lines else names


class CsvRows:
    """A CSV file as OpenCLIP's `--dataset-type csv` reads it: a path and a caption in each row.

    Args:
        path: the file.
        image_key, caption_key: names of its columns.
        separator: the character between columns.

    Raises:
        UserError: the file is missing, or lacks a column.
    """

    def __init__(self, path: Path, image_key: str, caption_key: str, separator: str) -> None:
        self.path, self.image_key, self.caption_key, self.separator = path, image_key, caption_key, separator
        self.names = [str(path)]
        for chunk in self.chunks():
            for flag, column in (("--csv-img-key", image_key), ("--csv-caption-key", caption_key)):
                if column not in chunk.columns:
                    there = ", ".join(map(str, chunk.columns))
                    raise UserError(f"{flag} {column}: {path} has no such column, but {there} (--csv-separator?)")
            break

    def chunks(self) -> Iterator[Any]:
        """The rows as they are in the file, in data frames of a fixed size."""
        import pandas

        try:
            # All columns are text: pandas would make numbers or missing values of captions such as 007 or None.
            options = {"sep": self.separator, "dtype": str, "keep_default_na": False}
            yield from pandas.read_csv(self.path, chunksize=_ROWS_AT_A_TIME, **options)
        except (OSError, ValueError) as error:
            raise UserError(f"--data {self.path}: is no readable CSV file ({last_line(error)})") from error

    def samples(self, shard: int = 0, number: int = 0) -> Iterator[RawSample]:
        """The samples from this shard and this number on, in the order of the data."""
        place = 0
        for chunk in self.chunks():
            for path, caption in zip(chunk[self.image_key], chunk[self.caption_key], strict=True):
                if place >= number:
                    yield RawSample(0, place, path, path=path, caption=caption)
                place += 1

    def captions(self, sample: RawSample) -> list[str]:
        """The captions of a sample; none where it has none."""
        return [sample.caption] if sample.caption else []

    def total(self) -> int | None:
        """Number of rows of the file."""
        return sum(map(len, self.chunks()))

    def fingerprint(self) -> list[Any]:
        """Path, size and time of the file, its columns and separator, which change when the data change."""
        return [
            [str(self.path), *_stat(self.path), self.image_key, self.caption_key, self.separator],
        ]


@dataclass(frozen=True)
class ShardsOfRank:
    """The shards that one of several processes judges. They are consecutive; each process has about the same number.

    Args:
        whole: all shards.
        rank, ranks: number of the process, from 0, and number of processes.

    Raises:
        UserError: there are fewer shards than processes, or the data are a table.
    """

    whole: Source
    rank: int
    ranks: int

    def __post_init__(self) -> None:
        if not isinstance(self.whole, Shards):
            raise UserError(f"--ranks {self.ranks}: is for shards, and {self.names[0]} is a table; drop the flag")
        if len(self.names) < self.ranks:
            raise UserError(f"--ranks {self.ranks}: there are {len(self.names)} shards; give at most as many ranks")

    @property
    def names(self) -> Sequence[str]:
        """The names of the shards."""
        return self.whole.names

    @property
    def bounds(self) -> tuple[int, int]:
        """The first shard of this process, and the first one of the next process."""
        count = len(self.names)
        return count * self.rank // self.ranks, count * (self.rank + 1) // self.ranks

    def samples(self, shard: int = 0, number: int = 0) -> Iterator[RawSample]:
        """The samples from this shard and this number on, in the order of the data."""
        first, behind = self.bounds
        start = (shard, number) if shard >= first else (first, 0)
        for sample in self.whole.samples(*start):
            if sample.shard >= behind:
                return
            yield sample

    def captions(self, sample: RawSample) -> list[str]:
        """The captions of a sample; none where it has none."""
        return self.whole.captions(sample)

    def total(self) -> int | None:
        """None: the shards of one rank are not counted."""
        return None

    def fingerprint(self) -> list[Any]:
        """The fingerprint of all shards, those of other processes too."""
        return self.whole.fingerprint()


def open_source(data: str, image_key: str, caption_key: str, separator: str, caption_lines: bool = False) -> Source:
    """The source with the name `data`: a CSV file, told by its ending, or shards.

    Raises:
        UserError: a shard is missing, the CSV file cannot be used, or `caption_lines` is given for a CSV file.
    """
    if data.endswith(CSV_ENDINGS):
        if caption_lines:
            raise UserError(f"--caption-lines: is for shards, and {data} is a table; drop the flag")
        return CsvRows(Path(data), image_key, caption_key, separator)
    return Shards(data, caption_lines)


def _stat(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise UserError(f"--data: {path} cannot be read: {error.strerror}") from error
    return found.st_size, found.st_mtime_ns
