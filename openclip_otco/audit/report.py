"""The report of an audit: the finished parts become the table, the gallery, the figures and the clean data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openclip_otco.audit import table
from openclip_otco.audit.clean import write_clean
from openclip_otco.audit.folder import AuditFolder
from openclip_otco.audit.keep import keep_rule
from openclip_otco.audit.score import Truth, auroc
from openclip_otco.audit.settings import CleanSettings
from openclip_otco.audit.source import Source
from openclip_otco.audit.two_groups import WrongShare, overall_share
from openclip_otco.errors import UserError
from openclip_otco.files import write_text
from openclip_otco.pages.gallery import Estimate, Suspect, write_gallery

TABLE, GALLERY, FACTS = "audit.parquet", "gallery.html", "audit.json"
# Number of bars in the histogram of probabilities.
_BINS = 40
# Columns that are compared with a list of wrong pairs.
_WITNESSES = ("probability", "structure", "log_density", "cosine")


@dataclass(frozen=True)
class Judged:
    """What all ranks have judged."""

    parts: list[Path]
    """The finished parts that hold pairs, in the order of the data."""
    pairs: int
    """Number of pairs."""
    images: int
    """Number of samples."""
    unreadable: int
    """Number of samples whose image or caption could not be read."""
    captionless: int
    """Number of samples without a caption."""
    wrong: WrongShare
    """The estimated share of wrong pairs."""

    @classmethod
    def of(cls, folder: AuditFolder) -> Judged:
        """What the parts of all ranks say.

        Raises:
            UserError: there are no pairs.
        """
        ranks = folder.of_ranks()
        ends = [rank.progress()[0] for rank in ranks]
        images, unreadable, captionless = (
            sum(getattr(end, name) for end in ends) for name in ("images", "unreadable", "captionless")
        )
        found = [
            (part, count, share)
            for rank in ranks
            for part, share in zip(rank.parts(), rank.wrong_shares(), strict=True)
            if (count := table.count(part))  # a rank whose shards hold no pair has an empty part
        ]
        if not found:
            raise UserError(
                f"--data: no pairs of an image and a caption in {images} samples "
                f"({unreadable} could not be read, {captionless} have no caption)"
            )
        parts, counts, shares = zip(*found, strict=True)
        return cls(list(parts), sum(counts), images, unreadable, captionless, overall_share(shares, counts))


def write_report(
    folder: AuditFolder,
    source: Source,
    about: Mapping[str, Any],
    top: int,
    truth: Truth | None,
    clean: CleanSettings | None,
) -> dict[str, Any]:
    """Write all that an audit leaves beside its parts.

    Args:
        folder: of a finished audit.
        source: all pairs, those of other ranks too.
        about: the models and settings, by the names that they have in `audit.json`.
        top: number of pairs in the gallery.
        truth: known wrong pairs, where there are any.
        clean: where to write the clean data, if they are asked for.

    Returns:
        The figures, which also stand in `audit.json`.

    Raises:
        UserError: something that was given cannot be used, or there are no pairs.
    """
    path = folder.path
    # `accessed` does not see errors of the clean data: `write_clean` turns them into errors for the user itself.
    with folder.accessed(), folder.scratch() as scratch:
        judged = Judged.of(folder)
        ranking = table.Ranking(judged.parts, scratch)
        ranking.write(path / TABLE)
        facts = _facts(judged, about)
        if truth is not None:
            facts |= _scores(path / TABLE, truth)
        _write_gallery(path / GALLERY, judged, ranking, facts, top)
        if clean is not None:
            facts |= _write_clean(source, judged, ranking, clean)
        write_text(path / FACTS, json.dumps(facts, indent=1) + "\n")
    return facts


def _facts(judged: Judged, about: Mapping[str, Any]) -> dict[str, Any]:
    models, settings = ("checkpoint", "model", "towers"), ("window", "epsilon")
    low, high = judged.wrong.interval()
    return {
        **{name: about[name] for name in models},
        "images": judged.images,
        "unreadable": judged.unreadable,
        "captionless": judged.captionless,
        "pairs": judged.pairs,
        "windows": len(judged.parts),
        **{name: about[name] for name in settings},
        "wrong_share": judged.wrong.value,
        "wrong_share_low": low,
        "wrong_share_high": high,
    }


def _write_gallery(path: Path, judged: Judged, ranking: table.Ranking, facts: Mapping[str, Any], top: int) -> None:
    suspects = [_suspect(row, rank) for rank, row in enumerate(ranking.first(top), start=1)]
    estimate = Estimate(judged.pairs, judged.wrong.value, *judged.wrong.interval(), ranking.histogram(_BINS))
    shown = {name: value for name, value in facts.items() if value is not None}
    write_gallery(path, suspects, estimate, shown, "Audit: pairs that may not belong together")


def _write_clean(source: Source, judged: Judged, ranking: table.Ranking, clean: CleanSettings) -> dict[str, Any]:
    marked = {} if clean.marks is None else clean.marks.places(judged.parts)
    keep = keep_rule(clean, ranking, judged.pairs, judged.wrong, marked)
    samples, not_written = write_clean(source, judged.parts, keep, clean.folder)
    facts: dict[str, Any] = {"clean_samples": samples, "not_written": not_written}
    if clean.marks is not None:
        kept = sum(marked.values())
        facts |= {"marked_keep": kept, "marked_drop": len(marked) - kept}
    return facts


def _suspect(row: table.Row, rank: int) -> Suspect:
    names = ("key", "shard", "caption", "probability", "structure", "cosine", "thumbnail")
    best = {name: row[name] or "" for name in ("best_key", "best_caption")}
    known: dict[str, Any] = {name: row[name] for name in names} | best
    return Suspect(rank=rank, **known)


def _scores(path: Path, truth: Truth) -> dict[str, float | int]:
    """How many pairs are known to be wrong, and the AUROC of each witness."""
    rows = list(table.rows(path, ["key", "rank", *_WITNESSES]))
    wrong = [truth.is_wrong(row["key"]) for row in rows]
    found: dict[str, float | int] = {"wrong": sum(wrong)}
    for name in _WITNESSES:
        # The rank, not the probability: it also orders pairs of equal probability.
        scores = [row["rank" if name == "probability" else name] for row in rows]
        if None not in scores:
            try:
                found[f"auroc_{name}"] = auroc(scores, wrong)
            except ValueError as error:
                raise UserError(f"--truth {truth.path}: lists {sum(wrong)} of {len(wrong)} pairs; {error}") from error
    return found
