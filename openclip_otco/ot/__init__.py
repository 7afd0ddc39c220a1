"""Optimal transport, alone: costs, plans and divergences. Knows nothing of OpenCLIP.

Three small things with clear seams: a cost (a matrix, or `CosineCost` of features), a starting plan
(`combinatorial_plan`, `exact_plan`), and a solver that refines it (`sinkhorn`).
"""

from openclip_otco.ot.combinatorial import combinatorial_plan
from openclip_otco.ot.cost import CosineCost, Cost, DenseCost
from openclip_otco.ot.divergence import sinkhorn_divergence
from openclip_otco.ot.exact import exact_plan
from openclip_otco.ot.sinkhorn import SinkhornResult, nearest_potentials, sinkhorn
from openclip_otco.ot.sparse_plan import SparsePlan

__all__ = [
    "CosineCost",
    "Cost",
    "DenseCost",
    "SinkhornResult",
    "SparsePlan",
    "combinatorial_plan",
    "exact_plan",
    "nearest_potentials",
    "sinkhorn",
    "sinkhorn_divergence",
]
