"""Tables of judged pairs: a part for each window, and the ranking of all pairs, merged from the parts."""

from __future__ import annotations

import heapq
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Row = dict[str, Any]
Order = tuple[float, float, tuple[int, int, int]]

# What a user gets.
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
# A part has no ranks yet. It has what they are made by, and thumbnails of the pairs that were the worst so far.
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
# The columns of a part by which it is ranked.
ORDER = ("probability", "evidence", "shard_number", "sample", "line")
_FAN_IN = 64
_ROWS = 1024
_GROUP = 2**16


def place(row: Row) -> tuple[int, int, int]:
    """Where a row of a part comes in the data."""
    return row["shard_number"], row["sample"], row["line"]


def order(row: Row) -> Order:
    """By what the rows of a part are ranked: the least likely first, and those alike as they come in the data."""
    return row["probability"], row["evidence"], place(row)


def rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """The rows of a Parquet file, some at a time in memory."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_ROWS, columns=columns):
            yield from batch.to_pylist()


def write(path: Path, content: Iterable[Row], schema: pa.Schema) -> None:
    """Write a Parquet file, whole or not at all, some rows at a time; it is on the disk before it has its name."""
    partial = path.with_name(f"{path.name}.partial")
    content = iter(content)
    # Of thumbnails, statistics would be copies.
    described = [name for name in schema.names if name != "thumbnail"]
    options = {"compression": "zstd", "write_page_checksum": True, "write_statistics": described}
    with pq.ParquetWriter(partial, schema, **options) as writer:
        while group := list(itertools.islice(content, _GROUP)):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def is_whole(path: Path) -> bool:
    """Whether all of a Parquet file can be read, each page with the checksum that it was written with."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for _ in file.iter_batches(_ROWS):
                pass
    except (pa.ArrowException, OSError, ValueError):
        return False
    return True


def ranked(parts: Sequence[Path], scratch: Path, fan_in: int = _FAN_IN) -> Iterator[Row]:
    """The rows of all `parts` in `order`, which the rows of each part are in already.

    Merged some files at a time, so that memory does not grow with their number.

    Args:
        parts: Parquet files of the schema `PART`.
        scratch: an existing folder for what is merged on the way.
        fan_in: files merged at once.
    """
    paths, made = list(parts), 0
    while len(paths) > fan_in:
        group, paths = paths[:fan_in], paths[fan_in:]
        merged = scratch / f"{made}.parquet"
        write(merged, heapq.merge(*map(rows, group), key=order), PART)
        for path in group:
            if path.parent == scratch:
                path.unlink()
        paths.append(merged)
        made += 1
    yield from heapq.merge(*map(rows, paths), key=order)


def metadata(path: Path) -> dict[str, str]:
    """What was noted in the schema that a file was written with."""
    found = pq.read_schema(path).metadata or {}
    return {key.decode(): value.decode() for key, value in found.items()}


def count(path: Path) -> int:
    """Number of rows of a Parquet file."""
    return int(pq.read_metadata(path).num_rows)
