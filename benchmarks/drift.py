"""What the drift between two windows says, at several ε: `python benchmarks/drift.py FILE.jsonl [--points 256]`.

Features of one model at two epochs, in the folder that the environment variable OPENCLIP_OTCO_FEATURES names. Windows
of different pairs are compared at the same epoch, where the model has not moved, and at two epochs. A monitor of drift
should be near 0 for the first and not for the second. Seconds are those of one CPU thread, and of both modalities.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from solvers import EPOCHS, FEATURES

from openclip_otco.files import write_text
from openclip_otco.ot import sinkhorn_divergence
from openclip_otco.pages.markdown import markdown_table

EPSILONS = (0.03, 0.1, 0.3, 1.0)
WINDOWS = 5
SIDES = ("image", "text")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("jsonl", type=Path)
    parser.add_argument("--points", type=int, nargs="+", default=[256, 512])
    args = parser.parse_args()
    if FEATURES is None:
        parser.error("name the folder of the features by OPENCLIP_OTCO_FEATURES")
    from safetensors.torch import load_file

    torch.set_num_threads(1)
    before, after = (load_file(FEATURES / f"flickr8k-{epoch}.safetensors") for epoch in EPOCHS)
    lines = []
    for points in args.points:
        for epsilon in EPSILONS:
            line: dict[str, Any] = {"points": points, "epsilon": epsilon}
            for name, first in (("one model", after), ("it moved", before)):
                started = time.perf_counter()
                windows = [[_drift(first[side], after[side], points, window, epsilon) for side in SIDES]
                           for window in range(WINDOWS)]  # fmt: skip
                line["seconds"] = (time.perf_counter() - started) / WINDOWS
                line[name] = torch.tensor(windows).mean(0).tolist()
            lines.append(line)
    write_text(args.jsonl, "".join(json.dumps(line) + "\n" for line in lines))
    rows = [
        [
            str(line["points"]),
            str(line["epsilon"]),
            *(f"{line[name][side]:.4f}" for side in (0, 1) for name in ("one model", "it moved")),
            f"{line['seconds']:.3f}",
        ]
        for line in lines
    ]
    head = ["points", "ε", "images, one model", "images, it moved", "texts, one model", "texts, it moved", "seconds"]
    print(markdown_table(head, rows))


def _drift(first: torch.Tensor, second: torch.Tensor, points: int, window: int, epsilon: float) -> float:
    """Between windows of different pairs."""
    chosen = torch.randperm(len(first), generator=torch.Generator().manual_seed(window))
    return float(
        sinkhorn_divergence(first[chosen[:points]].float(), second[chosen[points : 2 * points]].float(), epsilon)
    )


if __name__ == "__main__":
    main()
