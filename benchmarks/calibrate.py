"""What plan calibration does for retrieval: checkpoints x sources of the plan x epsilon, a line of JSON each.

Sources: nothing (`none`), the newest plan that the checkpoint caches (`newest`), all of its plans (`cached`), and plans
over the first pairs of training shards (`shards`). Lines that are there already are not made again; at the end comes a
table of all that are there, the mean gains over the seeds of a run (`NAME--s0`, `NAME--s1` and so on).

    python benchmarks/calibrate.py runs/*/checkpoints/epoch_4.pt --data DEV --calibrate-data TRAIN --out FILE.jsonl
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from openclip_otco.data import samples
from openclip_otco.evaluate import calibration_sources as calibration
from openclip_otco.evaluate.metrics import retrieval
from openclip_otco.evaluate.retriever import CalibratedRetriever, recoupled
from openclip_otco.runs import checkpoint
from openclip_otco.runs.encoder import Encoder

EPSILONS = (0.02, 0.03, 0.05, 0.1, 0.2, 0.5)
PAIRS = (1024, 4096, 8192)


def test_features(encoder: Encoder, data: str) -> tuple[Tensor, Tensor, Tensor]:
    """Images `(n, d)`, texts `(m, d)`, and the image of each text `(m,)`."""
    images, texts, text_image = [], [], []
    for batch in samples.batches(data, encoder.preprocess, 64, 1):
        first = sum(map(len, images))
        images.append(encoder.images([sample.image for sample in batch]))
        texts.append(encoder.texts([text for sample in batch for text in sample.captions]))
        text_image += [first + row for row, sample in enumerate(batch) for _ in sample.captions]
    return torch.cat(images), torch.cat(texts), torch.tensor(text_image)


def study(path: Path, args: argparse.Namespace, done: set[str]) -> None:
    """Append the lines of one checkpoint that are not `done`."""
    encoder = checkpoint.load(path, device="cpu")
    images, texts, text_image = test_features(encoder, args.data)

    def line(source: str, make: Callable[[], CalibratedRetriever] | None, **facts: Any) -> None:
        content: dict[str, Any] = {"run": path.parent.parent.name, "checkpoint": path.name, "source": source, **facts}
        if json.dumps(content) in done:
            return
        started = time.perf_counter()
        retriever = make() if make else None
        seconds = time.perf_counter() - started
        potentials = (
            (retriever.potentials(images, "text_to_image"), retriever.potentials(texts)) if retriever else (None, None)
        )
        metrics = retrieval(images, texts, text_image, *potentials)
        with args.out.open("a") as file:
            file.write(json.dumps({**content, "solve_seconds": round(seconds, 2), "retrieval": metrics}) + "\n")
        print(*content.values(), f"{metrics['rsum']:.1f}", flush=True)

    line("none", None)
    plans = checkpoint.cached_plans(path)
    for epsilon in args.epsilon:
        for source, some in (("newest", plans[-1:]), ("cached", plans)):
            if some:
                line(
                    source,
                    lambda some=some, epsilon=epsilon: CalibratedRetriever([recoupled(plan, epsilon) for plan in some]),
                    plans=len(some),
                    pairs=len(some[0]),
                    epsilon=epsilon,
                )
    train = calibration.training_features(encoder, args.calibrate_data, max(args.pairs))
    for pairs in args.pairs:
        for epsilon in args.epsilon:
            line(
                "shards",
                lambda pairs=pairs, epsilon=epsilon: CalibratedRetriever.from_features(
                    *(side[:pairs] for side in train), epsilon, max_support=pairs
                ),
                plans=1,
                pairs=pairs,
                epsilon=epsilon,
            )


def table(lines: list[dict[str, Any]]) -> str:
    """Mean differences of rsum from no calibration, each checkpoint with itself, as Markdown."""
    plain = {line["run"]: line["retrieval"]["rsum"] for line in lines if line["source"] == "none"}
    rows: dict[tuple[str, str, int], dict[float, list[float]]] = {}
    for line in lines:
        if line["source"] != "none":
            group = line["run"].rpartition("--s")[0] or line["run"]
            cells = rows.setdefault((group, line["source"], line["plans"] * line["pairs"]), {})
            cells.setdefault(line["epsilon"], []).append(line["retrieval"]["rsum"] - plain[line["run"]])
    epsilons = sorted({epsilon for cells in rows.values() for epsilon in cells})
    text = [["run", "plan", "pairs", "seeds", *(f"ε = {epsilon:g}" for epsilon in epsilons)]]
    text.append(["---", "---", *["---:"] * (2 + len(epsilons))])
    for (group, source, pairs), cells in sorted(rows.items()):
        seeds = max(map(len, cells.values()))
        gains = [f"{fmean(cells[epsilon]):+.1f}" if epsilon in cells else "" for epsilon in epsilons]
        text.append([group, source, f"{pairs:,}", str(seeds), *gains])
    return "\n".join(f"| {' | '.join(row)} |" for row in text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--calibrate-data", required=True)
    parser.add_argument("--epsilon", nargs="+", type=float, default=EPSILONS)
    parser.add_argument("--pairs", nargs="+", type=int, default=PAIRS)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    done = set()
    if args.out.exists():
        for text in args.out.read_text().splitlines():
            found = json.loads(text)
            done.add(json.dumps({key: found[key] for key in found if key not in ("solve_seconds", "retrieval")}))
    for path in args.checkpoints:
        study(path, args, done)
    print(table([json.loads(text) for text in args.out.read_text().splitlines()]))


if __name__ == "__main__":
    main()
