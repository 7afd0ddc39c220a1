"""What a run saved last: the newest checkpoint that can be read, and the plans cached in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from openclip_otco.method.cache import PlanCache
from openclip_otco.method.plan import TransportPlan
from openclip_otco.runs.checkpoint import read


@dataclass(frozen=True)
class Saved:
    """A checkpoint of a run.

    Args:
        checkpoint: the file.
        epoch: epochs that were complete, or None where it does not tell.
        plans: of the cache, oldest first; empty where the run has none, as one of another loss.
        made, skipped: plans so far.
    """

    checkpoint: Path
    epoch: int | None
    plans: tuple[TransportPlan, ...]
    made: int = 0
    skipped: int = 0


def newest(run: Path) -> Saved | None:
    """The newest readable checkpoint of the run in the folder `run`; None without any.

    One that a running training has not written to its end is passed over for the one before.
    """
    files = [path for path in (run / "checkpoints").glob("*.pt") if path.is_file()]
    for checkpoint in sorted(files, key=_age):
        try:
            content = read(checkpoint)
        except Exception:  # torch.load raises whatever a torn file makes it stumble over
            continue
        epoch = content.get("epoch")
        state = content.get("plugins", {}).get("otco", {})
        try:
            cache = PlanCache(max(1, len(state["cache"]["plans"])))
            cache.load_state_dict(state["cache"])
            counts = int(state["made"]), int(state["skipped"])
        except (KeyError, TypeError, ValueError, AttributeError):
            cache, counts = PlanCache(1), (0, 0)
        return Saved(checkpoint, epoch if isinstance(epoch, int) else None, tuple(cache[s] for s in cache), *counts)
    return None


def _age(path: Path) -> tuple[float, str]:
    try:
        return -path.stat().st_mtime, path.name
    except OSError:  # deleted by the training a moment ago
        return 0.0, path.name
