"""`compare`: studies, runs that resume, results, tables and figures; OpenCLIP itself is played by a script."""

import argparse
import asyncio
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
from forks import PATIENCE
from scipy import stats
from webdataset.shardlists import expand_urls

from openclip_otco.data.samples import several_captions
from openclip_otco.errors import UserError
from openclip_otco.runs import train_log
from openclip_otco.study import child, compare, figure, progress, results, shards, table
from openclip_otco.study import run as study_run
from openclip_otco.study.mismatch import mismatch
from openclip_otco.study.run import RunFailed, runs
from openclip_otco.study.study import DataSetting, load

# Logs and writes as open_clip_train.main does; the environment tells it to fail or to hang in certain runs.
FAKE_TRAINER = """
import argparse, json, os, sys, time
from pathlib import Path

parser = argparse.ArgumentParser()
for flag in ("--logs", "--name", "--seed", "--epochs", "--loss"):
    parser.add_argument(flag)
args, rest = parser.parse_known_args()
folder = Path(args.logs) / args.name
with open(Path(args.logs) / "calls.txt", "a") as calls:
    print(args.name, file=calls)
if (folder / "out.log").exists():
    print("Error. Experiment already exists. Use --name {} to specify a new experiment.")
    sys.exit(0)
(folder / "checkpoints").mkdir(parents=True)
(folder / "out.log").touch()
(folder / "threads").write_text(os.environ.get("OMP_NUM_THREADS", "unset"))
if args.name in (names := os.environ.get("FAKE_MEET", "").split()):
    while not all((Path(args.logs) / name / "out.log").exists() for name in names):
        time.sleep(0.02)
print("2026-01-01,00:00:00 | INFO | Running with a single process. Device cpu.", file=sys.stderr)
for epoch in range(int(args.epochs)):
    for step in (1, 6, 10):
        samples = f"[{128 * step:>4}/1280 ({10 * step}%)]"
        print(f"2026-01-01,00:00:00 | INFO | Train Epoch: {epoch} {samples} Data (t): 0.093 "
              f"Batch (t): {0.9 if epoch == 0 and step == 1 else 0.1 * step:.3f}, 276.3/s, 276.3/s/gpu "
              "LR: 0.001000 Logit Scale: 14.2 Contrastive_loss: 4.8500 (4.8500) Loss: 4.8500 (4.8500)",
              file=sys.stderr, flush=True)
    if args.name in os.environ.get("FAKE_HANG", "").split():
        (folder / "pid").write_text(str(os.getpid()))
        time.sleep(3600)
    if args.name in os.environ.get("FAKE_FAIL", "").split():
        for line in range(30):
            print(f"trace {line}", file=sys.stderr)
        sys.exit(3)
    if args.name in os.environ.get("FAKE_CUT", "").split():
        sys.exit(0)
    base = 0.2 + 0.03 * int(args.seed) ** 2 + 0.05 * (args.loss == "otco") * (1 + int(args.seed))
    quality = base + 0.1 * epoch - (0.08 * epoch**2 if args.loss != "otco" else 0)
    metrics = {f"{way}_R@{k}": quality + 0.01 * k + 0.02 * (way == "text_to_image")
               for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    metrics |= {"image_to_text_mean_rank": 7.0, "clip_val_loss": 3.2, "epoch": epoch + 1, "num_samples": 500}
    print(f"2026-01-01,00:00:00 | INFO | Eval Epoch: {epoch + 1} "
          + "\\t".join(f"{k}: {round(v, 4):.4f}" for k, v in metrics.items()), file=sys.stderr, flush=True)
    with open(folder / "checkpoints" / "results.jsonl", "a+") as file:
        file.write(json.dumps(metrics) + "\\n")
(folder / "checkpoints" / f"epoch_{args.epochs}.pt").touch()
"""

STUDY = """
[study]
name = "small"
note = "A note."
seeds = [0, 1, 2]

[flags]
model = "any"
epochs = 3
aug-cfg = ["a=1", "b=2"]
grad-checkpointing = true
torchcompile = false

[data.clean]
train-data = "train.csv"

[loss.clip]
loss = "clip"

[loss.otco]
loss = "otco"
otco-confidence = 1.0
"""

ONE_SEED = STUDY.replace("[0, 1, 2]", "[0]")


DRAW = figure.draw


