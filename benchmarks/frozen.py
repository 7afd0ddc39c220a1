"""How long a run on frozen features takes, compared with its heads, loss and optimizer alone, on one core.

`python benchmarks/frozen.py OUT_DIR FILE.json`. It makes the shards of the study `flickr8k-frozen` in OUT_DIR, or takes
those that are there (the environment variable OPENCLIP_OTCO_FLICKR8K names the data). It trains `clip` and `otco` with
seed 0 by the study's commands, after a first run that encodes what is new. Then it makes as many steps of the same
model's heads on random features of the same shapes. Start-up, validation and checkpoints are part of the runs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import nn

from openclip_otco.models.registry import prepare_model, register_models
from openclip_otco.study import shards
from openclip_otco.study.run import Run, runs
from openclip_otco.study.study_file import load

STUDY = "flickr8k-frozen"


def train(run: Run) -> dict[str, float]:
    """Seconds of a run of the training script, and of its steps according to its log."""
    started = time.monotonic()
    done = subprocess.run(
        [*run.command(), "--name", f"bench-{run.loss}-{time.time_ns()}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seconds = time.monotonic() - started
    if done.returncode:
        sys.exit(done.stdout[-3000:])
    steps = [float(number) for number in re.findall(r"Train Epoch.*?Batch \(t\): ([\d.]+)", done.stdout)]
    return {"seconds": seconds, "seconds_per_step": sorted(steps)[len(steps) // 2]}


def bare(run: Run, steps: int, batch: int) -> dict[str, float]:
    """Seconds of `steps` steps of the heads, OpenCLIP's loss and the optimizer, and nothing else."""
    name = flag(run, "--model")
    register_models()
    prepare_model(name)
    model: Any = open_clip.create_model(name)
    visual, text = model.visual.head, model.text.proj
    logit_scale = nn.Parameter(torch.ones([]) * model.logit_scale.item())
    parameters = [*visual.parameters(), *text.parameters(), logit_scale]
    optimizer = torch.optim.AdamW(parameters, lr=float(flag(run, "--lr")), weight_decay=0.1)
    loss = open_clip.ClipLoss()
    images = torch.randn(batch, first_linear(visual).in_features)
    texts = torch.randn(batch, first_linear(text).in_features)
    started = time.monotonic()
    for _ in range(steps):
        features = [nn.functional.normalize(head(each), dim=1) for head, each in ((visual, images), (text, texts))]
        optimizer.zero_grad()
        loss(*features, logit_scale.exp()).backward()
        optimizer.step()
    seconds = time.monotonic() - started
    return {"seconds": seconds, "seconds_per_step": seconds / steps}


def first_linear(head: nn.Module) -> nn.Linear:
    return next(part for part in head.modules() if isinstance(part, nn.Linear))


def flag(run: Run, name: str) -> str:
    return run.flags[run.flags.index(name) + 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("json", type=Path)
    args = parser.parse_args()
    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    study = load(STUDY)
    clean = study.data[0]
    shards.make(clean, args.out)
    chosen = [run for run in runs(study, args.out) if run.data == clean.name and run.seed == study.seeds[0]]
    train(chosen[0])
    found: dict[str, Any] = {run.loss: train(run) for run in chosen}
    batch = int(flag(chosen[0], "--batch-size"))
    assert chosen[0].samples_per_epoch
    steps = chosen[0].epochs * -(-chosen[0].samples_per_epoch // batch)
    found["bare"] = bare(chosen[0], steps, batch)
    found["steps"] = steps
    for run in chosen:
        found[run.loss]["of_bare"] = found[run.loss]["seconds"] / found["bare"]["seconds"]
        found[run.loss]["step_of_bare"] = found[run.loss]["seconds_per_step"] / found["bare"]["seconds_per_step"]
    args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(args.json.read_text())


if __name__ == "__main__":
    main()
