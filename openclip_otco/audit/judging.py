"""Judging: pairs are encoded and judged window by window, and each window becomes a part of the folder."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from openclip_otco.audit import table
from openclip_otco.audit.encoder import PairEncoder
from openclip_otco.audit.folder import AuditFolder
from openclip_otco.audit.pairs import Pair, stream
from openclip_otco.audit.settings import JudgeSettings
from openclip_otco.audit.source import Source
from openclip_otco.audit.suspects import Worst
from openclip_otco.audit.two_groups import WrongShare
from openclip_otco.audit.verdict import Verdict, judge_window
from openclip_otco.audit.windows import second_half, windows
from openclip_otco.method.solver import PlanSolver


def judge_missing(folder: AuditFolder, source: Source, encoder: PairEncoder, settings: JudgeSettings) -> None:
    """Judge all pairs of `source` that no part of `folder` has yet.

    Raises:
        UserError: the data cannot be read, `folder` cannot be written, a plan cannot be solved, or the features of a
            model are not finite.
    """
    total = source.total()
    # A loop: where a broken part was removed, there are finished parts after the gap, and perhaps another gap.
    while not folder.progress()[1]:
        _judge_to_next_part(folder, source, encoder, settings, total)


def _judge_to_next_part(
    folder: AuditFolder, source: Source, encoder: PairEncoder, settings: JudgeSettings, total: int | None
) -> None:
    """Add parts from the first missing one on, up to the next one that is there, or to the end of the data."""
    start, _ = folder.progress()
    solver = PlanSolver(epsilon=settings.epsilon)
    with folder.accessed():
        worst = Worst(settings.top, _worst_so_far(folder.parts()))
    end = start
    with tqdm(total=total, initial=start.images, desc="audit", unit="image", disable=None) as bar:

        def batches() -> Iterator[list[Pair]]:
            nonlocal end
            for pairs, behind in stream(source, encoder, settings.batch_size, settings.workers, start):
                bar.update(behind.images - end.images)
                end = behind
                yield pairs

        def half_before() -> list[Pair]:
            """The second half of the window before `start`. It is encoded again."""
            middle = folder.middle()
            if middle is None:
                return []
            half = second_half(settings.window)
            again = stream(source, encoder, settings.batch_size, settings.workers, middle)
            return list(
                itertools.islice(itertools.chain.from_iterable(pairs for pairs, _ in again), half.stop - half.start)
            )

        for window in windows(batches(), settings.window, half_before):
            verdict = _judge(window.items, solver, encoder.device)
            rows = _rows(window.items, verdict, source.names)
            new, pairs = rows[window.judged :], window.items[window.judged :]
            _add_thumbnails(new, pairs, worst)
            next_is_there = folder.add(
                new,
                verdict.wrong,
                middle=window.items[second_half(len(window.items)).start].cursor,
                end=window.following.cursor if window.following else end,
                last=window.is_last,
            )
            if next_is_there or window.is_last:
                return
            del window, verdict, rows, new, pairs  # they would stay in memory until the next window is full
    # No pair was left. An empty part says so to the ranks that wait, and to the next start.
    folder.add([], WrongShare(0.0, 0.0), middle=end, end=end, last=True)


def _judge(window: Sequence[Pair], solver: PlanSolver, device: torch.device) -> Verdict:
    def stacked(rows: Iterable[Tensor]) -> Tensor:
        return torch.stack(list(rows)).to(device)

    towers = stacked(pair.image_tower for pair in window), stacked(pair.text_tower for pair in window)
    known = [pair.trained for pair in window if pair.trained is not None]
    trained = (stacked(image for image, _ in known), stacked(text for _, text in known)) if known else None
    images, captions = [pair.image_digest for pair in window], [pair.caption for pair in window]
    return judge_window(solver, towers, trained, images, captions)


def _rows(window: Sequence[Pair], verdict: Verdict, shards: Sequence[str]) -> list[table.Row]:
    """The rows of a part, without thumbnails, in the order of the window."""
    rows: list[table.Row] = []
    for index, pair in enumerate(window):
        best = window[verdict.best[index]] if verdict.best[index] >= 0 else None
        shard, sample, line = pair.place
        rows.append(
            {
                "key": pair.key,
                "shard": shards[shard],
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
    return rows


def _add_thumbnails(rows: Sequence[table.Row], window: Sequence[Pair], worst: Worst) -> None:
    """Give a thumbnail to those rows that may come into the gallery."""
    for row, pair in sorted(zip(rows, window, strict=True), key=lambda each: table.order(each[0]))[: worst.top]:
        if worst.admits(table.order(row)):
            row["thumbnail"] = pair.thumbnail


def _worst_so_far(parts: Iterable[Path]) -> Iterator[table.Order]:
    """The places in the ranking of the pairs that have a thumbnail already."""
    for part in parts:
        for row in table.rows(part, [*table.ORDER, "thumbnail"]):
            if row["thumbnail"] is not None:
                yield table.order(row)
