"""Study files: what is wrong in one is told in one line, and flags come from other studies and losses."""

import tomllib
from pathlib import Path

import pytest
from commands import command
from study_fixtures import ONE_SEED, run

from openclip_otco.study.study_file import load


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[study]", "[study", "not TOML"),
        ("epochs = 3", "epochs = 3\nepochs = 4", "not TOML"),
        ("[study]", "[stduy]", "stduy is unknown"),
        ('note = "A note."', 'nota = "A note."', "study.nota is unknown (known: flags-of, name, note, seeds)"),
        ('note = "A note."', "note = 3", "study.note must be a string"),
        ('name = "small"', "", "study.name is missing"),
        ('name = "small"', 'name = "../small"', "study.name needs a name"),
        ("seeds = [0]", "seeds = []", "study.seeds must be a list"),
        ("seeds = [0]", "seeds = [true]", "study.seeds must be a list"),
        ("seeds = [0]", "seeds = [1, 1]", "study.seeds names a seed twice"),
        ('note = "A note."', "flags-of = 3", "study.flags-of must be a string"),
        (
            'note = "A note."',
            'flags-of = "nobody"',
            "study.flags-of names a study that cannot be used: nobody: no such",
        ),
        (
            'note = "A note."',
            'flags-of = "../nobody"',
            "study.flags-of names a study that cannot be used: ../nobody: no such",
        ),
        ('train-data = "train.csv"', 'scenes = {mismatch = "0.4"}', "data.clean.scenes.mismatch must be a number"),
        ('note = "A note."', 'flags-of = "study"', "study.flags-of leads back to study.toml"),
        ("epochs = 3", "", "flags.epochs must be given"),
        ("epochs = 3", "epochs = 0", "flags.epochs must be given"),
        ("epochs = 3", "epochs = 3\nlr = {a = 1}", "flags.lr must be a number"),
        ("epochs = 3", "epochs = 3\nlr = []", "flags.lr must be a number"),
        ("epochs = 3", "epochs = 3\nseed = 1", "flags.seed is unknown here"),
        ("epochs = 3", 'epochs = 3\n"--lr" = 1', "flags.--lr is no flag name"),
        ('train-data = "train.csv"', "", "data.clean needs scenes, flickr8k or train-data"),
        ('train-data = "train.csv"', 'scenes = "a"', "data.clean.scenes must be a table"),
        ('train-data = "train.csv"', 'train-data = "a"\nscenes = {}', "data.clean.train-data cannot be given"),
        ("[data.clean]", "[data.clean--er]", "data.clean--er needs a name"),
        ("[data.clean]", "[flags.data]", "flags.data must be a number"),
        ('[data.clean]\ntrain-data = "train.csv"', "", "data is missing"),
        ('[data.clean]\ntrain-data = "train.csv"', "[data]", "data needs at least one table [data.NAME]"),
        ('[data.clean]\ntrain-data = "train.csv"', "[data]\nclean = 1", "data.clean must be a table"),
        ('loss = "otco"', "", "loss.otco.loss is missing"),
        ("otco-confidence = 1.0", 'name = "x"', "loss.otco.name is unknown here"),
        ("otco-confidence = 1.0", 'like = "clip"', "loss.otco.loss cannot be given together with like"),
        ('loss = "otco"', 'like = "otco"', "loss.otco.like names no loss above it (clip"),
    ],
)
def test_bad_study_is_one_line(home, capsys, old, new, message):
    assert old in ONE_SEED
    assert run(ONE_SEED.replace(old, new)) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert err.startswith("openclip-otco compare: study.toml: ")
    assert message in err
    assert not Path("runs").exists()


def test_a_study_takes_the_flags_of_another(home):
    first = ONE_SEED.replace('name = "small"', 'name = "small"\nflags-of = "other"').replace("epochs = 3", "lr = 0.5")
    Path("study.toml").write_text(first)
    Path("other.toml").write_text(ONE_SEED.replace("epochs = 3", "epochs = 7\nlr = 0.1\nwd = 0.2"))
    expected = {**load("other.toml").flags, **tomllib.loads(first)["flags"]}
    assert list(load("study.toml").flags.items()) == list(expected.items())
    assert load("study.toml").flags["lr"] == 0.5
    Path("other.toml").unlink()
    Path("study.toml").write_text(first.replace('"other"', '"quickstart"'))
    assert load("study.toml").flags["warmup"] == load("quickstart").flags["warmup"]


def test_a_loss_like_another_with_a_flag_changed(home):
    more = '[loss.a]\nloss = "otco"\notco-epsilon = 0.1\notco-window = 2\n[loss.b]\nlike = "a"\notco-epsilon = 0.2\n'
    Path("study.toml").write_text(ONE_SEED + more)
    *_, a, b = load("study.toml").losses
    assert (a.loss, list(a.flags.items())) == ("otco", [("otco-epsilon", 0.1), ("otco-window", 2)])
    assert (b.loss, list(b.flags.items())) == ("otco", [("otco-epsilon", 0.2), ("otco-window", 2)])


def test_no_such_study(home, capsys):
    assert command("compare", "nowhere.toml") == 2
    assert "nowhere.toml: no such file, nor a shipped study (flickr8k-ablations" in capsys.readouterr().err


def test_quickstart_is_shipped(home):
    study = load("quickstart")
    assert [loss.loss for loss in study.losses] == ["clip", "otco"]
    assert study.needs_patch
    assert study.data[0].scenes == {"mismatch": 0.4, "seed": 0}
