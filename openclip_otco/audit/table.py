"""Tables of judged pairs: a part for each window, and the ranking of all pairs."""

from __future__ import annotations

import glob
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from openclip_otco.files import written_whole

Row = dict[str, Any]
Place = tuple[int, int, int]
Order = tuple[float, float, Place]

# The table that a user gets.
TABLE = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),
        ("caption", pa.string()),
        ("probability", pa.float64()),
        ("structure", pa.float64()),
        ("log_density", pa.float64()),
        ("cosine", pa.float64()),
        ("best_caption", pa.string()),
        ("best_key", pa.string()),
        ("rank", pa.int64()),
    ]
)
# A part has no ranks yet. It has the columns that decide them, and thumbnails of the pairs that were the worst so far.
PART = pa.schema(
    [
        *(TABLE.field(name) for name in TABLE.names if name != "rank"),
        ("evidence", pa.float64()),
        ("shard_number", pa.int64()),
        ("sample", pa.int64()),
        ("line", pa.int64()),
        ("thumbnail", pa.binary()),
    ]
)
# The columns that say where a pair comes in the data.
PLACE = ("shard_number", "sample", "line")
# The columns of a part by which it is ranked.
ORDER = ("probability", "evidence", *PLACE)
# Memory of the ranking in bytes: so much, and so much for each pair. The rest goes to the disk. A fixed limit would be
# too small for large data, since a sort on disk needs memory for each of its pieces.
_MEMORY, _MEMORY_PER_PAIR = 2**27, 32
# Each thread has buffers of its own.
_THREADS = 2
# Rows that are read, and rows that are written, at a time.
_ROWS, _GROUP = 1024, 2**16


def place(row: Row) -> Place:
    """Where a row of a part comes in the data."""
    return row["shard_number"], row["sample"], row["line"]


def order(row: Row) -> Order:
    """The sort key of the ranking: the least likely pair first, equal ones in the order of the data."""
    return row["probability"], row["evidence"], place(row)


def rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """The rows of a Parquet file; only some of them are in memory at a time."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_ROWS, columns=columns):
            yield from batch.to_pylist()


def write(path: Path, content: Iterable[Row], schema: pa.Schema) -> None:
    """Write a Parquet file, some rows at a time. A kill leaves the whole file or none."""
    content = iter(content)
    # No statistics of thumbnails: they would hold copies of two of them, the least and the greatest.
    described = [name for name in schema.names if name != "thumbnail"]
    options = {"compression": "zstd", "write_page_checksum": True, "write_statistics": described}
    with written_whole(path, synced=True) as partial, pq.ParquetWriter(partial, schema, **options) as writer:
        while group := list(itertools.islice(content, _GROUP)):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))


def is_whole(path: Path) -> bool:
    """Whether all of a Parquet file can be read, and every page has its checksum."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for _ in file.iter_batches(_ROWS):
                pass
    except (pa.ArrowException, OSError, ValueError):
        return False
    return True


class Ranking:
    """All pairs of an audit, the least likely first. DuckDB sorts them, and uses the disk if they are many.

    Args:
        parts: Parquet files of the schema `PART`.
        scratch: an existing folder for temporary files.
    """

    def __init__(self, parts: Sequence[Path], scratch: Path) -> None:
        self._database = duckdb.connect()
        memory = _MEMORY + _MEMORY_PER_PAIR * sum(map(count, parts))
        self._database.execute(f"SET memory_limit = '{memory}B'")
        self._database.execute(f"SET threads = {_THREADS}")
        self._database.execute("SET temp_directory = ?", [str(scratch)])
        # A user's folder may be called [1] or *.
        names = [glob.escape(str(part)) for part in parts]
        self._database.read_parquet(names).create_view("parts")

    def write(self, path: Path) -> None:
        """Write all pairs with their ranks, counted from 1. A kill leaves the whole file or none."""
        columns = ", ".join(name for name in TABLE.names if name != "rank")
        ranked = self._database.sql(
            f"SELECT {columns}, row_number() OVER (ORDER BY {', '.join(ORDER)}) AS rank FROM parts ORDER BY rank"
        )
        with written_whole(path, synced=True) as partial:
            ranked.write_parquet(str(partial), compression="zstd")

    def first(self, count: int, skip: int = 0) -> list[Row]:
        """The first `count` rows of the ranking behind the first `skip` rows, of the schema `PART`."""
        found = self._database.sql(f"FROM parts ORDER BY {', '.join(ORDER)} LIMIT {count} OFFSET {skip}")
        rows: list[Row] = found.to_arrow_table().to_pylist()
        return rows

    def histogram(self, bins: int) -> list[int]:
        """Number of pairs by probability, in bins of equal width from 0 to 1."""
        found = self._database.sql(
            f"SELECT least(floor(probability * {bins}), {bins - 1})::INTEGER AS bin, count(*) FROM parts GROUP BY bin"
        )
        counts = dict(found.fetchall())
        return [counts.get(number, 0) for number in range(bins)]


def metadata(path: Path) -> dict[str, str]:
    """The metadata of the schema of a Parquet file."""
    found = pq.read_schema(path).metadata or {}
    return {key.decode(): value.decode() for key, value in found.items()}


def count(path: Path) -> int:
    """Number of rows of a Parquet file."""
    return int(pq.read_metadata(path).num_rows)