@pytest.fixture
def home(tmp_path, monkeypatch):
    (tmp_path / "trainer.py").write_text(FAKE_TRAINER)
    monkeypatch.chdir(tmp_path)
    # Pictures take most of a test's time, and few tests look at them.
    monkeypatch.setattr(figure, "draw", lambda study, found, folder: [])
    return tmp_path


@pytest.fixture
def drawn(home, monkeypatch):
    monkeypatch.setattr(figure, "draw", DRAW)


def arguments(*words):
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    return parser.parse_args(words)


def run(text, *words):
    Path("study.toml").write_text(text)
    return compare.run(arguments("study.toml", *words), trainer=("trainer.py",))


def calls():
    return Path("runs/small/runs/calls.txt").read_text().split()


def compare_in_a_process(*words, **environment):
    script = textwrap.dedent("""
        import argparse, sys
        from openclip_otco.study import compare
        parser = argparse.ArgumentParser()
        compare.add_arguments(parser)
        sys.exit(compare.run(parser.parse_args(), trainer=("trainer.py",)))
    """)
    return subprocess.Popen(
        [sys.executable, "-c", script, "study.toml", *words],
        env={**os.environ, **environment},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def hanging(process, name):
    """The process number of a run that hangs, once it does."""
    pid = Path("runs/small/runs") / name / "pid"
    while not (pid.is_file() and pid.read_text()) and process.poll() is None:
        time.sleep(0.02)
    return int(pid.read_text())


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def finished(name):
    return Path("runs/small/runs") / name / "finished.json"


def expected_recalls(loss, seed, epoch):
    """The fake trainer's recalls after an epoch counted from 0: three image to text, three text to image."""
    base = 0.2 + 0.03 * seed**2 + (0.05 * (1 + seed) if loss == "otco" else 0)
    quality = base + 0.1 * epoch - (0 if loss == "otco" else 0.08 * epoch**2)
    return np.array([quality + 0.01 * k + way for way in (0, 0.02) for k in (1, 5, 10)])


# --- the cross ---------------------------------------------------------------------------------------------------


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


# --- resuming ----------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
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


# --- several at once -----------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
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


def test_no_jobs(home, capsys):
    with pytest.raises(SystemExit):
        run(STUDY, "--jobs", "0")
    assert "--jobs: must be 1 or more" in capsys.readouterr().err


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


# --- several captions an image -------------------------------------------------------------------------------------

CAPTIONED = ONE_SEED.replace('train-data = "train.csv"', 'train-data = "train.csv"\nval-data = "val.tar"')
FAKE_EVALUATE = """
import json, os, sys
from pathlib import Path

checkpoint, data, out, *frozen = sys.argv[1:]
with open("evaluate-calls.txt", "a") as calls:
    print(checkpoint, data, *frozen, file=calls)
if os.environ.get("FAKE_NO_EVALUATION"):
    sys.exit("no evaluation today")
assert Path(checkpoint).is_file()
quality = 0.5 if "otco" in checkpoint else 0.25
recalls = {f"{way}_R@{k}": quality + 0.01 * k for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
Path(out).write_text(json.dumps({"retrieval": {**recalls, "images": 2, "texts": 10}}))
"""


def write_captions(path, captions):
    with tarfile.open(path, "w") as tar:
        for key in ("a", "b"):
            for kind, content in (("jpg", b""), ("json", json.dumps({"captions": captions}).encode())):
                member = tarfile.TarInfo(f"{key}.{kind}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def captioned(home, monkeypatch):
    Path("evaluate.py").write_text(FAKE_EVALUATE)
    write_captions("val.tar", ["one"] * 5)
    several_captions.cache_clear()
    command = [sys.executable, "evaluate.py"]
    monkeypatch.setattr(
        study_run, "evaluate_command", lambda checkpoint, data, out: [*command, str(checkpoint), data, str(out)]
    )
    yield Path("evaluate-calls.txt")
    several_captions.cache_clear()


def test_evaluate_command(home):
    words = study_run.evaluate_command(Path("a/epoch_3.pt"), "val.tar", Path("a/found.json"))
    assert words[1:] == [
        "-m",
        "openclip_otco.cli",
        "evaluate",
        "a/epoch_3.pt",
        "--data",
        "val.tar",
        "--out",
        "a/found.json",
    ]


@pytest.mark.parametrize("folder", [True, "features"])
def test_the_evaluation_remembers_where_the_training_did(captioned, folder):
    flag = f"frozen-features = {json.dumps(folder)}\n"
    assert run(CAPTIONED.replace("[flags]\n", f"[flags]\n{flag}", 1)) == 0
    words = "--frozen-features" if folder is True else f"--frozen-features {folder}"
    assert [line.partition("val.tar ")[2] for line in captioned.read_text().splitlines()] == [words] * 2


def test_images_with_several_captions_are_evaluated(captioned):
    assert run(CAPTIONED) == 0
    folder = "runs/small/runs/clean--{}--s0/checkpoints/epoch_3.pt val.tar"
    assert captioned.read_text().splitlines() == [folder.format(loss) for loss in ("clip", "otco")]
    kept = results.read(Path("runs/small/results.jsonl"))
    assert [result.retrieval["image_to_text_R@5"] for result in kept] == [0.3, 0.55]
    page = Path("runs/small/table.md").read_text()
    assert "`openclip-otco evaluate`, 5 captions an image" in page
    row, against = cells(page, "clean", "otco")
    assert row[1:8] == ["51.0", "55.0", "60.0", "51.0", "55.0", "60.0", "332.0"]
    assert row[8] == f"{kept[1].rsum_last:.1f}"
    assert against[:2] == [f"{332 / 182:.3f}", "+150.0"]
    assert against[2:4] == [
        f"{kept[1].rsum_last / kept[0].rsum_last:.3f}",
        f"{kept[1].rsum_last - kept[0].rsum_last:+.1f}",
    ]
    assert run(CAPTIONED) == 0
    assert len(captioned.read_text().splitlines()) == 2


def test_a_failed_evaluation_keeps_the_training(captioned, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_NO_EVALUATION", "1")
    assert run(CAPTIONED) == 1
    assert "clean--clip--s0 failed: evaluate: exit code 1; its output ends with\n  no evaluation today" in (
        capsys.readouterr().err
    )
    monkeypatch.delenv("FAKE_NO_EVALUATION")
    assert run(CAPTIONED) == 0
    assert len(calls()) == 2
    assert all(result.retrieval for result in results.read(Path("runs/small/results.jsonl")))


def test_results_without_evaluation_are_readable_and_completed(captioned):
    assert run(CAPTIONED) == 0
    for marker in map(finished, ("clean--clip--s0", "clean--otco--s0")):
        old = json.loads(marker.read_text())
        del old["retrieval"]  # as before there was an evaluation
        marker.write_text(json.dumps(old))
    checkpoint = Path("runs/small/runs/clean--otco--s0/checkpoints/epoch_3.pt")
    checkpoint.unlink()
    assert run(CAPTIONED) == 0
    assert len(calls()) == 2
    kept = results.read(Path("runs/small/results.jsonl"))
    # What has lost its checkpoint stays as it is, and then the table compares what all runs have.
    assert [result.retrieval is None for result in kept] == [False, True]
    assert "all captions" not in Path("runs/small/table.md").read_text()


def test_one_caption_an_image_is_not_evaluated(captioned):
    write_captions("val.tar", ["one"])
    assert run(CAPTIONED) == 0
    assert not captioned.exists()
    assert "all captions" not in Path("runs/small/table.md").read_text()


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


# --- table and figure --------------------------------------------------------------------------------------------


def cells(page, data, loss):
    """Cells of the rows of a loss: one in the table of values, one more against the baseline."""
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in page.splitlines() if row.startswith("|")]
    return [row[2:] for row in rows if row[:2] == [data, loss]]


def with_interval(values, form=".1f"):
    """Mean and half-width; of a difference (a sign) in bold where the interval excludes zero."""
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    text = f"{np.mean(values):{form}} ± {(high - low) / 2:{form.lstrip('+')}}"
    return f"**{text}**" if "+" in form and not low <= 0 <= high else text


def test_table_against_numpy_and_scipy(home):
    assert run(STUDY) == 0
    page = Path("runs/small/table.md").read_text()
    curves = {
        loss: np.array([[expected_recalls(loss, seed, epoch) for epoch in range(3)] for seed in range(3)]) * 100
        for loss in ("clip", "otco")
    }
    sums = {loss: curve.sum(axis=2) for loss, curve in curves.items()}
    for loss, best in (("clip", "epoch 2"), ("otco", "epoch 3")):
        row = cells(page, "clean", loss)[0]
        assert row[0] == "3"
        assert row[1:7] == [with_interval(curves[loss][:, -1, recall]) for recall in range(6)]
        assert row[7] == with_interval(sums[loss][:, -1])
        assert row[8] == f"{with_interval(sums[loss].max(axis=1))} ({best})"
        assert row[9] == "0.731 ± 0.000"
    ratio, last, best = cells(page, "clean", "otco")[1]
    assert ratio == f"{sums['otco'][:, -1].mean() / sums['clip'][:, -1].mean():.3f}"
    assert last == with_interval(sums["otco"][:, -1] - sums["clip"][:, -1], "+.1f")
    assert best == with_interval(sums["otco"].max(axis=1) - sums["clip"].max(axis=1), "+.1f")
    assert "bold where the 95 % interval excludes 0" in page
    assert len(cells(page, "clean", "clip")) == 1


def test_one_seed_has_no_interval(home):
    assert run(ONE_SEED) == 0
    page = Path("runs/small/table.md").read_text()
    assert "±" not in page
    assert "One seed" in page


def test_pairs_need_the_same_seed(home, monkeypatch):
    monkeypatch.setenv("FAKE_FAIL", "clean--clip--s1 clean--otco--s2")
    assert run(STUDY) == 1
    against = cells(Path("runs/small/table.md").read_text(), "clean", "otco")[1]
    difference = 100 * (expected_recalls("otco", 0, 2) - expected_recalls("clip", 0, 2)).sum()
    assert against[1] == f"{difference:+.1f}"


def test_baseline_that_failed(home, drawn, monkeypatch):
    monkeypatch.setenv("FAKE_FAIL", "clean--clip--s0")
    assert run(ONE_SEED) == 1
    page = Path("runs/small/table.md").read_text()
    assert len(cells(page, "clean", "otco")) == 1
    assert Path("runs/small/rsum.png").exists()


def test_interval():
    assert table.interval([5.0]) == (5.0, None)
    mean, half = table.interval([1.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(12.706, abs=1e-3))


def test_the_same_results_give_the_same_svg(home, drawn):
    assert run(ONE_SEED) == 0
    first = Path("runs/small/rsum.svg").read_bytes()
    assert run(ONE_SEED, "--table-only") == 0
    assert Path("runs/small/rsum.svg").read_bytes() == first


NOISE = STUDY.replace(
    '[data.clean]\ntrain-data = "train.csv"',
    "".join(f'[data.{name}]\ntrain-data = "train.csv"\n' for name in ("clean", "mismatch-40", "mismatch-60")),
)


def test_share_of_the_baseline_on_clean_data(home, monkeypatch):
    assert run(NOISE) == 0
    page = Path("runs/small/table.md").read_text()
    assert "% of clip on clean" in page
    clip, otco = (np.mean([expected_recalls(loss, seed, 2).sum() for seed in range(3)]) for loss in ("clip", "otco"))
    for data in ("clean", "mismatch-40", "mismatch-60"):
        assert cells(page, data, "clip")[0][8] == "100.0"
        assert cells(page, data, "otco")[0][8] == f"{100 * otco / clip:.1f}"


def test_pictures_are_drawn_where_there_is_what_they_show(home, drawn):
    def pictures():
        return {path.stem for path in Path("runs/small").glob("*.svg")}

    assert run(NOISE) == 0
    assert pictures() == {"rsum", "recalls", "noise", "cost"}
    noise = Path("runs/small/noise.svg").read_text()
    assert Path("runs/small/noise.png").is_file()
    assert run(STUDY) == 0
    assert pictures() == {"rsum", "recalls", "cost"}
    assert run(STUDY.replace('[loss.otco]\nloss = "otco"\notco-confidence = 1.0\n', "")) == 0
    assert pictures() == {"rsum", "recalls"}
    assert run(NOISE) == 0
    assert Path("runs/small/noise.svg").read_text() == noise


@pytest.mark.parametrize(
    ("setting", "share"),
    [
        (DataSetting("any", {"mismatch": 0.4}, {}), 0.4),
        (DataSetting("mismatch-20", {"seed": 1}, {}), 0),
        (DataSetting("clean", None, {}), 0),
        (DataSetting("mismatch-20", None, {}), 0.2),
        (DataSetting("mismatch-200", None, {}), None),
        (DataSetting("clean-small", None, {}), None),
    ],
)
def test_mismatch(setting, share):
    assert mismatch(setting) == share


# --- log lines ---------------------------------------------------------------------------------------------------

HEAD = "2026-03-01,10:20:30 | INFO | "
TAIL = "LR: 0.000500 Logit Scale: 14.2 Contrastive_loss: 4.85 (4.85) Loss: 4.85 (4.85)"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            f"{HEAD}Train Epoch: 0 [ 512/5120 (10%)] Data (t): 0.093 Batch (t): 0.463, 276.3/s, 276.3/s/gpu {TAIL}",
            train_log.TrainLine(0, 512, 5120, 0.463),
        ),
        (
            f"{HEAD}Train Epoch: 11 [5120/5120 (100%)] Data (t): 0.001 Batch (t): 12.004, 10.66/s, 10.66/s/gpu {TAIL}",
            train_log.TrainLine(11, 5120, 5120, 12.004),
        ),
        # Accumulation of 4 batches of 128 that do not divide the epoch.
        (
            f"{HEAD}Train Epoch: 2 [ 4608/5000 (100%)] Data (t): 0.010 Batch (t): 1.852, 276.4/s, 276.4/s/gpu {TAIL}",
            train_log.TrainLine(2, 4608, 5000, 1.852),
        ),
        (f"{HEAD}Eval Epoch: 1 [128 / 1000]\tClip Loss: 4.851234\t", None),
        (f"{HEAD}Start epoch 3", None),
        ("", None),
    ],
)
def test_train_line(line, expected):
    assert train_log.train_line(line) == expected


