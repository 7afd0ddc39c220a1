"""OTCO: optimal transport plans for contrastive learning, as an OpenCLIP plugin.

Data flows one way: features -> `FeatureWindow` -> `PlanSolver` -> `TransportPlan` -> `PlanCache` -> `OTCOLoss`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from openclip_otco.version import __version__

if TYPE_CHECKING:
    from openclip_otco.cache import FeatureWindow, PlanCache
    from openclip_otco.calibrate import CalibratedRetriever
    from openclip_otco.callback import PlanCacheCallback
    from openclip_otco.loss import OTCOLoss
    from openclip_otco.plan import TransportPlan
    from openclip_otco.solver import PlanSolver

_HOME = {
    "CalibratedRetriever": "calibrate",
    "FeatureWindow": "cache",
    "OTCOLoss": "loss",
    "PlanCache": "cache",
    "PlanCacheCallback": "callback",
    "PlanSolver": "solver",
    "TransportPlan": "plan",
}
__all__ = [
    "CalibratedRetriever",
    "FeatureWindow",
    "OTCOLoss",
    "PlanCache",
    "PlanCacheCallback",
    "PlanSolver",
    "TransportPlan",
    "__version__",
]


def __getattr__(name: str) -> object:
    # Imported when asked for: `openclip-otco patch` must run in a second, without torch.
    if name in _HOME:
        return getattr(import_module(f"openclip_otco.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
