"""An audit: pairs are encoded, coupled window by window and judged; what was found becomes a ranking and a gallery."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from openclip_otco.audit import AuditError, table
from openclip_otco.audit.clean import check_target, write_clean
from openclip_otco.audit.confidence import judge
from openclip_otco.audit.folder import AuditFolder
from openclip_otco.audit.pairs import Pair, stream
from openclip_otco.audit.score import Truth, auroc, estimated_share
from openclip_otco.audit.source import Source
from openclip_otco.audit.suspects import Worst
from openclip_otco.audit.windows import windows
from openclip_otco.evaluate import checkpoint as checkpoints
from openclip_otco.evaluate.encoder import Encoder
from openclip_otco.pages.gallery import Suspect, write_gallery
from openclip_otco.solver import PlanSolver
from openclip_otco.study.results import write_text

TABLE, GALLERY, FACTS = "audit.parquet", "gallery.html", "audit.json"


@dataclass(frozen=True)
class Audit:
    """What to audit, and how.

    Args:
        checkpoint: of OpenCLIP's training script.
        source: the pairs.
        out: folder for all that is found, and for the work on the way.
        model, precision, device: as `checkpoint.load` takes them.
        window: pairs coupled at a time.
        epsilon: of the plans. Not the run's, as a large one makes wrong pairs look right.
        top: pairs in the gallery.
        batch_size: images encoded at once.
        workers: processes that decode images.
        truth: list of the pairs known to be wrong.
        clean: folder for the data without the dropped pairs.
        threshold: pairs of less confidence are dropped.
        drop: share of the pairs that is dropped, the least confident ones; with neither, as many as are estimated to be
            wrong.
        frozen_features: as `checkpoint.load` takes it.
    """

    checkpoint: Path
    source: Source
    out: Path
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

    def run(self) -> dict[str, Any]:
        """Do it, or what is left of it; the figures, which also stand in `audit.json`.

        Raises:
            AuditError, EvaluationError: something that was given cannot be used.
        """
        for flag, value in (("--threshold", self.threshold), ("--drop", self.drop)):
            if value is not None and self.clean is None:
                raise AuditError(f"{flag}: says what --write-clean DIR leaves out; give it too, or neither")
        if self.clean is not None:
            check_target(self.clean, self.source)
        truth = Truth(self.truth) if self.truth is not None else None
        settings = self._settings()
        folder = AuditFolder(self.out)
        with folder.opened(settings):
            if not folder.progress()[1]:
                encoder = checkpoints.load(
                    self.checkpoint, self.model, self.precision, self.device, self.frozen_features
                )
                total = self.source.total()
                # Not only once: parts may lie behind the one that is missing.
                while not folder.progress()[1]:
                    self._judge_missing(folder, encoder, settings["--epsilon"], total)
                encoder.save_frozen()
            return self._report(folder, settings, truth)

    def _settings(self) -> dict[str, Any]:
        """All that decides the rows, by flag."""
        run = checkpoints.params(self.checkpoint)
        if not self.checkpoint.is_file():
            raise AuditError(f"--checkpoint {self.checkpoint}: no such file")
        with self.checkpoint.open("rb") as file:
            weights = hashlib.file_digest(file, "sha256").hexdigest()
        data = hashlib.sha256(json.dumps(self.source.fingerprint()).encode()).hexdigest()
        return {
            "--checkpoint": weights,
            "--model": self.model or run.get("model"),
            "--precision": self.precision or run.get("precision"),
            "--data": data,
            "--window": self.window,
            "--epsilon": float(self.epsilon),
            "--top": self.top,
        }

    def _judge_missing(self, folder: AuditFolder, encoder: Encoder, epsilon: float, total: int | None) -> None:
        """Add parts to `folder`, from the first one that is missing to the next one that is there, or to the end."""
        start, _ = folder.progress()
        solver = PlanSolver(epsilon=epsilon)
        worst = Worst(self.top, _worst_so_far(folder.parts()))
        end = start
        with tqdm(total=total, initial=start.images, desc="audit", unit="image", disable=None) as bar:

            def batches() -> Iterator[list[Pair]]:
                nonlocal end
                for pairs, behind in stream(self.source, encoder, self.batch_size, self.workers, start):
                    bar.update(behind.images - end.images)
                    end = behind
                    yield pairs

            for window, following in windows(batches(), self.window):
                rows = self._rows(window, solver, encoder.device, worst)
                if folder.add(rows, following.cursor if following else end, last=following is None):
                    return
        if not folder.parts():
            raise AuditError(
                f"--data: no pairs of an image and a caption in {end.images} samples "
                f"({end.unreadable} could not be read, {end.captionless} have no caption)"
            )

    def _rows(self, window: list[Pair], solver: PlanSolver, device: torch.device, worst: Worst) -> list[table.Row]:
        images = torch.stack([pair.image_feature for pair in window]).to(device)
        texts = torch.stack([pair.text_feature for pair in window]).to(device)
        try:
            plan = solver.solve(images, texts)
        except RuntimeError as error:
            raise AuditError(f"--epsilon {solver.epsilon}: {error}") from error
        judged = judge(plan, [pair.image_digest for pair in window], [pair.caption for pair in window])
        columns = (judged.log_confidence.tolist(), judged.cosine.tolist(), judged.best.tolist())
        rows = []
        for pair, log_confidence, cosine, index in zip(window, *columns, strict=True):
            best = window[index] if index >= 0 else None
            shard, sample, line = pair.place
            rows.append(
                {
                    "key": pair.key,
                    "shard": self.source.names[shard],
                    "caption": pair.caption,
                    "confidence": math.exp(log_confidence),
                    "log_confidence": log_confidence,
                    "cosine": cosine,
                    "best_caption": best and best.caption,
                    "best_key": best and best.key,
                    "shard_number": shard,
                    "sample": sample,
                    "line": line,
                }
            )
        for row, pair in sorted(zip(rows, window, strict=True), key=lambda each: table.order(each[0]))[: self.top]:
            if worst.admits(row["log_confidence"]):
                row["thumbnail"] = pair.thumbnail
        return rows

    def _report(self, folder: AuditFolder, settings: dict[str, Any], truth: Truth | None) -> dict[str, Any]:
        parts, (end, _) = folder.parts(), folder.progress()
        total = sum(map(table.count, parts))
        matched = sum(table.count(part) * _estimated_share(part) for part in parts) / total
        dropped = round((1 - matched if self.drop is None else self.drop) * total) if self.threshold is None else 0
        suspects: list[Suspect] = []
        last_dropped = None

        def ranking(rows: Iterable[table.Row]) -> Iterator[table.Row]:
            nonlocal last_dropped
            for rank, row in enumerate(rows, start=1):
                if rank <= self.top:
                    suspects.append(_suspect(row, rank))
                if rank <= dropped:
                    last_dropped = table.order(row)
                yield {name: row.get(name) for name in table.TABLE.names} | {"rank": rank}

        with folder.scratch() as scratch:
            ranked = tqdm(table.ranked(parts, scratch), total=total, desc="table", unit="pair", disable=None)
            table.write(self.out / TABLE, ranking(ranked), table.TABLE)
        facts: dict[str, Any] = {
            "checkpoint": self.checkpoint.name,
            "model": settings["--model"],
            "images": end.images,
            "unreadable": end.unreadable,
            "captionless": end.captionless,
            "pairs": total,
            "windows": len(parts),
            "window": self.window,
            "epsilon": settings["--epsilon"],
            "matched_share": matched,
        }
        if truth is not None:
            facts |= _scores(self.out / TABLE, truth)
        write_gallery(self.out / GALLERY, suspects, facts, "Audit: pairs that may not belong together")
        if self.clean is not None:
            if dropped == total and self.drop is None:
                raise AuditError(
                    "--write-clean: to this checkpoint no pair seems right; give one that was trained longer or with "
                    "--loss otco, or say by --drop or --threshold what to leave out"
                )

            def keep(row: table.Row) -> bool:
                if self.threshold is not None:
                    return bool(row["confidence"] >= self.threshold)
                return last_dropped is None or table.order(row) > last_dropped

            facts["clean_samples"], facts["not_written"] = write_clean(self.source, parts, keep, self.clean)
        write_text(self.out / FACTS, json.dumps(facts, indent=1) + "\n")
        return facts


def _estimated_share(part: Path) -> float:
    return estimated_share(torch.tensor([row["log_confidence"] for row in table.rows(part, ["log_confidence"])]))


def _worst_so_far(parts: Iterable[Path]) -> Iterator[float]:
    """The scores that had a thumbnail made."""
    for part in parts:
        for row in table.rows(part, ["log_confidence", "thumbnail"]):
            if row["thumbnail"] is not None:
                yield row["log_confidence"]


def _suspect(row: table.Row, rank: int) -> Suspect:
    names = ("key", "shard", "caption", "confidence", "cosine", "thumbnail")
    best = {name: row[name] or "" for name in ("best_key", "best_caption")}
    known: dict[str, Any] = {name: row[name] for name in names} | best
    return Suspect(rank=rank, **known)


def _scores(path: Path, truth: Truth) -> dict[str, float | int]:
    """AUROC of confidence, and of cosine similarity beside it."""
    rows = [
        (truth.is_wrong(row["key"]), row["log_confidence"], row["cosine"])
        for row in table.rows(path, ["key", "log_confidence", "cosine"])
    ]
    wrong, confidence, cosine = zip(*rows, strict=True)
    try:
        return {
            "wrong": sum(wrong),
            "auroc_confidence": auroc(confidence, wrong),
            "auroc_cosine": auroc(cosine, wrong),
        }
    except ValueError as error:
        raise AuditError(f"--truth {truth.path}: lists {sum(wrong)} of {len(wrong)} pairs; {error}") from error
