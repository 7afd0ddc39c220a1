"""An audit: it encodes and judges pairs window by window, and makes a ranking, a gallery and clean data."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from openclip_otco.audit.clean import check_target
from openclip_otco.audit.encoder import PairEncoder
from openclip_otco.audit.folder import AuditFolder
from openclip_otco.audit.judging import judge_missing
from openclip_otco.audit.ranks import wait_for_ranks
from openclip_otco.audit.report import write_report
from openclip_otco.audit.score import Truth
from openclip_otco.audit.settings import CleanSettings, JudgeSettings
from openclip_otco.audit.source import ShardsOfRank, Source
from openclip_otco.audit.towers import load_towers
from openclip_otco.errors import UserError
from openclip_otco.runs import checkpoint as checkpoints


def run_audit(
    source: Source,
    out: Path,
    settings: JudgeSettings,
    *,
    clean: CleanSettings | None = None,
    truth: Truth | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> dict[str, Any]:
    """Audit `source`. If an audit was interrupted, do the rest of it.

    Args:
        source: the pairs.
        out: folder for the results, and for the parts that are finished.
        settings: how pairs are judged.
        clean: where to write the data without the dropped pairs, if they are asked for.
        truth: pairs that are known to be wrong, where there is a list of them.
        rank, ranks: number of this process, from 0, and number of processes. Each process judges its share of the
            shards; the first one then waits for the others and writes the results of all.

    Returns:
        The figures, which also stand in `audit.json`; empty for a rank that is not the first.

    Raises:
        UserError: something that was given cannot be used.
    """
    if rank >= ranks:
        raise UserError(f"--rank {rank}: must be below --ranks {ranks}")
    if clean is not None and rank == 0:  # it alone writes, perhaps before others have started
        check_target(clean.folder, source)
    share: Source = source if ranks == 1 else ShardsOfRank(source, rank, ranks)
    decisive = _decisive(source, settings, ranks)
    folder = AuditFolder(out, rank, ranks)
    with folder.opened(decisive):
        if not folder.progress()[1]:
            _encode_and_judge(folder, share, settings)
        if rank:
            return {}
        wait_for_ranks(folder)
        about = {
            "checkpoint": settings.checkpoint and settings.checkpoint.name,
            "model": decisive["--model"],
            "towers": settings.towers,
            "window": settings.window,
            "epsilon": decisive["--epsilon"],
        }
        return write_report(folder, source, about, settings.top, truth, clean)


def _encode_and_judge(folder: AuditFolder, source: Source, settings: JudgeSettings) -> None:
    # A function, so that the models are not in memory any more when the report is written.
    encoder = load_encoder(settings)
    judge_missing(folder, source, encoder, settings)
    if encoder.trained is not None:
        encoder.trained.save_frozen()


def load_encoder(settings: JudgeSettings) -> PairEncoder:
    """The models that `settings` name.

    Raises:
        UserError: one of them cannot be loaded.
    """
    trained, device = None, settings.device or _own_gpu()
    if settings.checkpoint is not None:
        trained = checkpoints.load(
            settings.checkpoint, settings.model, settings.precision, device, settings.frozen_features
        )
    return PairEncoder(trained, load_towers(settings.towers, device) if settings.towers else None)


def _own_gpu() -> str | None:
    """The GPU of a process that torchrun started; each process of a machine has another one."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if local and torch.cuda.is_available() else None


def _decisive(source: Source, settings: JudgeSettings, ranks: int) -> dict[str, Any]:
    """All that decides the rows of the table, by flag: plain values."""
    weights, run = None, dict[str, Any]()
    if settings.checkpoint is not None:
        if not settings.checkpoint.is_file():
            raise UserError(f"--checkpoint {settings.checkpoint}: no such file")
        run = checkpoints.params(settings.checkpoint)
        with settings.checkpoint.open("rb") as file:
            weights = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "--checkpoint": weights,
        "--towers": settings.towers,
        "--model": settings.model or run.get("model"),
        "--precision": settings.precision or run.get("precision"),
        "--data": hashlib.sha256(json.dumps(source.fingerprint()).encode()).hexdigest(),
        "--window": settings.window,
        "--epsilon": float(settings.epsilon),
        "--top": settings.top,
        "--ranks": ranks,
    }
