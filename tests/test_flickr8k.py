"""Flickr8k as a study's data: which caption goes with which image, the same bytes each time, and clear errors."""

import csv
import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
from webdataset.writer import TarWriter

from openclip_otco.data import flickr8k
from openclip_otco.errors import UserError
from openclip_otco.study import shards
from openclip_otco.study.mismatch import mismatch
from openclip_otco.study.study import DataSetting, Flickr8k
from openclip_otco.study.study_file import load

KEYS = [f"image{number}" for number in range(7)]
DONORS = {"image1": "image4", "image4": "image2"}


def captions(key: str) -> list[str]:
    return [f"{key} in words {index}" for index in range(5)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for split, keys in (("train-0000", KEYS[:3]), ("train-0001", KEYS[3:]), ("dev-0000", ["dev0", "dev1"])):
        with TarWriter(str(folder / f"{split}.tar"), encoder=False) as writer:
            for key in keys:
                text = json.dumps({"captions": captions(key)}).encode()
                writer.write({"__key__": key, "jpg": f"{key} as JPEG".encode(), "json": text})
    with (folder / "mismatch-40.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("key", "caption_key"), *DONORS.items()])
    return folder


def pairs(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """By shard, image and caption of each sample."""
    found: dict[str, list[tuple[str, str]]] = {}
    for path in sorted(folder.glob("*.tar")):
        members: dict[str, dict[str, str]] = {}
        with tarfile.open(path) as shard:
            for member in shard:
                key, _, suffix = member.name.rpartition(".")
                stream = shard.extractfile(member)
                assert isinstance(stream, io.BufferedReader)
                members.setdefault(key, {})[suffix] = stream.read().decode()
        found[path.name] = [(each["jpg"], each["txt"]) for each in members.values()]
    return found


@pytest.mark.parametrize("mismatch", [0, 40])
def test_each_image_meets_the_captions_of_the_list_once(source: Path, tmp_path: Path, mismatch: int) -> None:
    flickr8k.write_train(source, tmp_path / "train", f"mismatch-{mismatch}")
    found = pairs(tmp_path / "train")
    donors = DONORS if mismatch else {}
    expected = [(f"{key} as JPEG", caption) for key in KEYS for caption in captions(donors.get(key, key))]
    assert sorted(pair for shard in found.values() for pair in shard) == sorted(expected)
    for shard in found.values():
        images = [image for image, _ in shard]
        assert len(set(images)) == len(images)  # none meets itself
    sizes = json.loads((tmp_path / "train" / "sizes.json").read_text())
    assert sizes == {name: len(shard) for name, shard in found.items()}


def test_without_the_mismatched_images_the_others_are_as_before(source: Path, tmp_path: Path) -> None:
    flickr8k.write_train(source, tmp_path / "train", "mismatch-40", matched_only=True)
    found = pairs(tmp_path / "train")
    expected = [(f"{key} as JPEG", caption) for key in KEYS if key not in DONORS for caption in captions(key)]
    assert sorted(pair for shard in found.values() for pair in shard) == sorted(expected)


def test_kinds_of_mismatch_have_folders_and_recipes_of_their_own(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(flickr8k.SOURCE, str(source))
    (source / "mismatch-near-40.csv").write_text("key,caption_key\nimage0,image1\n")
    kinds = {"mismatch-40": {}, "mismatch-near-40": {"near": True}, "mismatch-40-matched": {"matched_only": True}}
    for name, options in kinds.items():
        setting = DataSetting(name, None, {}, Flickr8k(40, **options))
        shards.make(setting, tmp_path)
        recipe = json.loads((tmp_path / f"data/flickr8k-{name}/flickr8k.json").read_text())
        assert recipe == {"version": flickr8k.VERSION, "mismatch": 40, **options}
        assert mismatch(setting) == (None if options else 0.4)
    near = [pair for shard in pairs(tmp_path / "data/flickr8k-mismatch-near-40").values() for pair in shard]
    assert ("image0 as JPEG", captions("image1")[0]) in near
    assert ("image1 as JPEG", captions("image1")[0]) in near


def test_equal_sources_give_equal_bytes(source: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        flickr8k.write_train(source, tmp_path / name, "mismatch-40")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_validation_keeps_all_captions(source: Path, tmp_path: Path) -> None:
    flickr8k.write_val(source, tmp_path / "val")
    assert pairs(tmp_path / "val") == {"0000.tar": [(f"{k} as JPEG", captions(k)[0]) for k in ("dev0", "dev1")]}
    with tarfile.open(tmp_path / "val" / "0000.tar") as shard:
        stream = shard.extractfile("dev1.json")
        assert stream is not None
        assert json.loads(stream.read()) == {"captions": captions("dev1")}


def test_a_study_makes_its_shards_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(flickr8k.SOURCE, str(source))
    out = tmp_path / "out"
    settings = [DataSetting(f"noise-{m}", None, {}, Flickr8k(m)) for m in (0, 40)]
    before = [shards.data_flags(setting, out)["train-data"] for setting in settings]
    assert before == [f"OUT/data/flickr8k-mismatch-{m}/SHARDS" for m in (0, 40)]
    for setting in settings:
        shards.make(setting, out)
    flags = shards.data_flags(settings[1], out)
    assert flags == {
        "train-data": "OUT/data/flickr8k-mismatch-40/{0000..0009}.tar",
        "val-data": "OUT/data/flickr8k-dev/0000.tar",
    }
    assert shards.samples_per_epoch(flags, out) == 35
    monkeypatch.delenv(flickr8k.SOURCE)
    shards.make(settings[1], out)  # made already: no source is needed
    marker = out / "data" / "flickr8k-mismatch-40" / "flickr8k.json"
    marker.write_text("{}")
    with pytest.raises(UserError, match=flickr8k.SOURCE):
        shards.make(settings[1], out)


def test_a_source_that_cannot_be_used_is_one_clear_error(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(flickr8k.SOURCE, raising=False)
    with pytest.raises(UserError, match=rf"let the environment variable {flickr8k.SOURCE} name"):
        flickr8k.source_folder()
    with pytest.raises(UserError, match=r"has no train-\*.tar"):
        flickr8k.source_folder(str(tmp_path))
    with pytest.raises(UserError, match=r"mismatch-33\.csv is missing; there is mismatch-0, mismatch-40"):
        flickr8k.write_train(source, tmp_path / "train", "mismatch-33")
    with (source / "mismatch-40.csv").open("a") as stream:
        stream.write("image2,stranger\n")
    with pytest.raises(UserError, match=r"mismatch-40\.csv names stranger"):
        flickr8k.write_train(source, tmp_path / "train", "mismatch-40")
    (source / "mismatch-40.csv").write_text("image;captions\nimage0;image1\n")
    with pytest.raises(UserError, match=r"mismatch-40\.csv cannot be used: it needs the columns key and caption_key"):
        flickr8k.write_train(source, tmp_path / "train", "mismatch-40")
    rows = "".join(f"image{number},image{(number + 1) % 7}\n" for number in range(7))
    (source / "mismatch-40.csv").write_text(f"key,caption_key\n{rows}", encoding="utf-8-sig")
    with pytest.raises(UserError, match=r"mismatch-40\.csv names all images, so matched-only leaves none"):
        flickr8k.write_train(source, tmp_path / "train", "mismatch-40", matched_only=True)


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"captions": []}', b'{"captions": [1]}'])
def test_an_image_without_captions_is_named(source: Path, tmp_path: Path, content: bytes) -> None:
    with TarWriter(str(source / "dev-0000.tar"), encoder=False) as writer:
        writer.write({"__key__": "dev0", "jpg": b"dev0 as JPEG", "json": content})
    with pytest.raises(UserError, match=r"dev-0000\.tar: dev0\.json must be"):
        flickr8k.write_val(source, tmp_path / "val")


def test_shards_of_another_flickr8k_are_not_taken(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting, out = DataSetting("noise-40", None, {}, Flickr8k(40)), tmp_path / "out"
    monkeypatch.setenv(flickr8k.SOURCE, str(source))
    shards.make(setting, out)
    copied = shutil.copytree(source, tmp_path / "copy")
    monkeypatch.setenv(flickr8k.SOURCE, str(copied))
    shards.make(setting, out)  # the same data in another place
    with (copied / "mismatch-40.csv").open("a") as stream:
        stream.write("image2,image0\n")
    with pytest.raises(UserError, match=r"was made from another Flickr8k than .*copy; name another --out"):
        shards.make(setting, out)
    # A torn note counts as none, and what a torn recipe belongs to is made again.
    for folder in ("flickr8k-mismatch-40", "flickr8k-dev"):
        (out / "data" / folder / "source.json").write_text("{")
    (out / "data/flickr8k-mismatch-40/flickr8k.json").write_text("{")
    shards.make(setting, out)
    assert json.loads((out / "data/flickr8k-mismatch-40/flickr8k.json").read_text())["mismatch"] == 40


def test_a_shard_that_lacks_a_file_or_is_torn_is_named(source: Path, tmp_path: Path) -> None:
    shard = source / "dev-0000.tar"
    with TarWriter(str(shard), encoder=False) as writer:
        writer.write({"__key__": "dev0", "jpg": b"dev0 as JPEG", "txt": b"dev0"})
    with pytest.raises(UserError, match=r"dev-0000\.tar lacks dev0\.jpg or dev0\.json; copy the shard anew"):
        flickr8k.write_val(source, tmp_path / "val")
    shard.write_bytes((source / "train-0000.tar").read_bytes()[:700])
    with pytest.raises(UserError, match=r"Flickr8k: .*dev-0000\.tar is no readable tar file"):
        flickr8k.write_val(source, tmp_path / "other")


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ("flickr8k = {mismatch = 0.4}", "data.d.flickr8k.mismatch must be a whole number of percent"),
        ("flickr8k = {mismatch = 40, near = 1}", "data.d.flickr8k.near must be true or false"),
        ("flickr8k = {matched-only = true}", "data.d.flickr8k.matched-only needs a mismatch above 0"),
        ("flickr8k = {noise = 40}", "data.d.flickr8k.noise is unknown"),
        ("flickr8k = 40", "data.d.flickr8k must be a table"),
        ('flickr8k = {folder = ""}', "data.d.flickr8k.folder must be a string"),
        ("flickr8k = {}\nscenes = {}", "data.d.flickr8k cannot be given together with scenes"),
        ('flickr8k = {}\nval-data = "x"', "data.d.val-data cannot be given together with flickr8k"),
        ("", "needs scenes, flickr8k or train-data"),
    ],
)
def test_a_setting_that_cannot_be_used_names_its_key(table: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(f'[study]\nname = "s"\n[flags]\nepochs = 1\n[data.d]\n{table}\n[loss.clip]\nloss = "clip"\n')
    with pytest.raises(UserError, match=r"study\.toml") as caught:
        load(str(path))
    assert told in str(caught.value)


def test_the_shipped_studies_name_lists_that_there_are() -> None:
    study = load("flickr8k-frozen")
    assert [setting.flickr8k for setting in study.data] == [Flickr8k(m) for m in (0, 20, 40, 60)]
    assert len(study.seeds) == 5
