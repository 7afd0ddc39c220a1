"""The clean data: shards or a CSV file without the dropped pairs, and a list of the keys that are kept."""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import json
import lzma
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, cast

from openclip_otco.audit import table
from openclip_otco.audit.source import CsvRows, Shards, Source
from openclip_otco.data import samples
from openclip_otco.data.shard import File, is_local, shard_samples
from openclip_otco.errors import UserError

KEYS = "clean-keys.txt"


def check_target(folder: Path, source: Source) -> None:
    """Find out before the audit whether `write_clean` would fail after it.

    Raises:
        UserError: `folder` is not empty, the shards of `source` cannot be written there under their own names, or its
            table cannot be written with its separator.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--write-clean {folder}: is there and not empty; name a new folder")
    if isinstance(source, Shards):
        names = Counter(Path(name).name for name in source.names if is_local(name))
        for name, count in names.most_common(1):
            if count > 1:
                raise UserError(f"--write-clean: {count} shards are named {name}; audit one --data source at a time")
    if isinstance(source, CsvRows) and len(source.separator) != 1:
        # It is read as a regular expression.
        raise UserError(
            f"--csv-separator {source.separator}: --write-clean needs a single character; for a tab, leave it out"
        )


def write_clean(
    source: Source, parts: Sequence[Path], keep: Callable[[table.Row], bool], folder: Path
) -> tuple[int, list[str]]:
    """Write the pairs that are kept into `folder`. The folder appears only when all of it is written.

    A sample is dropped if all its pairs are, or if it has no pair (no caption, or an image that cannot be decoded). A
    sample that keeps some of its captions keeps its other files. Shards keep their names and their compression. Shards
    that are not local files are not written; the list of keys has their samples, too.

    Args:
        source: the audited data.
        parts: of the audit, in the order of the data.
        keep: says for a row of a part whether the pair is kept.
        folder: must be missing or empty.

    Returns:
        The number of samples kept, and the shards that were not written.

    Raises:
        UserError: `source` is not what was audited or cannot be read, or `folder` cannot be written.
    """
    partial = folder.parent / f".{folder.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        count = _write_keys(partial / KEYS, parts, keep)
        kept, left = _Kept(parts, keep), []
        if isinstance(source, CsvRows):
            _write_rows(source, kept, partial / source.path.name)
        elif isinstance(source, Shards):
            sizes = {}
            for index, shard in enumerate(source.names):
                if is_local(shard):
                    name = Path(shard).name
                    sizes[name] = _write_shard(shard, index, kept, partial / name, source.caption_lines)
                else:
                    left.append(shard)
                    kept.skip(index)
            (partial / "sizes.json").write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
        kept.check_all_found()
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except OSError as error:
        raise UserError(f"--write-clean {folder}: cannot be written: {error}") from error
    return count, left


class _Kept:
    """The captions that are kept of each sample. Samples must be asked for in the order of the data."""

    def __init__(self, parts: Sequence[Path], keep: Callable[[table.Row], bool]) -> None:
        self._samples = _samples(parts, keep)
        self._next = next(self._samples, None)

    def lines(self, shard: int, number: int) -> tuple[set[int], int]:
        """The numbers of the captions of a sample that are kept, and how many captions it had."""
        if self._next is None or self._next[0] != (shard, number):
            return set(), 0
        (_, found), self._next = self._next, next(self._samples, None)
        return {row["line"] for row, stays in found if stays}, len(found)

    def skip(self, shard: int) -> None:
        """Skip all samples of a shard."""
        while self._next is not None and self._next[0][0] == shard:
            self._next = next(self._samples, None)

    def check_all_found(self) -> None:
        """Check that the data had all samples of the parts.

        Raises:
            UserError: they had not.
        """
        if self._next is not None:
            (shard, number), _ = self._next
            raise UserError(
                f"--write-clean: --data is not what was audited: sample {number} of shard {shard} is not where it was; "
                "audit it again with a new --out"
            )


def _samples(
    parts: Sequence[Path], keep: Callable[[table.Row], bool]
) -> Iterator[tuple[tuple[int, int], list[tuple[table.Row, bool]]]]:
    """For each sample, in the order of the data: its place, and its rows, each with whether it is kept."""
    # The rows of a part are sorted by rank. A sample may begin in one part and end in the next.
    columns = ["key", *table.ORDER]
    in_order = (row for part in parts for row in sorted(table.rows(part, columns), key=table.place))
    for where, group in itertools.groupby(in_order, key=lambda row: (row["shard_number"], row["sample"])):
        yield where, [(row, keep(row)) for row in group]


def _write_keys(path: Path, parts: Sequence[Path], keep: Callable[[table.Row], bool]) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as stream:
        for _, found in _samples(parts, keep):
            if any(stays for _, stays in found):
                key = found[0][0]["key"]
                # A key with a line break must not become two keys of the list.
                stream.write((key if key.isprintable() else key.encode("unicode_escape").decode()) + "\n")
                count += 1
    return count


def _write_rows(source: CsvRows, kept: _Kept, path: Path) -> None:
    number = 0
    for first, chunk in zip(itertools.chain([True], itertools.repeat(False)), source.chunks(), strict=False):
        stays = []
        for _ in range(len(chunk)):
            stays.append(bool(kept.lines(0, number)[0]))
            number += 1
        chunk[stays].to_csv(path, sep=source.separator, index=False, header=first, mode="w" if first else "a")


def _write_shard(shard: str, index: int, kept: _Kept, path: Path, by_line: bool) -> int:
    """Writes the samples of a shard that are kept, and returns their number."""
    count = 0
    with _compressed_as(shard, path) as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
        for number, (_, files) in enumerate(shard_samples(shard)):
            lines, captions = kept.lines(index, number)
            if not lines:
                continue
            for file in files if len(lines) == captions else _with_captions(files, lines, by_line):
                header = tarfile.TarInfo(file.header.name)
                for field in ("mode", "mtime", "uid", "gid", "uname", "gname"):
                    setattr(header, field, getattr(file.header, field))
                header.size = len(file.content)
                tar.addfile(header, io.BytesIO(file.content))
            count += 1
    return count


def _compressed_as(shard: str, path: Path) -> IO[bytes]:
    """`path`, open for writing, with the compression that the content of the file `shard` has, whatever its name.

    Raises:
        UserError: `shard` cannot be read.
    """
    try:
        with open(shard, "rb") as stream:
            start = stream.read(6)
    except OSError as error:
        raise UserError(f"--data: {shard} cannot be read: {error.strerror}") from error
    if start.startswith(b"\x1f\x8b"):
        return cast(IO[bytes], gzip.GzipFile(path, "wb", mtime=0))  # equal data give equal bytes
    if start.startswith(b"BZh"):
        return bz2.open(path, "wb")
    if start.startswith(b"\xfd7zXZ"):
        return lzma.open(path, "wb")
    return path.open("wb")


def _with_captions(files: list[File], lines: set[int], by_line: bool) -> list[File]:
    """The files of a sample. Each file that holds captions keeps only those whose numbers are in `lines`."""
    captions = samples.captions({file.kind: file.content for file in files}, by_line)
    kept = [caption for line, caption in enumerate(captions) if line in lines]
    dropped = {caption.strip() for caption in captions} - {caption.strip() for caption in kept}
    facts = next((json.loads(file.content) for file in files if file.kind == "json"), None)
    found = []
    for file in files:
        content = file.content
        if file.kind == "json" and isinstance(facts, dict) and "captions" in facts:
            content = json.dumps({**facts, "captions": kept}).encode()
        elif samples.is_text(file.kind):
            texts = samples.texts(content, by_line)
            stay = [text for text in texts if text not in dropped]
            if not stay and file.kind != "txt":
                continue
            # OpenCLIP trains on the `.txt`: it must be there, and must not hold a caption that was dropped.
            if not stay or len(stay) < len(texts):
                content = "\n".join(stay or kept[:1]).encode("utf-8", "replace")
        found.append(File(file.header, file.kind, content))
    return found
