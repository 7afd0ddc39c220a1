"""What `compare` prints to look at: commands of one run with plans, ready to be copied into a shell."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import pytest

from openclip_otco.study import look
from openclip_otco.study.run import runs
from openclip_otco.study.study_file import load

STUDY = """
[study]
name = "small"

[flags]
model = "RN10t-bert-tiny"
epochs = 2

[data.clean]
scenes = {mismatch = 0.0}

[data.mismatch-40]
scenes = {mismatch = 0.4}

[data.rows]
train-data = "rows.csv"

[loss.clip]
loss = "clip"

[loss.plans]
loss = "otco"
"""


def studied(folder: Path, text: str = STUDY) -> tuple:
    """A study in a folder whose name needs quotes, all of its runs finished."""
    (folder / "study.toml").write_text(text)
    study, out = load(str(folder / "study.toml")), folder / "out of it"
    for setting in ("clean", "mismatch-40"):
        shards = out / "data" / setting / "train"
        shards.mkdir(parents=True)
        for number in range(3):
            (shards / f"{number:04d}.tar").touch()
    cross = runs(study, out)
    for run in cross:
        run.checkpoint.parent.mkdir(parents=True)
        run.checkpoint.touch()
    return study, cross, out


def test_the_noisiest_run_with_plans_is_shown(tmp_path):
    study, cross, out = studied(tmp_path)
    audit, inspect = (shlex.split(line) for line in look.commands(study, cross, {run.name for run in cross}))
    run = out / "runs" / "mismatch-40--plans--s0"
    assert audit[1:] == [
        "audit", "--checkpoint", str(run / "checkpoints" / "epoch_2.pt"),
        "--data", f"{out}/data/mismatch-40/train/{{0000..0002}}.tar", "--out", str(run / "audit"),
    ]  # fmt: skip
    assert inspect[1:] == ["inspect", str(run)]


def test_inspect_accepts_the_printed_command(tmp_path):
    from openclip_otco.inspect import command

    study, cross, _ = studied(tmp_path)
    _, inspect = look.commands(study, cross, {run.name for run in cross})
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert parser.parse_args(shlex.split(inspect)[2:]).run_dir.is_dir()


def test_only_finished_runs_with_plans_checkpoint_and_shards_count(tmp_path):
    study, cross, _ = studied(tmp_path)
    names = {run.name for run in cross}
    assert look.commands(study, cross, names - {"mismatch-40--plans--s0"})[1].endswith("clean--plans--s0'")
    assert look.commands(study, cross, {"rows--plans--s0", "clean--clip--s0"}) == []
    for run in cross:
        run.checkpoint.unlink()
    assert look.commands(study, cross, names) == []


@pytest.mark.parametrize("on_path", [True, False])
def test_the_program_is_called_by_its_name_or_by_its_path(tmp_path, monkeypatch, on_path):
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    program = folder / "openclip-otco"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setenv("PATH", str(folder) if on_path else "/nowhere")
    monkeypatch.chdir(tmp_path)
    study, cross, _ = studied(tmp_path)
    (line, _) = look.commands(study, cross, {run.name for run in cross})
    assert shlex.split(line)[0] == ("openclip-otco" if on_path else ".venv/bin/openclip-otco")
