"""The shards that a study trains on: their names, and scenes that are made once."""

import sys
from pathlib import Path

import pytest
from study_fixtures import ONE_SEED, calls, run
from webdataset.shardlists import expand_urls

from openclip_otco.study import shards
from openclip_otco.study.run import runs
from openclip_otco.study.study_file import load


@pytest.mark.parametrize(
    "names",
    [
        [f"{number:04d}.tar" for number in range(8)],
        [f"{number:03d}.tar" for number in range(95, 105)],
        ["0000.tar"],
        ["0000.tar", "0002.tar"],
        ["8.tar", "9.tar", "10.tar"],
        ["a.tar", "b.tar"],
    ],
)
def test_pattern_expands_to_the_shards(names):
    pattern = shards.pattern("some/folder", names)
    # OpenCLIP splits at `::` as webdataset does.
    assert sorted(expand_urls(pattern)) == sorted(f"some/folder/{name}" for name in names)


def test_pattern_of_a_range_is_short():
    assert shards.pattern("d", [f"{number:04d}.tar" for number in range(8)]) == "d/{0000..0007}.tar"


SCENES_STUDY = ONE_SEED.replace('train-data = "train.csv"', "scenes = {mismatch = 0.4, seed = 0}")
FAKE_SCENES = """
import json, sys
from pathlib import Path

with open("scenes-calls.txt", "a") as calls:
    print(*sys.argv[2:], file=calls)
for split, count in (("train", 3), ("val", 1)):
    folder = Path(sys.argv[1]) / split
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number:04d}.tar").touch()
    (folder / "sizes.json").write_text(json.dumps({f"{number:04d}.tar": 400 for number in range(count)}))
"""


@pytest.fixture
def scenes(home, monkeypatch):
    Path("scenes.py").write_text(FAKE_SCENES)

    def command(setting, folder):
        return [sys.executable, "scenes.py", str(folder), *map(str, setting.scenes.values())]

    monkeypatch.setattr(shards, "scenes_command", command)
    return Path("scenes-calls.txt")


def test_scenes_are_made_once(scenes):
    assert run(SCENES_STUDY) == 0
    assert run(SCENES_STUDY) == 0
    assert scenes.read_text().splitlines() == ["0.4 0"]
    assert len(calls()) == 2
    Path("study.toml").write_text(SCENES_STUDY)
    cross = runs(load("study.toml"), Path("runs/small"))
    assert cross[0].samples_per_epoch == 1200
    command = cross[0].command()
    assert command[command.index("--train-data") + 1] == "runs/small/data/clean/train/{0000..0002}.tar"
    assert command[command.index("--val-data") + 1] == "runs/small/data/clean/val/0000.tar"


def test_other_scenes_are_made_anew_and_trained_on(scenes):
    assert run(SCENES_STUDY) == 0
    assert run(SCENES_STUDY.replace("0.4", "0.2")) == 0
    assert scenes.read_text().splitlines() == ["0.4 0", "0.2 0"]
    assert len(calls()) == 4


def test_scenes_leave_a_folder_of_others_alone(scenes, capsys):
    Path("runs/small/data/clean").mkdir(parents=True)
    assert run(SCENES_STUDY) == 2
    assert "in the way" in capsys.readouterr().err
    assert Path("runs/small/data/clean").exists()


def test_scenes_that_fail(scenes, capsys):
    Path("scenes.py").write_text("import sys; sys.exit('no such mismatch')")
    assert run(SCENES_STUDY) == 2
    assert "data.clean: scenes failed (exit 1): no such mismatch" in capsys.readouterr().err


def test_scenes_command(home):
    Path("study.toml").write_text(SCENES_STUDY)
    command = shards.scenes_command(load("study.toml").data[0], Path("there"))
    assert command[1:] == ["-m", "openclip_otco.cli", "scenes", "there", "--mismatch", "0.4", "--seed", "0"]
