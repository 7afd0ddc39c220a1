"""Figures of a plan for TensorBoard: a histogram of confidence, and a heat map of the plan's first rows and columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib import colormaps

from openclip_otco.method.plan import TransportPlan
from openclip_otco.method.support import row_shares, support_confidence

if TYPE_CHECKING:
    from openclip_otco.train.training_callback import PlanWriter

# Number of pairs in the heat map, and side of a cell in pixels.
_PAIRS, _PIXELS = 64, 4
# Colours span shares of an image's mass from this power of ten up to all of it.
LEAST_POWER = -4.0


def add_figures(writer: PlanWriter, plan: TransportPlan) -> None:
    """Writes `train/otco_confidence`, of all pairs in the support, and `train/otco_plan_block`, of the first 64.

    Brightness is the logarithm of the share of an image's mass (row) that a text (column) gets: own pairs are the
    diagonal. A plan that does not couple (`--otco-coupling softmax`) has no such shares, and gets no figures.
    """
    if not plan.coupled:
        return
    writer.add_histogram("train/otco_confidence", support_confidence(plan).cpu().numpy(), plan.step)
    some = torch.arange(min(_PAIRS, len(plan)), device=plan.f.device)
    brightness = relative_brightness(row_shares(plan, some, some).cpu().numpy())
    picture = colormaps["viridis"](brightness)[..., :3]
    enlarged = np.kron(picture, np.ones((_PIXELS, _PIXELS, 1)))
    writer.add_image("train/otco_plan_block", enlarged, plan.step, dataformats="HWC")


def relative_brightness(shares: np.ndarray) -> np.ndarray:
    """Where `shares` lie on the colour scale, in `[0, 1]`: the logarithm, from a ten-thousandth to all of the mass."""
    with np.errstate(divide="ignore"):
        return np.clip(1 - np.log10(shares) / LEAST_POWER, 0, 1)
