"""Settings of an audit: how pairs are judged, and which pairs are left out of the clean data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from openclip_otco.audit.marks import Marks
from openclip_otco.errors import UserError
from openclip_otco.method.solver import PlanSolver


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """How pairs are judged: by which models, how many at a time, and how fast.

    Raises:
        UserError: no model is named.
    """

    checkpoint: Path | None = None
    """Checkpoint of OpenCLIP's training script. Its transport plans are one witness."""
    towers: str | None = None
    """Unimodal models, as `load_towers` takes them. They are the other witness. Without them, the checkpoint's locked
    towers take their place, or else its whole model."""
    model: str | None = None
    """Model of the checkpoint, as `checkpoint.load` takes it."""
    precision: str | None = None
    """Precision of the checkpoint's model, as `checkpoint.load` takes it."""
    device: str | None = None
    """Device of torch for all models. By default: under torchrun, the GPU of this process; else the device of the
    checkpoint's run, if this machine has it; else a GPU, or the CPU."""
    frozen_features: Path | None = None
    """Folder in which the checkpoint's frozen towers remember features, as `checkpoint.load` takes it."""
    window: int = 4096
    """Number of pairs that are judged together."""
    epsilon: float = PlanSolver.epsilon
    """Regularization of the plans. It is not the run's: a large one makes wrong pairs look right."""
    top: int = 100
    """Number of pairs in the gallery."""
    batch_size: int = 64
    """Number of images that are encoded at once."""
    workers: int = 1
    """Number of processes that decode images; 0 decodes in this process."""

    def __post_init__(self) -> None:
        if self.checkpoint is None and self.towers is None:
            raise UserError("--towers: name the models that judge the pairs, by --towers, --checkpoint or both")


@dataclass(frozen=True, kw_only=True)
class CleanSettings:
    """Where the clean data are written, and which pairs they leave out.

    With neither `threshold` nor `drop`, as many pairs are dropped as are estimated to be wrong.
    """

    folder: Path
    """Folder for the data without the dropped pairs; it must be missing or empty."""
    threshold: float | None = None
    """Pairs with a lower probability are dropped."""
    drop: float | None = None
    """Share of the pairs that is dropped, the least likely first."""
    marks: Marks | None = None
    """Pairs that a person marked; they are kept or dropped as the marks say, whatever their probability."""
