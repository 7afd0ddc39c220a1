"""The reader of shards against WebDataset's own."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import webdataset as wds
from hypothesis import given
from hypothesis import strategies as st
from open_clip_train.data import tarfile_to_samples_nothrow
from webdataset.tariterators import base_plus_ext

from openclip_otco.data.shard import BROKEN, key_and_kind, shard_samples
from openclip_otco.errors import UserError

FILES = {
    "a.jpg": b"1",
    "a.txt": b"2",
    "folder.v2/a.jpg": b"3",
    "folder.v2/a.seg.PNG": b"4",
    "no type": b"5",
    "b.json": b"6",
    "a.cls": b"7",
}


def write_shard(path: Path, mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:
        folder = tarfile.TarInfo("folder.v2")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, content in FILES.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))


@given(st.text("aB1./ "))
def test_a_name_is_cut_as_webdataset_cuts_it(name: str) -> None:
    key, kind = base_plus_ext(name)
    assert key_and_kind(name) == (key, (kind or "").lower())


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
@pytest.mark.parametrize("start", ["", "pipe:cat "])
def test_samples_are_those_of_webdataset(tmp_path: Path, mode: str, start: str) -> None:
    write_shard(tmp_path / "0.tar", mode)
    found = [
        (key, {file.kind: file.content for file in files}) for key, files in shard_samples(f"{start}{tmp_path}/0.tar")
    ]
    pipeline = wds.DataPipeline(wds.SimpleShardList([f"{start}{tmp_path}/0.tar"]), wds.tarfile_to_samples())
    theirs = [(each["__key__"], {k: v for k, v in each.items() if not k.startswith("__")}) for each in pipeline]
    assert found == theirs
    assert len(found) == 4


def test_a_type_that_comes_again_begins_a_sample_as_in_openclip(tmp_path: Path) -> None:
    names = ["0.jpg", "0.txt", "0.jpg", "0.txt", "1.txt", "1.jpg", "1.json", "1.json", "2.jpg"]
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number, name in enumerate(names):
            header = tarfile.TarInfo(name)
            header.size = 1
            tar.addfile(header, io.BytesIO(b"%d" % number))
    found = [
        (key, {file.kind: file.content for file in files}) for key, files in shard_samples(str(tmp_path / "0.tar"))
    ]
    read = tarfile_to_samples_nothrow(wds.SimpleShardList([str(tmp_path / "0.tar")]))
    theirs = [(each["__key__"], {k: v for k, v in each.items() if not k.startswith("__")}) for each in read]
    assert found == theirs
    assert [key for key, _ in found] == ["0", "0", "1", "1", "2"]


@pytest.mark.parametrize("place", [30, 100, 200])
def test_a_damaged_archive_is_one_clear_error(tmp_path: Path, place: int) -> None:
    shard = tmp_path / "0.tar.xz"
    write_shard(shard, "w:xz")
    content = bytearray(shard.read_bytes())
    content[place] ^= 255
    shard.write_bytes(content)
    with pytest.raises(UserError, match=rf"^--train-data: {shard} is no readable tar file \("):
        list(shard_samples(str(shard), "--train-data"))
    with pytest.raises(BROKEN), tarfile.open(shard) as tar:
        tar.getmembers()


@pytest.mark.parametrize("left", [0, 1, 1300])
def test_a_torn_shard_is_one_clear_error(tmp_path: Path, left: int) -> None:
    shard = tmp_path / "0.tar"
    write_shard(shard)
    shard.write_bytes(shard.read_bytes()[:left])
    with pytest.raises(UserError, match=rf"^--train-data: {shard} is no readable tar file \("):
        list(shard_samples(str(shard), "--train-data"))
