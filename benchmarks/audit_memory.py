"""Peak memory of `openclip-otco audit`, less the memory with the model loaded, for pictures of 1.5 MB each.

`python benchmarks/audit_memory.py FILE.jsonl`. The shard is a pipe, so that nothing of it lies on the disk. It repeats
one noisy JPEG, with other bytes after its end each time. `--synthetic` uses made-up features of 64 numbers instead of
pictures and a model: a million pairs then take minutes, and the memory is the audit's own. Memory is the proportional
set size (Linux: shared pages are counted once) of this process and of all processes that it started, but for the pipe.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

MODEL = "RN10t-bert-tiny"
SIDE, QUALITY = 1224, 92  # 1.5 MB


def emit(count: int) -> None:
    """Writes a shard of `count` pairs to standard output."""
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=QUALITY)
    with tarfile.open(fileobj=sys.stdout.buffer, mode="w|") as tar:
        for number in range(count):
            files = {"jpg": stream.getvalue() + str(number).encode(), "txt": f"picture number {number}".encode()}
            for kind, content in files.items():
                member = tarfile.TarInfo(f"{number:06d}.{kind}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


class Peak(threading.Thread):
    """The highest memory of this process and its children so far, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = self.now()
        self._stop_now = threading.Event()

    def run(self) -> None:
        while not self._stop_now.wait(0.1):
            self.bytes = max(self.bytes, self.now())

    def end(self) -> None:
        self._stop_now.set()
        self.join()

    def now(self) -> int:
        parents = {int(path.name): _parent(path) for path in Path("/proc").iterdir() if path.name.isdigit()}
        family = {os.getpid()}
        for _ in range(4):
            family |= {pid for pid, parent in parents.items() if parent in family}
        return sum(_memory(pid) for pid in family)


def _parent(process: Path) -> int | None:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _memory(pid: int) -> int:
    try:
        if b"--emit" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return 0
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path, nargs="?")
    parser.add_argument("--emit", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--pairs", type=int, default=6200)
    parser.add_argument("--synthetic", action="store_true", help="made-up features in place of pictures and a model")
    parser.add_argument("--window", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    if args.emit is not None:
        return emit(args.emit)
    if args.json is None:
        parser.error("name the file for the result")

    found = synthetic(args) if args.synthetic else with_pictures(args)
    args.json.write_text(json.dumps(found) + "\n")
    print(json.dumps(found, indent=1))


def synthetic(args: argparse.Namespace) -> dict[str, Any]:
    """Peaks of two audits, of a tenth of the pairs and of all of them: while judging, and while ranking."""
    from made_up_pairs import MadeUpShards, audit_made_up_pairs, settings

    from openclip_otco.audit import audit

    audit_made_up_pairs(args.batch_size)
    write_report = audit.write_report
    found: dict[str, Any] = {"window": args.window, "pairs": [], "peak_mib": [], "ranking_mib": [], "minutes": []}
    for pairs in (args.pairs // 10, args.pairs):
        started, peak = time.perf_counter(), Peak()
        judging = []

        def note_and_report(*given: Any, peak: Peak = peak, judging: list[int] = judging) -> Any:
            judging.append(peak.bytes)
            peak.bytes = peak.now()
            return write_report(*given)

        audit.write_report = note_and_report
        peak.start()
        with tempfile.TemporaryDirectory() as folder:
            audit.run_audit(MadeUpShards(pairs), Path(folder) / "out", settings(args.window))
        peak.end()
        found["pairs"].append(pairs)
        found["peak_mib"].append(round(judging[0] / 2**20))
        found["ranking_mib"].append(round(peak.bytes / 2**20))
        found["minutes"].append(round((time.perf_counter() - started) / 60, 1))
    return found


def with_pictures(args: argparse.Namespace) -> dict[str, Any]:
    """Peak of an audit with a model."""
    import open_clip
    import torch

    from openclip_otco.audit.audit import run_audit
    from openclip_otco.audit.settings import JudgeSettings
    from openclip_otco.audit.source import open_source
    from openclip_otco.models.registry import prepare_model, register_models
    from openclip_otco.runs import checkpoint

    register_models()
    prepare_model(MODEL)
    load, loaded = checkpoint.load, 0
    peak = Peak()

    def load_and_note(*given: Any) -> Any:
        nonlocal loaded
        encoder = load(*given)
        loaded = peak.now()
        peak.start()
        return encoder

    checkpoint.load = load_and_note
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pt"
        torch.manual_seed(0)
        torch.save(open_clip.create_model(MODEL, pretrained_text=False).state_dict(), weights)
        shard = f"pipe:{sys.executable} {__file__} --emit {args.pairs}"
        settings = JudgeSettings(
            checkpoint=weights,
            model=MODEL,
            device="cpu",
            window=args.window,
            batch_size=args.batch_size,
            workers=args.workers,
        )
        facts = run_audit(open_source(shard, "filepath", "title", "\t"), Path(folder) / "out", settings)
    peak.end()
    return {
        **{name: facts[name] for name in ("model", "pairs", "windows", "window")},
        "workers": args.workers,
        "batch_size": args.batch_size,
        "model_loaded_mib": round(loaded / 2**20),
        "peak_mib": round(peak.bytes / 2**20),
        "above_model_mib": round((peak.bytes - loaded) / 2**20),
    }


if __name__ == "__main__":
    main()
