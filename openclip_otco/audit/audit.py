"""An audit: pairs are encoded and judged window by window; out of it come a ranking, a gallery and clean data."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from openclip_otco.audit import AuditError, table
from openclip_otco.audit.clean import check_target, write_clean
from openclip_otco.audit.encoder import PairEncoder
from openclip_otco.audit.folder import AuditFolder
from openclip_otco.audit.pairs import Pair, stream
from openclip_otco.audit.score import Truth, auroc
from openclip_otco.audit.source import ShardsOfRank, Source
from openclip_otco.audit.suspects import Worst
from openclip_otco.audit.towers import load_towers
from openclip_otco.audit.two_groups import overall
from openclip_otco.audit.verdict import Verdict, judge_window
from openclip_otco.audit.windows import windows
from openclip_otco.method.solver import PlanSolver
from openclip_otco.pages.gallery import Estimate, Suspect, write_gallery
from openclip_otco.runs import checkpoint as checkpoints
from openclip_otco.study.results import write_text

TABLE, GALLERY, FACTS = "audit.parquet", "gallery.html", "audit.json"
_SECONDS_BETWEEN_LOOKS = 1.0
# Of the histogram of probabilities.
_BINS = 40
# Columns that are compared with a list of wrong pairs.
_WITNESSES = ("probability", "structure", "log_density", "cosine")


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What to audit, and how.

    Args:
        source: the pairs.
        out: folder for all that is found, and for the work on the way.
        checkpoint: of OpenCLIP's training script; its plans are a witness.
        towers: unimodal models that are one, as `load_towers` takes them. Without them the checkpoint's locked towers
            are it, or else its whole model.
        model, precision, device: as `checkpoint.load` takes them.
        window: pairs judged at a time.
        epsilon: of the plans. Not the run's, as a large one makes wrong pairs look right.
        top: pairs in the gallery.
        batch_size: images encoded at once.
        workers: processes that decode images.
        truth: list of the pairs known to be wrong.
        clean: folder for the data without the dropped pairs.
        threshold: pairs less likely to be matched are dropped.
        drop: share of the pairs that is dropped, the least likely ones; with neither, as many as are estimated to be
            wrong.
        frozen_features: as `checkpoint.load` takes it.
        rank, ranks: of several processes, each judges its share of the shards; the first one waits for the others and
            writes what was found.
    """

    source: Source
    out: Path
    checkpoint: Path | None = None
    towers: str | None = None
    model: str | None = None
    precision: str | None = None
    device: str | None = None
    window: int = 4096
    epsilon: float = PlanSolver.epsilon
    top: int = 100
    batch_size: int = 64
    workers: int = 1
    truth: Path | None = None
    clean: Path | None = None
    threshold: float | None = None
    drop: float | None = None
    frozen_features: Path | None = None
    rank: int = 0
    ranks: int = 1

    def run(self) -> dict[str, Any]:
        """Do it, or what is left of it.

        Returns:
            The figures, which also stand in `audit.json`; of a rank that is not the first, nothing.

        Raises:
            AuditError, EvaluationError: something that was given cannot be used.
        """
        if self.checkpoint is None and self.towers is None:
            raise AuditError("--towers: name the models that judge the pairs, by --towers, --checkpoint or both")
        if self.rank >= self.ranks:
            raise AuditError(f"--rank {self.rank}: must be below --ranks {self.ranks}")
        for flag, value in (("--threshold", self.threshold), ("--drop", self.drop)):
            if value is not None and self.clean is None:
                raise AuditError(f"{flag}: says what --write-clean DIR leaves out; give it too, or neither")
        if self.clean is not None:
            check_target(self.clean, self.source)
        truth = Truth(self.truth) if self.truth is not None else None
        settings = self._settings()
        share: Source = self.source if self.ranks == 1 else ShardsOfRank(self.source, self.rank, self.ranks)
        folder = AuditFolder(self.out, self.rank, self.ranks)
        with folder.opened(settings):
            if not folder.progress()[1]:
                encoder = self._encoder()
                total = share.total()
                # Not only once: parts may lie behind the one that is missing.
                while not folder.progress()[1]:
                    self._judge_missing(folder, share, encoder, total)
                if encoder.trained is not None:
                    encoder.trained.save_frozen()
            if self.rank:
                return {}
            _wait_for(folder)
            return self._report(folder, settings, truth)

    def _encoder(self) -> PairEncoder:
        trained, device = None, self.device or _own_gpu()
        if self.checkpoint is not None:
            trained = checkpoints.load(self.checkpoint, self.model, self.precision, device, self.frozen_features)
        return PairEncoder(trained, load_towers(self.towers, device) if self.towers else None)

    def _settings(self) -> dict[str, Any]:
        """All that decides the rows, by flag."""
        weights, run = None, dict[str, Any]()
        if self.checkpoint is not None:
            if not self.checkpoint.is_file():
                raise AuditError(f"--checkpoint {self.checkpoint}: no such file")
            run = checkpoints.params(self.checkpoint)
            with self.checkpoint.open("rb") as file:
                weights = hashlib.file_digest(file, "sha256").hexdigest()
        data = hashlib.sha256(json.dumps(self.source.fingerprint()).encode()).hexdigest()
        return {
            "--checkpoint": weights,
            "--towers": self.towers,
            "--model": self.model or run.get("model"),
            "--precision": self.precision or run.get("precision"),
            "--data": data,
            "--window": self.window,
            "--epsilon": float(self.epsilon),
            "--top": self.top,
            "--ranks": self.ranks,
        }

    def _judge_missing(self, folder: AuditFolder, source: Source, encoder: PairEncoder, total: int | None) -> None:
        """Add parts to `folder`, from the first one that is missing to the next one that is there, or to the end."""
        start, _ = folder.progress()
        solver = PlanSolver(epsilon=self.epsilon)
        worst = Worst(self.top, _worst_so_far(folder.parts()))
        end = start
        with tqdm(total=total, initial=start.images, desc="audit", unit="image", disable=None) as bar:

            def batches() -> Iterator[list[Pair]]:
                nonlocal end
                for pairs, behind in stream(source, encoder, self.batch_size, self.workers, start):
                    bar.update(behind.images - end.images)
                    end = behind
                    yield pairs

            for window, following in windows(batches(), self.window):
                verdict = self._judge(window, solver, encoder.device)
                rows = self._rows(window, verdict, worst)
                if folder.add(rows, verdict.wrong, following.cursor if following else end, last=following is None):
                    return
        if not folder.parts():
            raise AuditError(
                f"--data: no pairs of an image and a caption in {end.images} samples "
                f"({end.unreadable} could not be read, {end.captionless} have no caption)"
            )

    @staticmethod
    def _judge(window: list[Pair], solver: PlanSolver, device: torch.device) -> Verdict:
        def stacked(rows: Iterable[Tensor]) -> Tensor:
            return torch.stack(list(rows)).to(device)

        towers = stacked(pair.image_tower for pair in window), stacked(pair.text_tower for pair in window)
        known = [pair.trained for pair in window if pair.trained is not None]
        trained = (stacked(image for image, _ in known), stacked(text for _, text in known)) if known else None
        images, captions = [pair.image_digest for pair in window], [pair.caption for pair in window]
        return judge_window(solver, towers, trained, images, captions)

    def _rows(self, window: list[Pair], verdict: Verdict, worst: Worst) -> list[table.Row]:
        rows: list[table.Row] = []
        for index, pair in enumerate(window):
            best = window[verdict.best[index]] if verdict.best[index] >= 0 else None
            shard, sample, line = pair.place
            rows.append(
                {
                    "key": pair.key,
                    "shard": self.source.names[shard],
                    "caption": pair.caption,
                    "probability": float(verdict.probability[index]),
                    "structure": float(verdict.structure[index]),
                    "log_density": None if verdict.log_density is None else float(verdict.log_density[index]),
                    "cosine": None if verdict.cosine is None else float(verdict.cosine[index]),
                    "best_caption": best and best.caption,
                    "best_key": best and best.key,
                    "evidence": float(verdict.evidence[index]),
                    "shard_number": shard,
                    "sample": sample,
                    "line": line,
                }
            )
        for row, pair in sorted(zip(rows, window, strict=True), key=lambda each: table.order(each[0]))[: self.top]:
            if worst.admits(table.order(row)):
                row["thumbnail"] = pair.thumbnail
        return rows

    def _report(self, folder: AuditFolder, settings: dict[str, Any], truth: Truth | None) -> dict[str, Any]:
        ranks = folder.of_ranks()
        parts = [part for rank in ranks for part in rank.parts()]
        ends = [rank.progress()[0] for rank in ranks]
        counts = [table.count(part) for part in parts]
        total = sum(counts)
        wrong = overall([share for rank in ranks for share in rank.wrong_shares()], counts)
        dropped = round((wrong.value if self.drop is None else self.drop) * total) if self.threshold is None else 0
        with folder.scratch() as scratch:
            ranking = table.Ranking(parts, scratch)
            ranking.write(self.out / TABLE)
            suspects = [_suspect(row, rank) for rank, row in enumerate(ranking.first(self.top), start=1)]
            last_dropped = table.order(ranking.first(1, dropped - 1)[0]) if dropped else None
            histogram = ranking.histogram(_BINS)
        low, high = wrong.interval()
        facts: dict[str, Any] = {
            "checkpoint": self.checkpoint and self.checkpoint.name,
            "model": settings["--model"],
            "towers": self.towers,
            "images": sum(end.images for end in ends),
            "unreadable": sum(end.unreadable for end in ends),
            "captionless": sum(end.captionless for end in ends),
            "pairs": total,
            "windows": len(parts),
            "window": self.window,
            "epsilon": settings["--epsilon"],
            "wrong_share": wrong.value,
            "wrong_share_low": low,
            "wrong_share_high": high,
        }
        if truth is not None:
            facts |= _scores(self.out / TABLE, truth)
        estimate = Estimate(total, wrong.value, low, high, histogram)
        shown = {name: value for name, value in facts.items() if value is not None}
        write_gallery(self.out / GALLERY, suspects, estimate, shown, "Audit: pairs that may not belong together")
        if self.clean is not None:
            if dropped == total and self.drop is None:
                raise AuditError(
                    "--write-clean: to these models no pair seems right; give others, or say by --drop or --threshold "
                    "what to leave out"
                )

            def keep(row: table.Row) -> bool:
                if self.threshold is not None:
                    return bool(row["probability"] >= self.threshold)
                return last_dropped is None or table.order(row) > last_dropped

            facts["clean_samples"], facts["not_written"] = write_clean(self.source, parts, keep, self.clean)
        write_text(self.out / FACTS, json.dumps(facts, indent=1) + "\n")
        return facts


