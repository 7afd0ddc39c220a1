"""How much plan calibration improves retrieval: a line of JSON for each run of a study, source of the plan and epsilon.

    python benchmarks/calibrate.py runs/flickr8k --jsonl FILE.jsonl

takes runs, shards and features as `make study` leaves them. Sources of the plan are: none (`none`), the newest plan
that a checkpoint caches (`newest`), all of its plans (`cached`), and a plan over the first pairs of the run's training
shards (`shards`). Each plan is used twice: with its potentials (`plan`), and with zeros instead of them (`zero`). The
latter is the inverted softmax over the same points, and shows what transport adds.

A line that is already in the file is not made again, if its checkpoint is the same. Images and captions of the
validation set are encoded once for all runs with the same towers; those of training come from the feature tables.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tower_features import Towers, model_features, tower_features
from tqdm import tqdm

from openclip_otco.data import samples
from openclip_otco.evaluate.metrics import retrieval
from openclip_otco.evaluate.retriever import CalibratedRetriever, recoupled
from openclip_otco.files import write_text
from openclip_otco.models.folder import home
from openclip_otco.runs import checkpoint
from openclip_otco.runs.encoder import Encoder
from openclip_otco.study import shards
from openclip_otco.study.run import Run, runs
from openclip_otco.study.study_file import load

EPSILONS = (0.02, 0.03, 0.05, 0.1, 0.2, 0.5)
PAIRS = (1024, 4096, 8192)


@dataclass(frozen=True)
class Cell:
    """What a line is about. `pairs` is the size of a plan of `shards`; it is `None` for a checkpoint's own plans."""

    run: str
    checkpoint: str  # SHA-256 of the file, its first 16 digits
    source: str
    potentials: str | None = None
    epsilon: float | None = None
    pairs: int | None = None


def cells(run: Run, digest: str, epsilons: list[float], pairs: list[int], has_plans: bool) -> list[Cell]:
    """All cells of a run; those of its own plans only if the run has plans."""
    found = [Cell(run.name, digest, "none")]
    sizes: list[tuple[str, int | None]] = [("newest", None), ("cached", None)] if has_plans else []
    sizes += [("shards", size) for size in pairs]
    for source, size in sizes:
        for epsilon in epsilons:
            found += [Cell(run.name, digest, source, kind, epsilon, size) for kind in ("plan", "zero")]
    return found


@dataclass(frozen=True)
class Validation:
    """The towers' features of a validation set: images `(n, e)`, texts `(m, e)`, and the image of each text `(m,)`."""

    images: Tensor
    texts: Tensor
    text_image: Tensor

    @classmethod
    def encode(cls, encoder: Encoder, data: str) -> Validation:
        images, texts, text_image = [], [], []
        for batch in samples.batches(data, encoder.preprocess, 64, 0):
            first = sum(map(len, images))
            images.append(encoder.images_and_tower([sample.image for sample in batch])[1])
            texts.append(encoder.texts_and_tower([text for sample in batch for text in sample.captions])[1])
            text_image += [first + row for row, sample in enumerate(batch) for _ in sample.captions]
        return cls(torch.cat(images), torch.cat(texts), torch.tensor(text_image))


class TowerStore:
    """Features of the towers, which all runs of a study share. Runs with other towers get features of their own."""

    def __init__(self, features: Path, pairs: int) -> None:
        self.features, self.pairs = features, pairs
        self._validation: dict[tuple[str, ...], Validation] = {}
        self._training: dict[tuple[str, ...], Towers] = {}

    def validation(self, encoder: Encoder, data: str) -> Validation:
        key = (data, *(tower.digest() for tower in encoder.frozen))
        if key not in self._validation:
            self._validation[key] = Validation.encode(encoder, data)
        return self._validation[key]

    def training(self, encoder: Encoder, data: str) -> Towers:
        key = (data, *(tower.digest() for tower in encoder.frozen))
        if key not in self._training:
            self._training[key] = tower_features(encoder, self.features, data, self.pairs)
        return self._training[key]


def with_zero_potentials(retriever: CalibratedRetriever) -> CalibratedRetriever:
    """The inverted softmax (Smith et al., ICLR 2017) over the points of the same plans: all `f` and `g` are 0."""
    return CalibratedRetriever(
        [replace(plan, f=torch.zeros_like(plan.f), g=torch.zeros_like(plan.g)) for plan in retriever.plans]
    )


