"""What audits say about Flickr8k with planted wrong captions, and the shards that are left of it.

`python benchmarks/cleaned.py STUDY --truth FOLDER --json FILE` takes runs and shards as `make study` leaves them in
STUDY. For each checkpoint: AUROC of confidence and of cosine similarity, and the estimated share of right pairs beside
the true one. Then `STUDY/data/cleaned-*`, what `configs/flickr8k-cleaned.toml` trains on: the pairs that the audit of
the first noisy run keeps (`confidence`), as many by cosine similarity (`cosine`), and all right ones (`oracle`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from openclip_otco.audit import table
from openclip_otco.audit.audit import TABLE, Audit
from openclip_otco.audit.clean import write_clean
from openclip_otco.audit.score import Truth
from openclip_otco.audit.source import open_source

NOISY = 40
# Data, loss and seed of the runs audited; every seed where the bar is.
RUNS = [
    *((NOISY, "otco", seed) for seed in range(5)),
    (NOISY, "clip", 0),
    *((mismatch, "otco", 0) for mismatch in (0, 20, 60)),
]


def shards(study: Path, mismatch: int) -> str:
    """The training shards of a setting, as `--data` takes them."""
    return f"{study}/data/flickr8k-mismatch-{mismatch}/{{0000..0009}}.tar"


def audit(study: Path, mismatch: int, loss: str, seed: int, truth: Path | None) -> dict[str, Any]:
    """The figures of one audit; its folder stays in the run's."""
    name = f"{f'mismatch-{mismatch}' if mismatch else 'clean'}--{loss}--s{seed}"
    run = study / "runs" / name
    (checkpoint,) = (run / "checkpoints").glob("epoch_*.pt")
    source = open_source(shards(study, mismatch), "", "", "")
    facts = Audit(checkpoint, source, run / "audit", truth=truth, workers=1).run()
    return {"run": name, "true_share": 1 - facts.get("wrong", 0) / facts["pairs"], **facts}


def clean(study: Path, truth: Truth) -> dict[str, dict[str, float]]:
    """Write the three sets of shards; pairs and purity of each."""
    out = study / "runs" / f"mismatch-{NOISY}--otco--s0" / "audit"
    facts = json.loads((out / "audit.json").read_text())
    rows = list(table.rows(out / TABLE, ["key", "cosine", "log_confidence"]))
    kept = round(facts["matched_share"] * len(rows))

    def best(score: str) -> set[str]:
        return {row["key"] for row in sorted(rows, key=lambda row: -row[score])[:kept]}

    choices = {
        "confidence": best("log_confidence"),
        "cosine": best("cosine"),
        "oracle": {row["key"] for row in rows if not truth.is_wrong(row["key"])},
    }
    found = {}
    for name, keys in choices.items():
        folder = study / "data" / f"cleaned-{name}"
        if folder.exists():
            if set((folder / "clean-keys.txt").read_text().split()) != keys:
                raise SystemExit(f"{folder}: was cut by another audit; remove it, and the runs on it")
        else:
            write_clean(open_source(shards(study, NOISY), "", "", ""), parts(out), member(keys), folder)
        right = sum(not truth.is_wrong(key) for key in keys)
        found[name] = {"pairs": len(keys), "purity": right / len(keys)}
    return found


def parts(out: Path) -> list[Path]:
    """The parts of a finished audit, in the order of the data."""
    return sorted((out / "parts").glob("*.parquet"))


def member(keys: set[str]) -> Callable[[table.Row], bool]:
    """Whether a row is one of `keys`."""
    return lambda row: row["key"] in keys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", metavar="STUDY", type=Path)
    parser.add_argument("--truth", metavar="FOLDER", type=Path, required=True, help="holds mismatch-*.csv")
    parser.add_argument("--json", metavar="FILE", type=Path, required=True)
    args = parser.parse_args()
    found: dict[str, Any] = {"audits": []}
    for mismatch, loss, seed in RUNS:
        truth = args.truth / f"mismatch-{mismatch}.csv" if mismatch else None
        facts = audit(args.study, mismatch, loss, seed, truth)
        found["audits"].append(facts)
        names = ("auroc_confidence", "auroc_cosine", "true_share", "matched_share")
        print(facts["run"], *(f"{name} {facts[name]:.4f}" for name in names if name in facts), flush=True)
    found["cleaned"] = clean(args.study, Truth(args.truth / f"mismatch-{NOISY}.csv"))
    for name, kept in found["cleaned"].items():
        print(f"cleaned by {name}: {kept['pairs']} pairs, {kept['purity']:.4f} of them right")
    args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