def _own_gpu() -> str | None:
    """Of a process that torchrun started, the GPU that no other one of its machine has."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if local and torch.cuda.is_available() else None


def _wait_for(folder: AuditFolder) -> None:
    """Until all ranks have judged their share; says which ones it waits for."""
    told: list[int] = []
    while missing := [each.rank for each in folder.of_ranks() if not each.progress()[1]]:
        if missing != told:
            print(f"openclip-otco audit: waiting for ranks {', '.join(map(str, missing))}", file=sys.stderr)
        told = missing
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _worst_so_far(parts: Iterable[Path]) -> Iterator[table.Order]:
    """Where the pairs rank that had a thumbnail made."""
    for part in parts:
        for row in table.rows(part, [*table.ORDER, "thumbnail"]):
            if row["thumbnail"] is not None:
                yield table.order(row)


def _suspect(row: table.Row, rank: int) -> Suspect:
    names = ("key", "shard", "caption", "probability", "structure", "cosine", "thumbnail")
    best = {name: row[name] or "" for name in ("best_key", "best_caption")}
    known: dict[str, Any] = {name: row[name] for name in names} | best
    return Suspect(rank=rank, **known)


def _scores(path: Path, truth: Truth) -> dict[str, float | int]:
    """How many pairs are known to be wrong, and AUROC of each witness."""
    rows = list(table.rows(path, ["key", "rank", *_WITNESSES]))
    wrong = [truth.is_wrong(row["key"]) for row in rows]
    found: dict[str, float | int] = {"wrong": sum(wrong)}
    for name in _WITNESSES:
        # Equal probabilities are ordered all the same.
        scores = [row["rank" if name == "probability" else name] for row in rows]
        if None not in scores:
            try:
                found[f"auroc_{name}"] = auroc(scores, wrong)
            except ValueError as error:
                raise AuditError(f"--truth {truth.path}: lists {sum(wrong)} of {len(wrong)} pairs; {error}") from error
    return found