def test_eval_line():
    line = (
        f"{HEAD}Eval Epoch: 1 image_to_text_mean_rank: 51.2000\timage_to_text_median_rank: 20.0000\t"
        "image_to_text_R@1: 0.1000\timage_to_text_R@5: 0.2500\timage_to_text_R@10: 0.3600\t"
        "text_to_image_mean_rank: 50.1000\ttext_to_image_median_rank: 19.0000\ttext_to_image_R@1: 0.1100\t"
        "text_to_image_R@5: 0.2600\ttext_to_image_R@10: 0.3700\tclip_val_loss: 3.1000\tepoch: 1.0000\t"
    )
    assert train_log.eval_rsum(line) == pytest.approx(145.0)
    assert train_log.eval_rsum(line.replace("text_to_image_R@5", "other")) is None


@pytest.mark.parametrize(
    ("line", "device"),
    [
        ("Running with a single process. Device cuda:0.", "cuda:0"),
        (
            "Running in distributed mode with multiple processes. Device: cpu.Process (global: 0, local 0), total 2.",
            "cpu",
        ),
        ("Running late", None),
    ],
)
def test_device(line, device):
    assert train_log.device(HEAD + line) == device


def test_timer_of_a_run_that_logs_once():
    timer = train_log.StepTimer()
    timer.add(train_log.TrainLine(0, 128, 128, 0.9))
    assert timer.seconds_per_step is None


