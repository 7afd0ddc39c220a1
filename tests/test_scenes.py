"""The scenes data set: equal bytes, honest captions, real near misses, exact mismatches, and OpenCLIP reads it."""

import io
import json
import random
import re
import tarfile
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from commands import command
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from openclip_otco.errors import UserError
from openclip_otco.scenes.caption import MAX_WORDS, MIN_WORDS, describe
from openclip_otco.scenes.mismatch import mismatch
from openclip_otco.scenes.near_miss import NEAR_MISSES, near_miss
from openclip_otco.scenes.pairs import make_pairs
from openclip_otco.scenes.picture import place, render
from openclip_otco.scenes.scene import LAYOUTS, draw_scene
from openclip_otco.scenes.shards import Settings, write_scenes

SMALL = Settings(train=60, val=24, mismatch=0.4, seed=3, shards=3)

# Written anew, not taken from the package: what an English reader takes the words to mean.
KINDS = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "black")
COLOUR_WORDS = {word: word for word in COLOURS} | {"violet": "purple"}
KIND_WORDS = {word: word for word in KINDS} | {
    "disc": "circle", "box": "square", "rhombus": "diamond", "plus": "cross", "hoop": "ring"
}  # fmt: skip
SIZE_WORDS = {"big": "big", "large": "big", "small": "small", "little": "small", "tiny": "small"}
RGB_OF = {
    "red": (214, 36, 40), "green": (38, 150, 58), "blue": (38, 84, 214), "yellow": (240, 212, 30),
    "orange": (244, 132, 20), "purple": (124, 44, 168), "pink": (244, 128, 190), "black": (28, 28, 30),
}  # fmt: skip
PHRASE = re.compile(
    rf"\b(?:an?|one) ((?:(?:{'|'.join(SIZE_WORDS)}) )?(?:(?:{'|'.join(COLOUR_WORDS)}) )?"
    rf"(?:shape|{'|'.join(KIND_WORDS)}))\b(?: sign)?"
)


def read(folder: Path) -> dict[str, dict[str, bytes]]:
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, extension = member.name.split(".")
                stream = tar.extractfile(member)
                assert stream is not None
                samples.setdefault(key, {})[extension] = stream.read()
    return samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scenes") / "set"
    assert write_scenes(path, SMALL)
    return path


def phrases(caption: str) -> tuple[list[dict[str, str]], str]:
    """The things that a caption names, in its order, and the caption with a letter in place of each."""
    found: list[dict[str, str]] = []

    def take(match: re.Match[str]) -> str:
        facts = {}
        for word in match.group(1).split():
            for fact, words in (("size", SIZE_WORDS), ("colour", COLOUR_WORDS), ("kind", KIND_WORDS)):
                if word in words:
                    facts[fact] = words[word]
        found.append(facts)
        return "ABC"[len(found) - 1]

    return found, PHRASE.sub(take, caption.lower().rstrip("."))


def fits(phrase: dict[str, str], thing: dict) -> bool:
    return all(thing[fact] == value for fact, value in phrase.items())


# What each relation of two named things says of their centres: sign of x_A - x_B, or of y_A - y_B (y runs down).
RELATIONS = [
    (r"A (?:is |is placed |has been put )?(?:to the )?left of B", "x", -1),
    (r"A (?:is |is placed )?(?:to the )?right of B", "x", +1),
    (r"A with B on its left", "x", +1),
    (r"A with B on its right", "x", -1),
    (r"A on the left(?:,| and| in the middle)? (?:and )?B on the right", "x", -1),
    (r"on the left A, on the right B", "x", -1),
    (r"to the right of A there is B", "x", -1),
    (r"left of A is B", "x", +1),
    (r"A (?:is |has been put )?(?:above|over) B", "y", -1),
    (r"A (?:is |is placed )?(?:below|under|underneath) B", "y", +1),
    (r"A with B above it", "y", +1),
    (r"A with B below it", "y", -1),
    (r"A at the top and B at the bottom", "y", -1),
    (r"at the top A, at the bottom B", "y", -1),
    (r"beneath A there is B", "y", -1),
    (r"above A is B", "y", +1),
    (r"A.* from left to right|from left to right: A", "x", -1),
    (r"A.* from right to left", "x", +1),
    (r"A.* from top to bottom|from top to bottom: A", "y", -1),
    (r"A.* from bottom to top", "y", +1),
]


