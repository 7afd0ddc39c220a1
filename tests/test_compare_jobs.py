"""`compare --jobs`: several runs at once, their cores, and how they are stopped."""

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from forks import PATIENCE
from study_fixtures import ONE_SEED, STUDY, calls, compare_in_a_process, hanging, is_alive, run

from openclip_otco.study import child, results
from openclip_otco.study.jobs import stop_signals


def test_jobs_run_at_once_and_share_the_cores(home, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(7), raising=False)
    names = [f"clean--{loss}--s{seed}" for seed in range(3) for loss in ("clip", "otco")]
    monkeypatch.setenv("FAKE_MEET", " ".join(names[:3]))  # each waits for the others
    assert run(STUDY, "--jobs", "3") == 0
    assert {(Path("runs/small/runs") / name / "threads").read_text() for name in names} == {"2"}
    assert [result.run for result in results.read(Path("runs/small/results.jsonl"))] == names


@pytest.mark.parametrize(("given", "jobs", "expected"), [("5", "2", "5"), (None, "1", "unset")])
def test_threads_are_left_alone(home, monkeypatch, given, jobs, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert run(ONE_SEED, "--jobs", jobs) == 0
    assert Path("runs/small/runs/clean--clip--s0/threads").read_text() == expected


def test_a_failing_job_does_not_stop_the_others(home, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_FAIL", "clean--clip--s0 clean--otco--s1")
    assert run(STUDY, "--jobs", "2") == 1
    assert len(results.read(Path("runs/small/results.jsonl"))) == 4
    err = capsys.readouterr().err
    assert err.count("failed: exit code 3") == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_kill_stops_all_jobs(home, number):
    Path("study.toml").write_text(STUDY)
    names = ["clean--clip--s0", "clean--otco--s0"]
    with compare_in_a_process("--jobs", "2", FAKE_HANG=" ".join(names)) as process:
        pids = [hanging(process, name) for name in names]
        process.send_signal(number)
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert not any(map(is_alive, pids))
    assert sorted(calls()) == names


def test_nohup_is_respected(monkeypatch):
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert stop_signals() == [signal.SIGINT, signal.SIGTERM]
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert stop_signals() == [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_zero_jobs_are_refused(home, capsys):
    with pytest.raises(SystemExit):
        run(STUDY, "--jobs", "0")
    assert "--jobs: must be at least 1" in capsys.readouterr().err


def test_a_folder_has_one_compare(home, capsys):
    Path("study.toml").write_text(ONE_SEED)
    with compare_in_a_process(FAKE_HANG="clean--clip--s0") as process:
        pid = hanging(process, "clean--clip--s0")
        assert run(ONE_SEED) == 2
        err = capsys.readouterr().err
        assert f"runs/small: is in use by another `compare` (process {process.pid})" in err
        assert len(err.splitlines()) == 1
        process.kill()
        process.communicate(timeout=PATIENCE)
        # The training outlives its parent and would still write there.
        assert is_alive(pid)
        assert run(ONE_SEED) == 2
        os.kill(pid, signal.SIGKILL)
        while (code := run(ONE_SEED)) == 2:
            time.sleep(0.05)
    assert code == 0
    assert calls() == ["clean--clip--s0", "clean--clip--s0", "clean--otco--s0"]


CHILD = """
import subprocess, sys, time
below = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
sys.stdout.buffer.write(b"one\\rtwo\\r\\nthr\\xc3")
sys.stdout.buffer.flush()
time.sleep(0.2)
sys.stdout.buffer.write(b"\\xa9e" + b"x" * 200_000 + b"\\xff\\n" + str(below.pid).encode() + b"\\n")
sys.stdout.buffer.flush()
time.sleep(3600)
"""


@pytest.mark.parametrize("deaf", ["", "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"])
def test_a_child_is_followed_line_by_line_and_stopped_with_its_own(tmp_path, monkeypatch, deaf):
    monkeypatch.setattr(child, "_SECONDS_TO_STOP", 0.5)
    lines = []

    class Enough(Exception):
        pass

    def watch(line):
        lines.append(line)
        if len(lines) == 4:
            raise Enough

    command = [sys.executable, "-c", f"{deaf}\n{CHILD}"]
    with pytest.raises(Enough):
        asyncio.run(child.Launcher().run(command, tmp_path / "log", watch))
    assert lines[:3] == ["one\n", "two\n", f"thr\u00e9e{'x' * 200_000}\ufffd\n"]
    assert (tmp_path / "log").read_text().splitlines() == [line.rstrip("\n") for line in lines]
    while is_running(int(lines[3])):  # until the test's own time is over
        time.sleep(0.02)


def is_running(pid):
    """Alive, and no orphan that merely waits for an init which a container may lack."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
