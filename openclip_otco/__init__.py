"""OTCO: optimal transport plans for contrastive learning, as an OpenCLIP plugin.

Data flows one way: features -> `FeatureWindow` -> `PlanSolver` -> `TransportPlan` -> `PlanCache` -> `OTCOLoss`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from openclip_otco.version import __version__

if TYPE_CHECKING:
    from openclip_otco.evaluate.retriever import CalibratedRetriever
    from openclip_otco.method.cache import PlanCache
    from openclip_otco.method.exchange import PlanExchange
    from openclip_otco.method.loss import OTCOLoss
    from openclip_otco.method.plan import TransportPlan
    from openclip_otco.method.solver import PlanSolver
    from openclip_otco.method.window import FeatureWindow
    from openclip_otco.train.callback import PlanCacheCallback

_HOME = {
    "CalibratedRetriever": "evaluate.retriever",
    "FeatureWindow": "method.window",
    "OTCOLoss": "method.loss",
    "PlanCache": "method.cache",
    "PlanCacheCallback": "train.callback",
    "PlanExchange": "method.exchange",
    "PlanSolver": "method.solver",
    "TransportPlan": "method.plan",
}
__all__ = [
    "CalibratedRetriever",
    "FeatureWindow",
    "OTCOLoss",
    "PlanCache",
    "PlanCacheCallback",
    "PlanExchange",
    "PlanSolver",
    "TransportPlan",
    "__version__",
]


def __getattr__(name: str) -> object:
    # Imported when asked for: `openclip-otco patch` must run in a second, without torch.
    if name in _HOME:
        return getattr(import_module(f"openclip_otco.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
