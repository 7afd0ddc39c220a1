"""How much work an audit loses when it is killed: one audit is killed by SIGKILL and started again, twenty times.

`python benchmarks/audit_kills.py FILE.jsonl`. The data are rendered scenes; the towers are small, with random weights.
One audit runs undisturbed. The other one is killed at seeded moments: after a number of finished windows, and then
after a random part of the time of a window. A line for each kill says how many windows the next start had to judge
again, and how many images it had to encode again (in windows, too). The last line says whether the table, the gallery
and the figures are the same bytes as those of the undisturbed audit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

from openclip_otco import cli
from openclip_otco.audit import judging
from openclip_otco.audit.encoder import PairEncoder
from openclip_otco.audit.folder import AuditFolder
from openclip_otco.audit.report import FACTS, GALLERY, TABLE
from openclip_otco.models.folder import bert_tiny_folder
from openclip_otco.models.registry import prepare_model, register_models
from openclip_otco.scenes.shards import Settings, write_scenes

# The last window has 10 new pairs, too few to stand alone.
PAIRS, WINDOW, BATCH, KILLS = 1610, 32, 8, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jsonl", metavar="FILE.jsonl", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    args = parser.parse_args()
    # The audits are forks of this process, so that torch is loaded only once. Threads do not survive a fork.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        audit = Audit(write_data(folder / "data"), make_towers(folder / "tower"), folder / "events")
        wait(audit.start(folder / "undisturbed"))
        lines = kill_again_and_again(audit, folder / "killed", window_seconds(folder / "undisturbed"), args.seed)
        wait(audit.start(folder / "killed"))
        lines.append(summary(folder / "undisturbed", folder / "killed", args.seed))
    args.jsonl.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    print(args.jsonl.read_text(), end="")


def write_data(folder: Path) -> str:
    write_scenes(folder, Settings(train=PAIRS, val=4, shards=4, mismatch=0.2))
    return f"{folder}/train/{{0000..0003}}.tar"


def make_towers(folder: Path) -> str:
    """Towers as `--towers` takes them: a small image model and a small text model, both with random weights."""
    register_models()
    prepare_model("RN10t-bert-tiny")
    folder.mkdir()
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=1)
    save_file(model.state_dict(), str(folder / "model.safetensors"), metadata={"format": "pt"})
    known = {"input_size": [3, 64, 64], "num_classes": 1, "classifier": "fc", "first_conv": "conv1.0"}
    config = {"architecture": "resnet10t", "num_classes": 1, "pretrained_cfg": known}
    (folder / "config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}+{bert_tiny_folder()}"


@dataclass(frozen=True)
class Audit:
    """The command `audit`, and the file where its process notes each batch and each window that it begins."""

    data: str
    towers: str
    events: Path

    def start(self, out: Path) -> int:
        """Starts the command in a process group of its own, and returns the group's number."""
        self.events.write_bytes(b"")
        if pid := os.fork():
            return pid
        code = 1
        try:
            os.setpgid(0, 0)
            PairEncoder.images = self._noting("images", PairEncoder.images)  # type: ignore[method-assign]
            judging.judge_window = self._noting("window", judging.judge_window)
            words = ["audit", "--data", self.data, "--towers", self.towers, "--out", str(out), "--window", str(WINDOW)]
            code = cli.main([*words, "--batch-size", str(BATCH), "--device", "cpu"])
        finally:
            os._exit(code)

    def begun(self, what: str) -> int:
        """How many batches or windows the process has begun since the last start."""
        return self.events.read_text().split("\n").count(what)

    def _noting(self, what: str, function: Callable) -> Callable:
        events = os.open(self.events, os.O_WRONLY | os.O_APPEND)

        def noted(*given: Any) -> Any:
            os.write(events, f"{what}\n".encode())
            return function(*given)

        return noted


def wait(pid: int) -> None:
    _, status = os.waitpid(pid, 0)
    if status:
        raise SystemExit(f"the audit ended with {os.waitstatus_to_exitcode(status)}")


def window_seconds(out: Path) -> float:
    times = sorted(part.stat().st_mtime for part in AuditFolder(out).parts())
    return (times[-1] - times[0]) / (len(times) - 1)


def kill_again_and_again(audit: Audit, out: Path, seconds: float, seed: int) -> list[dict[str, Any]]:
    generator, folder, lines = random.Random(seed), AuditFolder(out), []
    windows = sorted(generator.sample(range(PAIRS // WINDOW - 2), KILLS))
    for number, finished in enumerate(windows, start=1):
        first_window, first_image = len(folder.parts()), folder.progress()[0].images
        pid = audit.start(out)
        # Before the first batch, no work can be lost.
        while len(folder.parts()) < finished or not audit.begun("images"):
            time.sleep(0.002)
        time.sleep(generator.random() * seconds)
        os.killpg(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            raise SystemExit(f"kill {number} came too late: the audit had ended")
        kept, next_image = len(folder.parts()), folder.progress()[0].images
        images = first_image + BATCH * audit.begun("images") - next_image
        lines.append(
            {
                "kill": number,
                "windows_kept": kept,
                "windows_judged_again": first_window + audit.begun("window") - kept,
                "images_encoded_again": images,
                "windows_encoded_again": images / WINDOW,
            }
        )
    return lines


def summary(undisturbed: Path, killed: Path, seed: int) -> dict[str, Any]:
    same = all((undisturbed / name).read_bytes() == (killed / name).read_bytes() for name in (TABLE, GALLERY, FACTS))
    facts = json.loads((killed / FACTS).read_text())
    return {
        "kills": KILLS,
        "seed": seed,
        **{name: facts[name] for name in ("pairs", "window", "windows")},
        "batch_size": BATCH,
        "same_bytes": same,
    }


if __name__ == "__main__":
    main()
