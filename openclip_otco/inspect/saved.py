"""What a run has saved: the newest checkpoint that can be read, and the plans cached in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from openclip_otco.method.cache import PlanCache
from openclip_otco.method.plan import TransportPlan
from openclip_otco.runs.checkpoint import read


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint of a run.

    Args:
        checkpoint: the file.
        epoch: number of complete epochs; None where the checkpoint does not tell.
        plans: of the cache, oldest first; empty where there is no cache, as with another loss.
        made, skipped: numbers of plans so far.
    """

    checkpoint: Path
    epoch: int | None
    plans: tuple[TransportPlan, ...]
    made: int = 0
    skipped: int = 0


def newest_checkpoint(run: Path) -> SavedRun | None:
    """The newest readable checkpoint of the run in the folder `run`; None where there is none.

    A training may just be writing the newest file. Then the one before it is read.
    """
    files = [path for path in (run / "checkpoints").glob("*.pt") if path.is_file()]
    for checkpoint in sorted(files, key=_newest_first):
        try:
            content = read(checkpoint)
        except Exception:  # torch.load raises errors of any kind for a torn file
            continue
        epoch = content.get("epoch")
        state = content.get("plugins", {}).get("otco", {})
        try:
            cache = PlanCache(max(1, len(state["cache"]["plans"])))
            cache.load_state_dict(state["cache"])
            counts = int(state["made"]), int(state["skipped"])
        except (KeyError, TypeError, ValueError, AttributeError):
            cache, counts = PlanCache(1), (0, 0)
        return SavedRun(
            checkpoint, epoch if isinstance(epoch, int) else None, tuple(cache[step] for step in cache), *counts
        )
    return None


def _newest_first(path: Path) -> tuple[float, str]:
    """Sorts files by time, the newest first."""
    try:
        return -path.stat().st_mtime, path.name
    except OSError:  # the training has just deleted it
        return 0.0, path.name
