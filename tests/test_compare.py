"""`compare`: runs that resume, failures, kills, and what it reports; OpenCLIP itself is played by a script."""

import asyncio
import errno
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import command
from forks import PATIENCE
from study_fixtures import (
    ONE_SEED,
    STUDY,
    arguments,
    calls,
    compare_in_a_process,
    expected_recalls,
    finished,
    hanging,
    is_alive,
    run,
)

from openclip_otco.errors import UserError
from openclip_otco.study import compare, results
from openclip_otco.study.run import Run, RunFailed, runs
from openclip_otco.study.study_file import load


def test_whole_study(home, drawn, capsys):
    assert run(STUDY) == 0
    out, err = capsys.readouterr()
    assert calls() == [f"clean--{loss}--s{seed}" for seed in range(3) for loss in ("clip", "otco")]
    kept = results.read(home / "runs/small/results.jsonl")
    assert [result.run for result in kept] == calls()
    for result in kept:
        sums = [100 * expected_recalls(result.loss, result.seed, epoch).sum() for epoch in range(3)]
        assert result.rsum_last == pytest.approx(sums[2])
        assert result.rsum_best == pytest.approx(max(sums))
        assert result.epoch_best == 1 + int(np.argmax(sums))
        assert result.device == "cpu"
        assert {"openclip-otco", "torch", "open_clip_torch", "Python"} <= result.versions.keys()
        # 5 steps of 0.6 s and 4 of 1 s in each of 3 epochs, and the first step of the last 2 epochs at 0.1 s.
        assert result.seconds_per_step == pytest.approx((3 * (5 * 0.6 + 4 * 1.0) + 2 * 0.1) / 29)
        assert str(home) not in json.dumps(result.flags)
    assert "clean--otco--s1: rsum" in err
    pictures = [f"{name}.{ending}" for name in ("rsum", "recalls", "cost") for ending in ("png", "svg")]
    written = [home / "runs/small" / name for name in ("table.md", *pictures)]
    assert out.splitlines()[-7:] == [str(path.relative_to(home)) for path in written]
    page = written[0].read_text()
    assert out.startswith(page)
    assert str(home) not in page
    assert "A note." in page
    assert "`openclip-otco compare study.toml`" in page
    for png, svg in (written[1:3], written[3:5], written[5:7]):
        assert png.read_bytes().startswith(b"\x89PNG")
        assert "<svg" in svg.read_text()
        assert str(home) not in svg.read_text()


def test_command_line(home):
    Path("study.toml").write_text(STUDY)
    clip, otco = runs(load("study.toml"), Path("there"))[:2]
    command = otco.command()
    assert command[:3] == [sys.executable, "-m", "openclip_otco.train"]
    assert " ".join(command[3:]) == (
        "--save-frequency 0 --val-frequency 1 --model any --epochs 3 --aug-cfg a=1 b=2 --grad-checkpointing "
        "--train-data train.csv --loss otco --otco-confidence 1.0 --logs there/runs --name clean--otco--s0 --seed 0"
    )
    # Unpatched OpenCLIP has to be able to train the baseline.
    assert "--loss" not in clip.command()


def test_siglip_is_a_switch(home):
    Path("study.toml").write_text(ONE_SEED.replace('loss = "clip"', 'loss = "siglip"'))
    command = runs(load("study.toml"), Path("there"))[0].command()
    assert "--siglip" in command
    assert "--loss" not in command


def test_dry_run_runs_nothing(home, capsys):
    assert run(ONE_SEED, "--dry-run") == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert not Path("runs").exists()


def test_finished_runs_are_kept(home):
    assert run(ONE_SEED) == 0
    before = {path: path.stat().st_mtime_ns for path in Path("runs/small/runs").rglob("finished.json")}
    assert len(before) == 2
    assert run(ONE_SEED) == 0
    assert len(calls()) == 2
    assert run(ONE_SEED.replace("[0]", "[0, 1]")) == 0
    assert calls()[2:] == ["clean--clip--s1", "clean--otco--s1"]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_finished_runs_are_kept_in_another_place(home):
    assert run(ONE_SEED) == 0
    Path("runs/small").rename("moved")
    assert run(ONE_SEED, "--out", "moved") == 0
    assert len(Path("moved/runs/calls.txt").read_text().split()) == 2