def measured(run: Run, to_do: list[Cell], store: TowerStore) -> Iterator[dict[str, Any]]:
    """The lines of `to_do`, all of one run."""
    encoder = checkpoint.load(run.checkpoint, device="cpu", frozen_features=store.features)
    test = store.validation(encoder, data_of(run, "--val-data"))
    images, texts = model_features(encoder, "image", test.images), model_features(encoder, "text", test.texts)
    train: tuple[Tensor, ...] = ()
    if any(cell.source == "shards" for cell in to_do):
        towers = store.training(encoder, data_of(run, "--train-data"))
        train = (model_features(encoder, "image", towers.images), model_features(encoder, "text", towers.texts))
    cached = (
        checkpoint.cached_plans(run.checkpoint) if any(cell.source in ("newest", "cached") for cell in to_do) else []
    )
    # The cells of the two kinds of potentials follow each other, and share the plan.
    made: dict[tuple[Any, ...], tuple[CalibratedRetriever, float]] = {}
    for cell in to_do:
        facts: dict[str, Any] = {**asdict(cell), "data": run.data, "loss": run.loss, "seed": run.seed}
        potentials: tuple[Tensor | None, Tensor | None] = (None, None)
        if cell.source != "none":
            assert cell.epsilon is not None
            key = (cell.source, cell.epsilon, cell.pairs)
            if key not in made:
                started = time.perf_counter()
                if cell.source == "shards":
                    some = [side[: cell.pairs] for side in train]
                    plan = CalibratedRetriever.from_features(*some, cell.epsilon, max_support=len(some[0]))
                else:
                    own = cached if cell.source == "cached" else cached[-1:]
                    plan = CalibratedRetriever([recoupled(each, cell.epsilon) for each in own])
                made = {key: (plan, time.perf_counter() - started)}
            retriever, seconds = made[key]
            facts |= {
                "plans": len(retriever.plans),
                "pairs": len(retriever.plans[0]),
                "solve_seconds": round(seconds, 2),
            }
            asked = with_zero_potentials(retriever) if cell.potentials == "zero" else retriever
            potentials = asked.potentials(images, "text_to_image"), asked.potentials(texts)
        metrics = retrieval(images, texts, test.text_image, *potentials)
        yield {**facts, "rsum": metrics["rsum"], "retrieval": metrics}


def data_of(run: Run, flag: str) -> str:
    """The shards that `flag` of a run names."""
    return shards.in_folder(run.flags[run.flags.index(flag) + 1], run.out)


def kept_cells(path: Path) -> set[Cell]:
    """The cells of the lines in the file `path`."""
    if not path.is_file():
        return set()
    found = set()
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        cell = Cell(**{name: line[name] for name in Cell.__dataclass_fields__})
        found.add(cell if cell.source == "shards" else replace(cell, pairs=None))
    return found


def drop_replaced(path: Path, checkpoints: dict[str, str]) -> None:
    """Drops the lines of checkpoints that a run, by name, no longer has: it was trained anew."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        known = [(text, json.loads(text)) for text in lines]
        stay = [text for text, line in known if checkpoints.get(line["run"]) in (None, line["checkpoint"])]
        write_text(path, "".join(f"{text}\n" for text in stay))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the --out of the study")
    parser.add_argument("--study", default="flickr8k-frozen")
    parser.add_argument("--frozen-features", type=Path, default=home() / "features")
    parser.add_argument("--epsilon", nargs="+", type=float, default=list(EPSILONS))
    parser.add_argument("--pairs", nargs="+", type=int, default=list(PAIRS))
    parser.add_argument("--jsonl", type=Path, required=True)
    args = parser.parse_args()
    study = load(args.study)
    with_plans = {loss.name for loss in study.losses if loss.loss == "otco"}
    digests = {
        run.name: hashlib.sha256(run.checkpoint.read_bytes()).hexdigest()[:16] for run in runs(study, args.folder)
    }
    drop_replaced(args.jsonl, digests)
    done = kept_cells(args.jsonl)
    store = TowerStore(args.frozen_features, max(args.pairs))
    for run in tqdm(runs(study, args.folder), desc="runs", disable=None):
        digest = digests[run.name]
        wanted = cells(run, digest, args.epsilon, args.pairs, run.loss in with_plans)
        if to_do := [cell for cell in wanted if cell not in done]:
            with args.jsonl.open("a", encoding="utf-8") as file:
                for line in measured(run, to_do, store):
                    file.write(f"{json.dumps(line)}\n")
                    file.flush()


if __name__ == "__main__":
    main()