def check_caption(caption: str, things: list[dict], layout: str) -> bool:
    """Asserts that a caption is true; tells whether it was one whose relation this checker understands."""
    named, frame = phrases(caption)
    assert len(named) == len(things), caption
    assert not set(re.findall(r"[a-z]+", frame)) & (set(COLOUR_WORDS) | set(KIND_WORDS) | set(SIZE_WORDS)), caption
    orders = [
        order
        for order in np.ndindex(*[len(things)] * len(things))
        if len(set(order)) == len(things)
        and all(fits(phrase, things[i]) for phrase, i in zip(named, order, strict=True))
    ]
    assert orders, caption
    if len(things) == 1:
        stated = {word for word in ("left", "right", "top", "bottom") if word in frame.split()}
        x, y = things[0]["x"], things[0]["y"]
        truth = {"left": x < 0.4, "right": x > 0.6, "top": y < 0.4, "bottom": y > 0.6}
        assert all(truth[word] for word in stated), caption
        return bool(stated)
    for pattern, axis, sign in RELATIONS:
        if re.search(pattern, frame):
            places = [[things[i][axis] for i in order] for order in orders]
            assert any(
                all(sign * (a - b) > 0.05 for a, b in pairwise(row))
                if "from" in pattern
                else sign * (row[0] - row[1]) > 0.05
                for row in places
            ), (caption, things)
            return True
    return False


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_captions_are_true_of_their_scenes(seed: int) -> None:
    rng = random.Random(seed)
    scene = draw_scene(rng)
    spots = place(scene, rng)
    things = [{**vars(t), **vars(s)} for t, s in zip(scene.things, spots, strict=True)]
    caption = describe(scene, rng)
    assert MIN_WORDS <= len(caption.split()) <= MAX_WORDS
    check_caption(caption, things, scene.layout)


def test_the_checker_understands_most_captions_of_two_things_and_rejects_false_ones() -> None:
    rng = random.Random(0)
    understood = rejected = total = 0
    while total < 200:
        scene = draw_scene(rng)
        if "two" not in scene.layout or len(scene.things) != 2:
            continue
        total += 1
        things = [{**vars(t), **vars(s)} for t, s in zip(scene.things, place(scene, rng), strict=True)]
        caption = describe(scene, rng)
        understood += check_caption(caption, things, scene.layout)
        for thing in things:
            thing["x"], thing["y"] = 1 - thing["x"], 1 - thing["y"]
        try:
            check_caption(caption, things, scene.layout)
        except AssertionError:
            rejected += 1
    assert understood > 170
    assert rejected > 140  # the rest name no relation, or things that their phrases do not tell apart


def test_stored_captions_are_true_and_pixels_have_the_named_colours(folder: Path) -> None:
    for split in ("train", "val"):
        for sample in read(folder / split).values():
            facts = json.loads(sample["json"])
            check_caption(facts["caption"], facts["things"], facts["layout"])
            image = Image.open(io.BytesIO(sample["jpg"]))
            assert image.size == (64, 64)
            pixels = np.asarray(image, dtype=float)
            for thing in facts["things"]:
                # a ring's centre is background; its rim is not
                x = thing["x"] + (0.78 * thing["radius"] if thing["kind"] == "ring" else 0)
                column, row = int(64 * x), int(64 * thing["y"])
                colour = pixels[row, column]
                nearest = min(RGB_OF, key=lambda name: float(np.abs(colour - RGB_OF[name]).sum()))
                if thing["kind"] == "ring" and thing["size"] == "small":
                    assert np.abs(colour - RGB_OF[thing["colour"]]).max() < 150  # its rim is 2 pixels wide
                else:
                    assert nearest == thing["colour"], (facts, colour)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32))
def test_near_misses_differ_by_what_their_name_says(seed: int) -> None:
    rng = random.Random(seed)
    scene = draw_scene(rng)
    name, other = near_miss(scene, rng)
    assert name in NEAR_MISSES
    assert other != scene
    assert len(other.things) == len(scene.things) == len(LAYOUTS[other.layout])
    if name == "mirrored":
        assert sorted(map(str, other.things)) == sorted(map(str, scene.things))
    else:
        assert other.layout == scene.layout
        facts = {"colours swapped": "colour", "resized": "size", "recoloured": "colour", "reshaped": "kind"}[name]
        for a, b in zip(scene.things, other.things, strict=True):
            assert all(getattr(a, f) == getattr(b, f) for f in ("kind", "colour", "size") if f != facts)


def test_pairs_are_unique_disjoint_and_come_in_families() -> None:
    val = make_pairs(1000, "0 val")
    train = make_pairs(3000, "0 train", avoid={pair.scene for pair in val})
    for pairs in (val, train):
        assert len({pair.scene for pair in pairs}) == len(pairs)
        assert len({pair.caption for pair in pairs}) == len(pairs)
        assert sum(pair.near_miss != "" for pair in pairs) > 0.3 * len(pairs)
        assert {pair.near_miss for pair in pairs} == {"", *NEAR_MISSES}
        bases = {pair.family: index for index, pair in enumerate(pairs) if not pair.near_miss}
        assert set(bases) == {pair.family for pair in pairs}
        gaps = [abs(bases[pair.family] - index) for index, pair in enumerate(pairs) if pair.near_miss]
        assert np.mean(gaps) > len(pairs) / 5  # families are spread, not in a run
    assert not {pair.scene for pair in val} & {pair.scene for pair in train}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from("abcdefghij"), min_size=2, max_size=60), st.floats(0, 1), st.integers(0, 99))