def test_changed_flags_run_again(home):
    assert run(ONE_SEED) == 0
    assert run(ONE_SEED.replace("otco-confidence = 1.0", "otco-confidence = 2.0")) == 0
    assert calls()[2:] == ["clean--otco--s0"]
    kept = results.read(Path("runs/small/results.jsonl"))
    assert [result.flags.count("2.0") for result in kept] == [0, 1]


def test_unfinished_and_damaged_runs_start_afresh(home):
    assert run(ONE_SEED) == 0
    finished("clean--clip--s0").unlink()
    finished("clean--otco--s0").write_text('{"run": "cle')
    assert run(ONE_SEED) == 0
    assert len(calls()) == 4
    assert len(results.read(Path("runs/small/results.jsonl"))[0].epochs) == 3


def test_failing_run_is_reported_and_others_go_on(home, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_FAIL", "clean--otco--s0")
    assert run(STUDY) == 1
    out, err = capsys.readouterr()
    assert len(calls()) == 6
    assert len(results.read(Path("runs/small/results.jsonl"))) == 5
    assert "clean--otco--s0 failed: exit code 3" in err
    assert re.findall(r"trace (\d+)", err) == [str(number) for number in range(15, 30)]
    assert "1 of the study's runs are missing" in out
    assert not finished("clean--otco--s0").exists()
    assert "trace 0" in Path("runs/small/runs/clean--otco--s0/output.log").read_text()

    monkeypatch.delenv("FAKE_FAIL")
    assert run(STUDY) == 0
    assert calls()[6:] == ["clean--otco--s0"]
    assert "missing" not in capsys.readouterr().out


def test_exit_code_0_without_the_last_epoch_is_a_failure(home, monkeypatch):
    monkeypatch.setenv("FAKE_CUT", "clean--clip--s0")
    Path("study.toml").write_text(ONE_SEED)
    with pytest.raises(RunFailed, match="no retrieval results"):
        asyncio.run(runs(load("study.toml"), Path("out"))[0].execute(lambda line: None, ("trainer.py",)))
    assert run(ONE_SEED) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_kill_leaves_a_state_that_resumes(home, number):
    Path("study.toml").write_text(ONE_SEED)
    with compare_in_a_process(FAKE_HANG="clean--otco--s0") as process:
        pid = hanging(process, "clean--otco--s0")
        process.send_signal(number)
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert not is_alive(pid)
    assert finished("clean--clip--s0").exists()
    assert not finished("clean--otco--s0").exists()
    assert len(results.read(Path("runs/small/results.jsonl"))) == 1
    assert run(ONE_SEED) == 0
    assert calls() == ["clean--clip--s0", "clean--otco--s0", "clean--otco--s0"]


def test_a_warning_names_runs_of_other_versions(home, monkeypatch, capsys):
    now = results.versions()
    monkeypatch.setattr(results, "versions", lambda: {**now, "torch": "1.0"})
    assert run(ONE_SEED) == 0
    assert "warning" not in capsys.readouterr().err
    monkeypatch.setattr(results, "versions", lambda: now)
    assert run(ONE_SEED.replace("[0]", "[0, 1]")) == 0
    expected = f"2 of the kept runs were made with torch 1.0 (now {now['torch']}): clean--clip--s0, clean--otco--s0"
    assert [line for line in capsys.readouterr().err.splitlines() if "warning" in line] == [f"warning: {expected}"]


def test_table_only(home, capsys):
    assert run(STUDY, "--table-only") == 2
    assert "no results" in capsys.readouterr().err
    assert run(STUDY) == 0
    page = Path("runs/small/table.md")
    text = page.read_text()
    page.unlink()
    assert run(STUDY, "--table-only") == 0
    assert page.read_text() == text
    assert len(calls()) == 6

    # A line that stands there twice is no further seed.
    lines = Path("runs/small/results.jsonl").read_text().splitlines()
    Path("runs/small/results.jsonl").write_text("\n".join([*lines, lines[0]]) + "\n")
    assert run(STUDY, "--table-only") == 0
    assert page.read_text() == text
    other = json.loads(lines[0]) | {"seconds": -1.0}
    Path("runs/small/results.jsonl").write_text("\n".join([*lines, json.dumps(other)]) + "\n")
    capsys.readouterr()
    assert run(STUDY, "--table-only") == 2
    assert f"results.jsonl: has two different lines of {other['run']}; remove one" in capsys.readouterr().err


def test_table_only_says_which_results_have_other_flags(home, capsys):
    assert run(ONE_SEED) == 0
    capsys.readouterr()
    assert run(ONE_SEED, "--table-only") == 0
    assert "warning" not in capsys.readouterr().err
    assert run(ONE_SEED.replace("otco-confidence = 1.0", "otco-confidence = 2.0"), "--table-only") == 0
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning == "warning: 1 of the results have other flags than study.toml: clean--otco--s0"


def test_an_output_folder_that_cannot_be_used_is_one_line(home, capsys):
    Path("file").touch()
    assert run(ONE_SEED, "--out", "file/below") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("openclip-otco compare: --out file/below: ")
    assert line.endswith("make it writable, free space, or name another folder")


def test_a_run_that_cannot_be_kept_does_not_stop_the_others(home, monkeypatch, capsys):
    keep = Run._keep

    def keep_or_fail(self, result):
        if self.name == "clean--clip--s0":
            raise OSError(errno.ENOSPC, "No space left on device")
        keep(self, result)

    monkeypatch.setattr(Run, "_keep", keep_or_fail)
    assert run(ONE_SEED) == 1
    assert "clean--clip--s0 failed: [Errno 28] No space left on device" in capsys.readouterr().err
    assert [each.run for each in results.read(Path("runs/small/results.jsonl"))] == ["clean--otco--s0"]


def test_unpatched_openclip_is_refused(home, monkeypatch, capfd):
    real = subprocess.run

    def status(command, **options):
        assert command[1:] == ["-m", "openclip_otco.cli", "patch", "--status"]
        return real([sys.executable, "-c", "print('OpenCLIP 3.3.0 is not patched'); exit(1)"], **options)

    Path("study.toml").write_text(ONE_SEED)
    monkeypatch.setattr(subprocess, "run", status)
    assert command("compare", "study.toml") == 2
    err = capfd.readouterr().err
    assert (
        "study.toml: its losses need a patched OpenCLIP (`openclip-otco patch`): OpenCLIP 3.3.0 is not patched" in err
    )
    assert not Path("runs").exists()


def test_damaged_results_name_the_line(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"run": "a"}\n')
    with pytest.raises(UserError, match="line 1 is no result"):
        results.read(tmp_path / "results.jsonl")
    (tmp_path / "results.jsonl").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"results\.jsonl: cannot be read: "):
        results.read(tmp_path / "results.jsonl")


def test_results_of_older_versions_are_readable(home):
    """Those of the first studies have no retrieval with all captions."""
    assert run(ONE_SEED) == 0
    path = Path("runs/small/results.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**line, "retrieval": None}) + "\n" for line in lines))
    now = results.read(path)
    path.write_text("".join(json.dumps({k: v for k, v in line.items() if k != "retrieval"}) + "\n" for line in lines))
    assert results.read(path) == now
    assert [result.run for result in now] == ["clean--clip--s0", "clean--otco--s0"]
    assert not results.have_standard_retrieval(now)


def test_report_names_no_folders(home):
    study = home / "study.toml"
    study.write_text(ONE_SEED)
    assert compare.run(arguments(str(study), "--out", str(home / "out")), trainer=(str(home / "trainer.py"),)) == 0
    page = (home / "out/table.md").read_text()
    assert "`openclip-otco compare study.toml`" in page
    assert str(home) not in page
    assert str(home) not in (home / "out/results.jsonl").read_text()