# --- progress ----------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()], ids=["terminal", "plain"])
def test_progress_shows_run_share_time_left_and_rsum(home, monkeypatch, stream):
    monkeypatch.setattr(progress, "_PLAIN_SECONDS", 0)
    Path("study.toml").write_text(ONE_SEED)
    first, second = runs(load("study.toml"), Path("out"))
    shown = progress.Progress([first, second], stream)
    shown.start(first)
    shown.watch(first, f"{HEAD}Train Epoch: 2 [1280/1280 (100%)] Data (t): 0.1 Batch (t): 0.5, 1/s, 1/s/gpu {TAIL}")
    recalls = "\t".join(f"{recall}: 0.5000" for recall in train_log.RECALLS)
    shown.watch(first, f"{HEAD}Eval Epoch: 3 {recalls}")
    text = stream.getvalue()
    # The second run's size is unknown and taken for that of the first: 3 of 6 epochs are done.
    assert "50%" in text
    assert "7.68k" in text
    assert "rsum 300.0" in text
    assert "clean--clip--s0" in text
    assert re.search(r"\d\d:\d\d left|<\d\d:\d\d", text)
    shown.end(first, "the first is done")
    shown.start(second)
    shown.close()
    assert "the first is done" in stream.getvalue()


def test_progress_of_several_runs(home, monkeypatch):
    monkeypatch.setattr(progress, "_PLAIN_SECONDS", 0)
    Path("study.toml").write_text(STUDY)
    cross, stream = runs(load("study.toml"), Path("out"))[:4], io.StringIO()
    shown = progress.Progress(cross, stream)
    for each in cross[:3]:
        shown.start(each)
    line = f"{HEAD}Train Epoch: {{}} [1280/1280 (100%)] Data (t): 0.1 Batch (t): 0.5, 1/s, 1/s/gpu {TAIL}"
    shown.watch(cross[0], line.format(1))
    assert "17% of 15.4k" in (last := stream.getvalue().splitlines()[-1])
    assert "clean--clip--s0 and 2 more" in last
    shown.watch(cross[1], line.format(2))
    assert "42% of 15.4k" in (last := stream.getvalue().splitlines()[-1])
    assert "clean--otco--s0 and 2 more" in last
    # What has failed leaves nothing more to do, and what had been done of it stays done.
    shown.end(cross[0], "failed")
    assert "45% of 14.1k" in stream.getvalue().splitlines()[-2]
    shown.watch(cross[2], line.format(2))
    assert "73% of 14.1k" in (last := stream.getvalue().splitlines()[-1])
    assert "clean--clip--s1 and 1 more" in last


