"""Throughput of `openclip-otco audit`, and of its encoder alone, from one run.

`python benchmarks/audit.py SHARDS FILE.jsonl --towers NAME`, or `--checkpoint`, or both; the other arguments are those
of `audit`. Every image and every caption is encoded. One clock times the encoder, another one the loader and the
encoder together. The rest of the time is the audit's own: plans, judgements, parts, the ranking and the gallery.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from openclip_otco.audit import audit, judging
from openclip_otco.audit.encoder import PairEncoder
from openclip_otco.audit.settings import JudgeSettings
from openclip_otco.audit.source import open_source


class Clock:
    """Adds up the seconds of all calls of the functions that it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable) -> Callable:
        def timed(*args: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args)
            finally:
                self.seconds += time.perf_counter() - started

        return timed

    def around_each(self, function: Callable[..., Iterator]) -> Callable[..., Iterator]:
        def timed(*args: Any) -> Iterator:
            items = function(*args)
            end = object()
            while (item := self.around(next)(items, end)) is not end:
                yield item

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("jsonl", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--towers")
    parser.add_argument("--window", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device")
    args = parser.parse_args()

    encoding, streaming, loading = Clock(), Clock(), Clock()
    with tempfile.TemporaryDirectory() as folder:
        audit.load_encoder = loading.around(audit.load_encoder)
        judging.stream = streaming.around_each(judging.stream)
        PairEncoder.images = encoding.around(PairEncoder.images)  # type: ignore[method-assign]
        PairEncoder.texts = encoding.around(PairEncoder.texts)  # type: ignore[method-assign]
        started = time.perf_counter()
        settings = JudgeSettings(
            checkpoint=args.checkpoint,
            towers=args.towers,
            window=args.window,
            batch_size=args.batch_size,
            workers=args.workers,
            device=args.device,
        )
        facts = audit.run_audit(open_source(args.data, "filepath", "title", "\t"), Path(folder) / "out", settings)
        seconds = time.perf_counter() - started - loading.seconds
    found = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() and args.device != "cpu" else "cpu",
        "threads": torch.get_num_threads(),
        "workers": args.workers,
        "batch_size": args.batch_size,
        **{name: facts[name] for name in ("model", "towers", "pairs", "windows", "window", "epsilon")},
        "seconds": round(seconds, 2),
        "seconds_of_loader_and_encoder": round(streaming.seconds, 2),
        "seconds_of_encoder": round(encoding.seconds, 2),
        "pairs_per_second": round(facts["pairs"] / seconds, 2),
        "times_loader_and_encoder": round(seconds / streaming.seconds, 4),
        "times_encoder": round(seconds / encoding.seconds, 4),
    }
    args.jsonl.write_text(json.dumps(found) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
