"""A study whose training is played by a script: its file, its folder, and the recalls that it ends with."""

import argparse
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from openclip_otco import cli
from openclip_otco.study import compare, figure

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
    return cli.exit_code("compare", lambda: compare.run(arguments("study.toml", *words), trainer=("trainer.py",)))


def calls():
    return Path("runs/small/runs/calls.txt").read_text().split()


def compare_in_a_process(*words, **environment):
    script = textwrap.dedent("""
        import argparse, sys
        from openclip_otco import cli
        from openclip_otco.study import compare
        parser = argparse.ArgumentParser()
        compare.add_arguments(parser)
        sys.exit(cli.exit_code("compare", lambda: compare.run(parser.parse_args(), trainer=("trainer.py",))))
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


NOISE = STUDY.replace(
    '[data.clean]\ntrain-data = "train.csv"',
    "".join(f'[data.{name}]\ntrain-data = "train.csv"\n' for name in ("clean", "mismatch-40", "mismatch-60")),
)


HEAD = "2026-03-01,10:20:30 | INFO | "
TAIL = "LR: 0.000500 Logit Scale: 14.2 Contrastive_loss: 4.85 (4.85) Loss: 4.85 (4.85)"


def cells(page, data, loss):
    """Cells of the rows of a loss: one in the table of values, one more against the baseline."""
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in page.splitlines() if row.startswith("|")]
    return [row[2:] for row in rows if row[:2] == [data, loss]]


def with_interval(values, form=".1f"):
    """Mean and half-width; of a difference (a sign) in bold where the interval excludes zero."""
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    text = f"{np.mean(values):{form}} ± {(high - low) / 2:{form.lstrip('+')}}"
    return f"**{text}**" if "+" in form and not low <= 0 <= high else text


def ratio_interval(own, base):
    """The ratio of two means and the half-width of its interval, by variances and the covariance (the delta method)."""
    own, base = np.asarray(own), np.asarray(base)
    ratio = own.mean() / base.mean()
    (own_variance, covariance), (_, base_variance) = np.cov(own, base)
    variance = (own_variance - 2 * ratio * covariance + ratio**2 * base_variance) / len(own) / base.mean() ** 2
    # Of equal values the variance is 0 but for rounding.
    return ratio, stats.t.ppf(0.975, len(own) - 1) * np.sqrt(max(variance, 0))