def test_plain_progress_is_rare(home):
    Path("study.toml").write_text(ONE_SEED)
    stream = io.StringIO()
    cross = runs(load("study.toml"), Path("out"))
    shown = progress.Progress(cross, stream)
    shown.start(cross[0])
    for samples in range(128, 1281, 128):
        line = f"{HEAD}Train Epoch: 0 [{samples}/1280 (10%)] Data (t): 0.1 Batch (t): 0.5, 1/s, 1/s/gpu {TAIL}"
        shown.watch(cross[0], line)
    assert stream.getvalue() == ""


# --- shards ------------------------------------------------------------------------------------------------------


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


# --- bad studies -------------------------------------------------------------------------------------------------


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
    assert compare.run(arguments("nowhere.toml")) == 2
    assert "nowhere.toml: no such file, nor a shipped study (flickr8k-ablations" in capsys.readouterr().err


def test_quickstart_is_shipped(home):
    study = load("quickstart")
    assert [loss.loss for loss in study.losses] == ["clip", "otco"]
    assert study.needs_patch
    assert study.data[0].scenes == {"mismatch": 0.4, "seed": 0}


def test_unpatched_openclip_is_refused(home, monkeypatch, capfd):
    real = subprocess.run

    def status(command, **options):
        assert command[1:] == ["-m", "openclip_otco.cli", "patch", "--status"]
        return real([sys.executable, "-c", "print('OpenCLIP 3.3.0 is not patched'); exit(1)"], **options)

    Path("study.toml").write_text(ONE_SEED)
    monkeypatch.setattr(subprocess, "run", status)
    assert compare.run(arguments("study.toml")) == 2
    err = capfd.readouterr().err
    assert (
        "study.toml: its losses need a patched OpenCLIP (`openclip-otco patch`): OpenCLIP 3.3.0 is not patched" in err
    )
    assert not Path("runs").exists()


def test_damaged_results_name_the_line(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"run": "a"}\n')
    with pytest.raises(UserError, match="line 1 is no result"):
        results.read(tmp_path / "results.jsonl")


def test_results_of_before_are_readable(home):
    """Those of the first studies have no retrieval with all captions."""
    assert run(ONE_SEED) == 0
    path = Path("runs/small/results.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**line, "retrieval": None}) + "\n" for line in lines))
    now = results.read(path)
    path.write_text("".join(json.dumps({k: v for k, v in line.items() if k != "retrieval"}) + "\n" for line in lines))
    assert results.read(path) == now
    assert [result.run for result in now] == ["clean--clip--s0", "clean--otco--s0"]
    assert not results.standard(now)


def test_report_names_no_folders(home):
    study = home / "study.toml"
    study.write_text(ONE_SEED)
    assert compare.run(arguments(str(study), "--out", str(home / "out")), trainer=(str(home / "trainer.py"),)) == 0
    page = (home / "out/table.md").read_text()
    assert "`openclip-otco compare study.toml`" in page
    assert str(home) not in page
    assert str(home) not in (home / "out/results.jsonl").read_text()