def test_mismatch_is_a_derangement_of_the_asked_share(captions: list[str], share: float, seed: int) -> None:
    try:
        donors = mismatch(captions, share, random.Random(seed))
    except UserError:
        # More than half of the chosen have the same text, so that they cannot all get another one.
        chosen = random.Random(seed).sample(range(len(captions)), round(share * len(captions)))
        ((_, most),) = Counter(captions[each] for each in chosen).most_common(1)
        assert 2 * most > len(chosen)
        return
    assert len(donors) == round(share * len(captions))
    assert set(donors) == set(donors.values())
    assert all(captions[taker] != captions[donor] for taker, donor in donors.items())


def test_equal_settings_give_equal_bytes_and_another_seed_does_not(folder: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path / "again", SMALL)
    write_scenes(tmp_path / "other", Settings(**{**vars(SMALL), "seed": 4}))
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert names == sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file())
    assert all((folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)
    assert (folder / "train/0000.tar").read_bytes() != (tmp_path / "other/train/0000.tar").read_bytes()


def test_mismatch_changes_the_captions_of_training_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path / "clean", Settings(**{**vars(SMALL), "mismatch": 0.0}))
    noisy, clean = read(folder / "train"), read(tmp_path / "clean" / "train")
    assert read(folder / "val") == read(tmp_path / "clean" / "val")
    assert list(noisy) == list(clean)
    wrong = 0
    for key, sample in noisy.items():
        facts = json.loads(sample["json"])
        own = clean[key]["txt"].decode()
        assert sample["jpg"] == clean[key]["jpg"]
        assert facts["caption"] == own
        assert facts["matched"] == (sample["txt"].decode() == own)
        if not facts["matched"]:
            wrong += 1
            assert facts["donor"] != key
            assert sample["txt"] == clean[facts["donor"]]["txt"]
    assert wrong == round(SMALL.mismatch * SMALL.train)
    assert all(json.loads(sample["json"])["matched"] for sample in read(folder / "val").values())


def test_webdataset_and_openclip_read_the_shards(folder: Path) -> None:
    import webdataset as wds
    from open_clip_train.data import get_wds_dataset

    urls = str(folder / "val" / "{0000..0002}.tar")
    samples = list(wds.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert len(samples) == SMALL.val
    assert {"jpg", "txt", "json"} <= set(samples[0])

    args = SimpleNamespace(
        train_data=str(folder / "train" / "{0000..0002}.tar"), val_data=urls, train_num_samples=None,
        val_num_samples=None, train_data_upsampling_factors=None, dataset_resampled=False, batch_size=8, workers=0,
        world_size=1, seed=0,
    )  # fmt: skip
    for is_train, count in ((True, 64), (False, SMALL.val)):
        info = get_wds_dataset(args, np.asarray, is_train, tokenizer=lambda text: [text])
        batches = list(info.dataloader)
        assert sum(len(texts) for _, texts in batches) == count
        assert batches[0][0][0].shape == (64, 64, 3)
    assert json.loads((folder / "train/sizes.json").read_text()) == {"0000.tar": 20, "0001.tar": 20, "0002.tar": 20}


def scenes(*words: object) -> int:
    return command("scenes", *words)


def test_the_command_reuses_replaces_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--train", 4, "--val", 4, "--shards", 2)
    out = tmp_path / "out"
    assert scenes(out, *few) == 0
    first = (out / "train/0001.tar").stat().st_mtime_ns
    assert scenes(out, *few) == 0
    assert "already there" in capsys.readouterr().out
    assert (out / "train/0001.tar").stat().st_mtime_ns == first

    assert scenes(out, *few, "--seed", 1) == 2
    assert "--force" in capsys.readouterr().err
    (out / "mine.txt").write_text("kept")
    assert scenes(out, *few, "--seed", 1, "--force") == 0
    assert (out / "mine.txt").read_text() == "kept"
    assert sorted(p.name for p in out.iterdir()) == ["mine.txt", "settings.json", "train", "val"]

    (out / "train/0001.tar").unlink()
    assert scenes(out, *few, "--seed", 1) == 0
    assert (out / "train/0001.tar").is_file()

    (out / "settings.json").unlink()
    assert scenes(out, *few) == 2
    assert "not a scenes data set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--train", 0], "--train"),
        (["--val", 3], "--val"),
        (["--mismatch", 1.5], "--mismatch"),
        (["--mismatch", "nan"], "--mismatch"),
        (["--mismatch", 0.0002], "--mismatch"),
        (["--size", 8], "--size"),
        (["--shards", 0], "--shards"),
    ],
)
def test_bad_values_get_one_line_that_names_the_flag(
    words: list, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scenes(tmp_path / "out", *words) == 2
    error = capsys.readouterr().err.strip()
    assert named in error
    assert "\n" not in error
    assert not (tmp_path / "out").exists()


def test_pictures_vary_with_the_random_stream() -> None:
    scene = draw_scene(random.Random(5))
    first, again, other = (
        render(scene, place(scene, rng), 64, rng) for rng in (random.Random(1), random.Random(1), random.Random(2))
    )
    assert first == again != other
