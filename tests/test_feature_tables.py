"""Feature tables: runs with locked towers read features, and they are those of the pairs that the shards hold."""

import io
import logging
import multiprocessing
import os
import random
import re
import resource
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from forks import Fork, start_ranks
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

from openclip_otco.frozen.fill import Input, fill, lacking, share
from openclip_otco.frozen.fingerprint import fingerprint, sample_captions, sample_images
from openclip_otco.frozen.loader import BatchesInOrder, SeededBatches
from openclip_otco.frozen.memory import FeatureMemory
from openclip_otco.frozen.shard_pairs import ShardPairs, content_key, samples, shard_pairs
from openclip_otco.frozen.table import FeatureTable
from openclip_otco.models import registry as models

TINY = "RN10t-bert-tiny"
NUMBERS = st.integers(-(2**63), 2**63 - 1)


def rows_of(keys: Tensor) -> Tensor:
    """Some features `(n, 3)` of `(n,)` keys."""
    return torch.stack([keys % 1009, keys % 31, keys % 7], dim=1).float()


# --- the table ---------------------------------------------------------------------------------------------------


@given(parts=st.lists(st.lists(NUMBERS, min_size=1, max_size=6, unique=True), max_size=5), asked=st.lists(NUMBERS))
def test_a_table_gives_the_rows_of_its_keys(
    parts: list[list[int]], asked: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("table")
    written = FeatureTable(folder)
    for part in parts:
        written.add(torch.tensor(part), rows_of(torch.tensor(part)))
    known = {key for part in parts for key in part}
    keys = torch.tensor([*known, *asked], dtype=torch.int64)
    for table in (written, FeatureTable(folder)):
        rows = table.find(keys)
        assert [row >= 0 for row in rows.tolist()] == [key in known for key in keys.tolist()]
        if len(found := keys[rows >= 0]):
            assert torch.equal(table.take(rows[rows >= 0]), rows_of(found))


@pytest.mark.parametrize("content", [b"", b"no tensors"])
def test_a_broken_part_costs_a_warning_and_its_rows(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    table, keys = FeatureTable(tmp_path), torch.arange(8)
    table.add(keys[:4], rows_of(keys[:4]))
    (part,) = tmp_path.iterdir()
    table.add(keys[4:], rows_of(keys[4:]))
    part.write_bytes(content)
    again = FeatureTable(tmp_path)
    assert (again.find(keys) >= 0).tolist() == [False] * 4 + [True] * 4
    assert str(part) in caplog.text
    again.add(keys[:4], rows_of(keys[:4]))
    for each in (again, FeatureTable(tmp_path)):
        assert torch.equal(each.take(each.find(keys)), rows_of(keys))


def _add_some(folder: Path, numbers: list[int]) -> None:
    table = FeatureTable(folder)
    for number in numbers:
        keys = torch.tensor([number, number + 1000])
        table.add(keys, rows_of(keys))


def test_processes_may_add_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_add_some, args=(tmp_path, list(range(start, 30, 3)))) for start in range(3)]
    table = FeatureTable(tmp_path)
    assert not len(table)
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    keys = torch.cat([torch.arange(30), torch.arange(1000, 1030)])
    assert (table.find(keys) < 0).all()
    table.reload()
    assert torch.equal(table.take(table.find(keys)), rows_of(keys))
    assert not list(tmp_path.glob(".partial-*"))


