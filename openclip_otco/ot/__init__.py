"""Optimal transport: costs, plans and divergences. The room needs nothing of OpenCLIP.

A cost is a matrix, or the `CosineCost` of features. An initial plan (`combinatorial_plan`, `exact_plan`) has few
entries. A solver (`sinkhorn`) starts from its duals, and finds the entropic plan.
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
