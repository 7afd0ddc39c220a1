"""The look at the shards before training."""

from __future__ import annotations

import gzip
import io
import tarfile

import pytest

from openclip_otco.data.shard_check import caption_problem


def write_shard(path, names):
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    return str(path)


def test_shards_with_captions_are_fine(tmp_path):
    for index in range(3):
        write_shard(tmp_path / f"{index:04d}.tar", ["a.jpg", "a.txt", "b.jpg", "b.txt"])
    assert caption_problem(str(tmp_path / "{0000..0002}.tar")) is None


def test_folders_and_dots_in_names_are_read_as_webdataset_reads_them(tmp_path):
    shard = write_shard(tmp_path / "a.tar", ["./folder.v2/a.jpg", "./folder.v2/a.txt"])
    assert caption_problem(shard) is None


@pytest.mark.parametrize("names", [["a.jpg", "a.json"], ["a.jpg"], []])
def test_shards_without_captions_are_named(tmp_path, names):
    shard = write_shard(tmp_path / "a.tar", names)
    problem = caption_problem(shard)
    assert shard in problem
    assert "no captions" in problem
    assert (".jpg" if names else "nothing") in problem
    assert "\n" not in problem


def test_the_second_source_is_looked_at_too(tmp_path):
    good = write_shard(tmp_path / "good.tar", ["a.jpg", "a.txt"])
    bad = write_shard(tmp_path / "bad.tar", ["a.jpg", "a.cls"])
    assert bad in caption_problem(f"{good}::{bad}")


def test_a_gap_in_a_range_is_open_clips_to_skip(tmp_path):
    write_shard(tmp_path / "1.tar", ["a.jpg", "a.txt"])
    assert caption_problem(str(tmp_path / "{0..3}.tar")) is None


def test_a_range_without_any_shard_is_named(tmp_path):
    problem = caption_problem(str(tmp_path / "{0..3}.tar"))
    assert problem.startswith(f"none of the 4 shards of {tmp_path}")


def test_braces_that_do_not_match_are_said(tmp_path):
    problem = caption_problem(str(tmp_path / "{0..3.tar"))
    assert problem.startswith("cannot expand ")
    assert "\n" not in problem


def test_an_empty_source_is_passed_over(tmp_path):
    shard = write_shard(tmp_path / "a.tar", ["a.jpg", "a.txt"])
    assert caption_problem(f"{shard}::") is None


@pytest.mark.parametrize(
    "content", [b"", b"no tar at all" * 100, gzip.compress(b"x" * 5000)[:-10]], ids=["empty", "text", "gzip cut off"]
)
def test_what_is_no_tar_is_said(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    problem = caption_problem(str(tmp_path / "a.tar"))
    assert "no readable tar" in problem or "no captions" in problem
    assert "\n" not in problem


@pytest.mark.parametrize(
    "remote", ["pipe:aws s3 cp s3://bucket/a.tar -", "https://example.org/{0..3}.tar", "-", "file:a.tar"]
)
def test_remote_shards_are_not_looked_at(remote):
    assert caption_problem(remote) is None