def _on_a_full_disk(folder: Path, told: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    memory = FeatureMemory(folder / "image.safetensors")
    memory(torch.zeros(1, 2), lambda inputs: torch.zeros(len(inputs), 4000))
    table, keys = FeatureTable(folder / "table"), torch.arange(1000)
    for write in (lambda: memory.save(everything=True), lambda: table.add(keys, rows_of(keys))):
        try:
            write()
        except OSError as error:
            told.put(str(error))


def test_a_full_disk_is_an_error_of_the_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    told = context.Queue()
    process = context.Process(target=_on_a_full_disk, args=(tmp_path, told))
    process.start()
    errors = [told.get(timeout=60) for _ in range(2)]
    process.join(60)
    assert f"{tmp_path / 'image.safetensors'} cannot be written" in errors[0]
    assert f"{tmp_path / 'table'}{os.sep}part-" in errors[1]
    assert "File too large" in errors[1]
    assert not list(tmp_path.rglob("*.safetensors"))


# --- shards ------------------------------------------------------------------------------------------------------


def picture(number: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (48, 40 + 8 * (number % 3), 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def write_shard(path: Path, pairs: list[tuple[bytes, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for index, pair in enumerate(pairs):
            for kind, content in zip(("png", "txt"), pair, strict=True):
                member = tarfile.TarInfo(f"{path.stem}-{index}.{kind}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def pairs_of(*numbers: int) -> list[tuple[bytes, bytes]]:
    """Pairs whose pictures repeat from 5 on, as in sets with several captions a picture."""
    return [(picture(number % 5), f"a dog near {number} men in the snow".encode()) for number in numbers]


def test_a_shard_is_read_again_when_it_changed(tmp_path: Path) -> None:
    shard, folder = tmp_path / "0.tar", tmp_path / "kept"
    write_shard(shard, pairs_of(0, 1, 5))
    first = shard_pairs(shard, folder)
    assert first.image.tolist() == [content_key(image) for image, _ in pairs_of(0, 1, 5)]
    assert first.text.tolist() == [content_key(text) for _, text in pairs_of(0, 1, 5)]
    assert first.image[0] == first.image[2]
    (kept,) = folder.iterdir()
    time = kept.stat().st_mtime_ns
    assert torch.equal(shard_pairs(shard, folder).text, first.text)
    assert kept.stat().st_mtime_ns == time
    write_shard(shard, pairs_of(2, 3))
    assert shard_pairs(shard, folder).text.tolist() == [content_key(text) for _, text in pairs_of(2, 3)]
    kept.write_bytes(b"broken")
    assert len(shard_pairs(shard, folder).text) == 2


def test_only_pairs_count_as_pairs(tmp_path: Path) -> None:
    shard = tmp_path / "0.tar"
    with tarfile.open(shard, "w") as tar:
        for name in ("a.png", "a.txt", "b.png", "c.txt", "d.JPG", "d.png", "d.txt", "d.json"):
            member = tarfile.TarInfo(name)
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))
    # `jpg` comes before `png` in OpenCLIP's script.
    assert list(samples(shard)) == [(b"a.png", b"a.txt"), (b"d.JPG", b"d.txt")]


@given(
    shards=st.lists(st.lists(st.integers(0, 12), max_size=8), min_size=1, max_size=5),
    known=st.sets(st.integers(0, 12)),
    world_size=st.integers(1, 4),
)
def test_ranks_together_make_each_missing_row_once(
    shards: list[list[int]], known: set[int], world_size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    table = FeatureTable(tmp_path_factory.mktemp("table"))
    if known:
        table.add(torch.tensor(sorted(known)), rows_of(torch.tensor(sorted(known))))
    pairs = [ShardPairs(torch.tensor(keys, dtype=torch.int64), torch.zeros(len(keys))) for keys in shards]
    new = lacking(table, pairs, "image")
    shares = [share(new, rank, world_size) for rank in range(world_size)]
    made = [(number, key) for each in shares for number, keys in enumerate(each) for key in keys.tolist()]
    assert len(made) == len({key for _, key in made})
    assert {key for _, key in made} == {key for keys in shards for key in keys} - known
    assert all(key in shards[number] for number, key in made)
    sizes = [sum(map(len, each)) for each in shares]
    assert max(sizes) - min(sizes) <= 1


def _sums(inputs: Tensor) -> Tensor:
    return torch.stack([inputs.float().sum(1), inputs.float().square().sum(1)], dim=1)


def _bytes(content: bytes) -> Tensor:
    if content == b"bad":
        raise ValueError("not today")
    return torch.tensor(list(content.ljust(8)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_that_is_stopped_keeps_what_it_has(tmp_path: Path, workers: int) -> None:
    shards, contents = [], []
    for number in range(3):
        contents += (own := [(b"x%d-%d" % (number, i), b"t") for i in range(5)] + [(b"bad", b"t")])
        write_shard(tmp_path / f"{number}.tar", own)
        shards.append(tmp_path / f"{number}.tar")
    pairs = [shard_pairs(shard, tmp_path / "kept") for shard in shards]
    table = FeatureTable(tmp_path / "table")
    seen = 0

    def stopping(inputs: Tensor) -> Tensor:
        nonlocal seen
        seen += len(inputs)
        if seen > 9:
            raise KeyboardInterrupt
        return _sums(inputs)

    with pytest.raises(KeyboardInterrupt):
        fill(table, shards, lacking(table, pairs, "image"), Input("image", _bytes, stopping, 3), workers)
    assert len(table) == 9
    left = lacking(table, pairs, "image")
    assert sum(map(len, left)) == 7
    assert fill(table, shards, left, Input("image", _bytes, _sums, 3), workers) == 0
    # What cannot be decoded is not tried again, by nobody.
    for each in (table, FeatureTable(tmp_path / "table")):
        assert not sum(map(len, lacking(each, pairs, "image")))
        assert each.failed(torch.tensor([content_key(content) for content, _ in contents])).tolist() == [
            content == b"bad" for content, _ in contents
        ]
    for content, _ in contents:
        row = table.find(torch.tensor([content_key(content)]))
        assert (row < 0).item() == (content == b"bad")
        if content != b"bad":
            assert torch.equal(table.take(row), _sums(_bytes(content)[None]))


def test_what_is_torn_off_comes_back_with_the_shard(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard, kept = tmp_path / "0.tar", tmp_path / "kept"
    write_shard(shard, pairs_of(0, 1, 2, 3))
    whole, about = shard.read_bytes(), shard.stat()
    pairs = [shard_pairs(shard, kept)]
    table, source = FeatureTable(tmp_path / "table"), Input("text", _bytes_of_any_length, _sums, 2)

    def tear() -> None:
        shard.write_bytes(whole[: len(whole) // 2])
        os.utime(shard, ns=(about.st_atime_ns, about.st_mtime_ns))

    tear()
    unread = fill(table, [shard], lacking(table, pairs, "text"), source, 0)
    assert 0 < unread < 4
    assert f"{shard} cannot be read to its end" in caplog.text
    # As far as it goes, and not kept.
    assert len(shard_pairs(shard, kept).text) == 4 - unread
    shard.write_bytes(whole)
    os.utime(shard, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert sum(map(len, lacking(table, pairs, "text"))) == unread
    assert fill(table, [shard], lacking(table, pairs, "text"), source, 0) == 0
    assert len(shard_pairs(shard, kept).text) == 4


def _bytes_of_any_length(content: bytes) -> Tensor:
    return torch.tensor(list(content.ljust(40)))


def test_a_pass_without_memory_ends_the_run_and_marks_nothing(tmp_path: Path) -> None:
    shard = tmp_path / "0.tar"
    write_shard(shard, pairs_of(0, 1))
    pairs, table = [shard_pairs(shard, tmp_path / "kept")], FeatureTable(tmp_path / "table")

    def prepare(content: bytes) -> Tensor:
        raise MemoryError

    with pytest.raises(MemoryError):
        fill(table, [shard], lacking(table, pairs, "text"), Input("text", prepare, _sums, 2), 0)
    assert sum(map(len, lacking(FeatureTable(tmp_path / "table"), pairs, "text"))) == 2


# --- order -------------------------------------------------------------------------------------------------------


@given(
    size=st.integers(1, 30),
    batch=st.integers(1, 6),
    steps=st.integers(1, 8),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
)
def test_an_epoch_s_order(size: int, batch: int, steps: int, seed: int, epoch: int) -> None:
    def of(rank: int, world_size: int, batch: int, seed: int = seed, epoch: int = epoch) -> list[list[int]]:
        return list(SeededBatches(size, batch, steps, seed, lambda: epoch, rank, world_size))

    whole = of(0, 1, 2 * batch)
    assert [len(each) for each in whole] == [2 * batch] * steps
    assert whole == of(0, 1, 2 * batch)
    # Two ranks have the same steps between them.
    assert [[*a, *b] for a, b in zip(of(0, 2, batch), of(1, 2, batch), strict=True)] == whole
    # Each pair comes once before any comes twice.
    flat = [pair for each in whole for pair in each]
    for start in range(0, len(flat), size):
        part = flat[start : start + size]
        assert len(set(part)) == len(part)
    if size >= 20 and len(flat) >= size:
        assert flat != [pair for each in of(0, 1, 2 * batch, seed=seed + 1) for pair in each]
        assert flat != [pair for each in of(0, 1, 2 * batch, epoch=epoch + 1) for pair in each]


def test_validation_sees_each_pair_once_in_order() -> None:
    batches = BatchesInOrder(10, 4)
    assert list(batches) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(batches) == 3


# --- fingerprints ------------------------------------------------------------------------------------------------


def _image_function(*steps: Any) -> Any:
    transform = transforms.Compose([*steps, transforms.ToTensor()])
    return lambda content: transform(Image.open(io.BytesIO(content)).convert("RGB"))


def test_fingerprints_tell_transforms_apart_and_find_random_ones() -> None:
    both = transforms.InterpolationMode
    known = [
        fingerprint(_image_function(*steps), sample_images())
        for steps in (
            [transforms.Resize((32, 32))],
            [transforms.Resize((32, 32), both.BICUBIC)],
            [transforms.Resize(32), transforms.CenterCrop(32)],
            [transforms.Resize((48, 48))],
            [transforms.Resize((32, 32)), transforms.Grayscale(3)],
        )
    ]
    assert None not in known
    assert len(set(known)) == len(known)
    assert fingerprint(_image_function(transforms.Resize((32, 32))), sample_images()) == known[0]
    for random_step in (transforms.RandomHorizontalFlip(), transforms.RandomResizedCrop(32)):
        steps = [transforms.Resize((64, 64)), random_step, transforms.Resize((32, 32))]
        assert fingerprint(_image_function(*steps), sample_images()) is None


def random_state() -> list[Any]:
    return [random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()]  # type: ignore[index]


@pytest.mark.parametrize("seed", [4, 33, 38])
def test_whole_images_are_no_random_crop_whatever_the_seed(seed: int) -> None:
    """OpenCLIP's own crop keeps torchvision's range of ratios, in which a few pictures have a crop of their own."""
    torch.manual_seed(seed)
    crop = transforms.RandomResizedCrop(64, scale=(1.0, 1.0))
    assert fingerprint(_image_function(crop), sample_images()) is not None


def test_fingerprints_leave_random_numbers_alone() -> None:
    def drawing(content: bytes) -> Tensor:
        return torch.rand(2) + random.random() + float(np.random.rand())

    before = random_state()
    assert fingerprint(drawing, [b"a"]) is None
    assert random_state() == before


def test_fingerprints_tell_tokenizers_apart() -> None:
    models.register_models()
    models.prepare_model(TINY)
    tokenizers = [
        open_clip.get_tokenizer(TINY),
        open_clip.get_tokenizer(TINY, context_length=20),
        open_clip.get_tokenizer("RN50"),
        open_clip.get_tokenizer("RN50", clean="lower"),
    ]
    found = [fingerprint(lambda b, t=t: t([b.decode()])[0], sample_captions()) for t in tokenizers]
    assert None not in found
    assert len(set(found[:3])) == 3


# --- a run -------------------------------------------------------------------------------------------------------


def make_data(folder: Path) -> dict[str, str]:
    """Training shards with 24 pairs, one of which is no picture, and validation shards."""
    write_shard(folder / "train" / "0000.tar", [*pairs_of(*range(11)), (b"no picture", b"a caption")])
    write_shard(folder / "train" / "0001.tar", pairs_of(*range(11, 23)))
    write_shard(folder / "val" / "0000.tar", pairs_of(*range(3, 9)))
    return {"train": str(folder / "train" / "{0000..0001}.tar"), "val": str(folder / "val" / "0000.tar")}


def arguments(folder: Path, data: dict[str, str], *words: str) -> Any:
    from open_clip_train.params import parse_args

    args = parse_args(["--model", TINY, "--train-data", data["train"], "--train-num-samples", "24", "--val-data",
                       data["val"], "--dataset-type", "webdataset", "--batch-size", "4", "--workers", "0", "--device",
                       "cpu", "--precision", "fp32", "--aug-cfg", "scale=(1.0, 1.0)", "--lock-image",
                       "--frozen-features", str(folder / "features"), *words])  # fmt: skip
    args.rank, args.world_size, args.distributed = 0, 1, False
    return args


LOCKED = ("--lock-text", "--lock-text-freeze-layer-norm")


def locked_model(args: Any) -> tuple[nn.Module, Any, Any]:
    models.register_models()
    models.prepare_model(TINY)
    torch.manual_seed(0)
    model, train, val = open_clip.create_model_and_transforms(
        TINY, precision=args.precision, aug_cfg=args.aug_cfg, output_dict=True
    )
    model.lock_image_tower()
    if args.lock_text:
        model.lock_text_tower(freeze_layer_norm=True)
    return model.eval(), (train, val), open_clip.get_tokenizer(TINY)


def hooked(args: Any) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """A model, OpenCLIP's own data, and those that the plugin makes of them."""
    from open_clip_train.data import get_data

    from openclip_otco.frozen.plugin import FrozenFeaturesPlugin

    model, preprocess, tokenizer = locked_model(args)
    plugin, data = FrozenFeaturesPlugin(), get_data(args, preprocess, epoch=0, tokenizer=tokenizer)
    plugin.prepare_model(args, model)
    own = dict(data)
    before = random_state()
    plugin.prepare_data(args, data, preprocess, tokenizer)
    assert random_state() == before  # a first run goes on as a later one
    return model, own, data


@pytest.mark.parametrize(
    "words", [LOCKED, (), (*LOCKED, "--frozen-image-size", "96"), (*LOCKED, "--precision", "bf16")]
)
def test_batches_of_features_give_what_the_pairs_give(
    tmp_path: Path, words: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    args = arguments(tmp_path, make_data(tmp_path), *words)
    model, own, data = hooked(args)
    assert "1 pairs of --train-data cannot be decoded" in caplog.text
    for split in ("train", "val"):
        for name in ("num_samples", "num_batches"):
            assert getattr(data[split].dataloader, name) == getattr(own[split].dataloader, name)
    half = args.precision == "bf16"
    # Other pairs in the batch, other sums in the tower.
    tolerance = {"rtol": 0.05, "atol": 0.05} if half else {"rtol": 1e-4, "atol": 1e-5}
    for (images, texts), (features, captions) in zip(own["val"].dataloader, data["val"].dataloader, strict=True):
        assert features.ndim == 2
        assert captions.is_floating_point() == args.lock_text
        with torch.no_grad():
            ours, theirs = model(features, captions), model(images.bfloat16() if half else images, texts)
        for name in ("image_features", "text_features"):
            torch.testing.assert_close(ours[name], theirs[name], **tolerance)


def test_training_has_all_pairs_in_the_seed_s_order(tmp_path: Path) -> None:
    orders = []
    for seed in (0, 0, 1):
        _, _, data = hooked(arguments(tmp_path, make_data(tmp_path), *LOCKED, "--seed", str(seed)))
        epochs = []
        for epoch in (0, 1, 0):
            data["train"].set_epoch(epoch)
            epochs.append([torch.cat(batch, dim=1) for batch in data["train"].dataloader])
        assert [len(batch) for batch in epochs[0]] == [4] * 6
        assert all(map(torch.equal, epochs[0], epochs[2]))
        assert not all(map(torch.equal, epochs[0], epochs[1]))
        # 23 pairs can be decoded, so that one of 24 comes twice.
        assert len(torch.cat(epochs[0]).unique(dim=0)) == 23
        orders.append(torch.cat(epochs[0]))
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--loss", "simclr"), "--loss simclr makes views of images"),
        (("--distill-model", "RN50", "--distill-pretrained", "openai"), "--distill-model sees images, too"),
        (
            ("--aug-cfg", "use_timm=True", "scale=(1.0, 1.0)", "ratio=(1.0, 1.0)", "re_prob=0.01"),
            "augmentation is random",
        ),
        (("--dataset-resampled",), "--dataset-resampled draws shards"),
        (("--aug-cfg", "scale=(0.5, 1.0)"), "augmentation is random"),
        (("--val-data", "data.csv", "--dataset-type", "auto"), "--val-data is no WebDataset"),
        (("--val-data", "pipe:cat 0.tar"), "pipe:cat 0.tar is not local"),
    ],
)
def test_what_features_cannot_replace_is_read_from_the_shards(
    tmp_path: Path, words: tuple[str, ...], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    from openclip_otco.frozen.plugin import FrozenFeaturesPlugin

    args = arguments(tmp_path, make_data(tmp_path), *LOCKED, *words)
    model, preprocess, tokenizer = locked_model(args)
    plugin, data = FrozenFeaturesPlugin(), {"train": object(), "val": object()}
    own = dict(data)
    plugin.prepare_model(args, model)
    with caplog.at_level(logging.INFO):
        plugin.prepare_data(args, data, preprocess, tokenizer)
    assert data == own
    (line,) = [record.getMessage() for record in caplog.records if "read from the shards" in record.getMessage()]
    assert told in line


def test_only_a_text_tower_locked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from openclip_otco.frozen.plugin import FrozenFeaturesPlugin

    args = arguments(tmp_path, make_data(tmp_path), *LOCKED)
    args.lock_image = False
    model, preprocess, tokenizer = locked_model(args)
    for parameter in model.visual.parameters():
        parameter.requires_grad = True
    plugin = FrozenFeaturesPlugin()
    plugin.prepare_model(args, model)
    with caplog.at_level(logging.INFO):
        plugin.prepare_data(args, {}, preprocess, tokenizer)
    assert "as the image tower is not locked" in caplog.text


@pytest.mark.parametrize("broken", ["missing", "empty"])
def test_shards_that_cannot_be_read_end_with_one_line(tmp_path: Path, broken: str) -> None:
    data = make_data(tmp_path)
    shard = tmp_path / "val" / "0000.tar"
    shard.unlink() if broken == "missing" else write_shard(shard, [(b"no picture", b"a caption")])
    with pytest.raises(RuntimeError, match=str(shard) if broken == "missing" else "--val-data: none of its 1 pairs"):
        hooked(arguments(tmp_path, data, *LOCKED))


def test_features_are_made_once_for_all_runs_with_one_tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from openclip_otco.frozen.towers import FrozenTower

    compute, encoded = FrozenTower.compute, []

    def counting(self: FrozenTower, inputs: Tensor) -> Tensor:
        encoded.append((self.kind, len(inputs)))
        return compute(self, inputs)

    monkeypatch.setattr(FrozenTower, "compute", counting)
    data = make_data(tmp_path)
    hooked(arguments(tmp_path, data, *LOCKED))
    # Five pictures in training; the same ones in validation, through another transform.
    assert sorted(encoded) == [("image", 5), ("image", 5), ("text", 24)]
    encoded.clear()
    # The same files under another name, with the pairs changed.
    (tmp_path / "train" / "0000.tar").rename(tmp_path / "train" / "0002.tar")
    write_shard(tmp_path / "train" / "0000.tar", [(picture(1), pairs_of(n)[0][1]) for n in (4, 9, 30)])
    hooked(arguments(tmp_path, {**data, "train": str(tmp_path / "train" / "{0000..0002}.tar")}, *LOCKED))
    assert encoded == [("text", 1)]


def _rank(rank: int, world: int, folder: Path, shared: bool) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", world_size=world, rank=rank)
    own = folder if shared else folder / str(rank)
    args = arguments(own, {split: str(folder / split / name) for split, name in
                           (("train", "{0000..0001}.tar"), ("val", "0000.tar"))}, *LOCKED)  # fmt: skip
    args.rank, args.world_size, args.distributed, args.batch_size = rank, world, True, 4 // world
    try:
        _, _, data = hooked(args)
        torch.save([torch.cat(batch, dim=1) for batch in data["train"].dataloader], folder / f"{world}-{rank}.pt")
    except RuntimeError as error:
        (folder / f"error-{rank}").write_text(str(error))
    torch.distributed.destroy_process_group()


def test_ranks_have_the_steps_of_one(tmp_path: Path) -> None:
    make_data(tmp_path)
    for world in (2, 1):
        start_ranks(_rank, world, tmp_path, True)
        (tmp_path / "store").unlink(missing_ok=True)
        if world == 2:
            parts = list((tmp_path / "features").glob("*-*/part-*"))
            before = {part: part.stat().st_mtime_ns for part in parts}
    # The second run found all that the ranks had made, each row once.
    after = {part: part.stat().st_mtime_ns for part in (tmp_path / "features").glob("*-*/part-*")}
    assert after == before
    sizes = {table: len(FeatureTable(table)) for table in {part.parent for part in parts}}
    assert sorted(sizes.values()) == [5, 5, 24]
    steps = {name: torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1")}
    for whole, *halves in zip(*steps.values(), strict=True):
        assert torch.equal(whole, torch.cat(halves))


def _rank_with_little_patience(rank: int, world: int, folder: Path) -> None:
    from openclip_otco.frozen import data

    data._SECONDS_TO_APPEAR = 1.0
    _rank(rank, world, folder, False)


def test_ranks_that_do_not_share_the_folder_are_told(tmp_path: Path) -> None:
    make_data(tmp_path)
    start_ranks(_rank_with_little_patience, 2, tmp_path)
    for rank in range(2):
        told = (tmp_path / f"error-{rank}").read_text()
        assert f"rank {rank} does not see what other ranks wrote; name a folder that all ranks share" in told


def _rank_that_sees_less(rank: int, world: int, folder: Path) -> None:
    find = FeatureTable.find

    def without_the_first(self: FeatureTable, keys: torch.Tensor) -> torch.Tensor:
        found = find(self, keys)
        if rank == 1 and self.folder.name.startswith("image") and len(found) > 1:
            found[0] = -1
        return found

    FeatureTable.find = without_the_first  # type: ignore[method-assign]
    _rank(rank, world, folder, True)


def test_ranks_that_see_other_features_do_not_train(tmp_path: Path) -> None:
    """As where the disk that two machines share shows new files to one of them first."""
    make_data(tmp_path)
    start_ranks(_rank, 2, tmp_path, True)
    (tmp_path / "store").unlink(missing_ok=True)
    start_ranks(_rank_that_sees_less, 2, tmp_path)
    for rank in range(2):
        told = (tmp_path / f"error-{rank}").read_text()
        assert "ranks see different features there; start the training again" in told


@pytest.mark.training
def test_a_run_on_features_is_the_same_again(tmp_path: Path) -> None:
    """From the first encoding to the last log line, by OpenCLIP's script."""
    data = make_data(tmp_path)
    words = ["--model", TINY, "--train-data", data["train"], "--train-num-samples", "24", "--val-data", data["val"],
             "--dataset-type", "webdataset", "--batch-size", "8", "--epochs", "2", "--workers", "1", "--warmup", "2",
             "--lr", "1e-2", "--log-every-n-steps", "1", "--device", "cpu", "--precision", "fp32", "--aug-cfg",
             "scale=(1.0, 1.0)", "--logs", str(tmp_path), "--lock-image", *LOCKED, "--frozen-features",
             str(tmp_path / "features")]  # fmt: skip
    steps = []
    for name, more in (("cold", ()), ("warm", ()), ("other", ("--seed", "1"))):
        output = tmp_path / f"{name}.txt"
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        run = Fork("open_clip_train.main", [*words, "--name", name, *more], tmp_path, environment, output)
        assert run.wait() == 0, output.read_text()[-4000:]
        log = (tmp_path / name / "out.log").read_text()
        assert "Frozen features: train has 23 pairs of 2 shards, all encoded" in log
        found = [
            re.sub(r"Data \(t\).*?LR", "LR", line.split(" | ")[-1]) for line in log.splitlines() if "Epoch: " in line
        ]
        steps.append(found)
    assert sum("Train Epoch" in line for line in steps[0]) == 6
    assert steps[0] == steps[1]
    assert steps[0] != steps[2]
