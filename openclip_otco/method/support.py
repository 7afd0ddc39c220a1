"""The mass of a plan on points of its own support: on some rows and columns, and on the pairs that it was made of."""

from __future__ import annotations

import math

from torch import Tensor

from openclip_otco.method.plan import TransportPlan


def row_shares(plan: TransportPlan, rows: Tensor, columns: Tensor) -> Tensor:
    """`N σ_ij` for images `rows` and texts `columns`, `(len(rows), len(columns))`: shares of each image's mass.

    A row adds up to 1 over all texts of the support, and so to at most 1 over `columns`. Both marginals are uniform, so
    the same number is the share of the text's mass that the image gets.

    Args:
        plan: a plan that couples. A plan of `--otco-coupling softmax` has no marginals, so it has no such shares.
        rows, columns: indices into the support.
    """
    similarity = plan.image_features[rows] @ plan.text_features[columns].T
    return ((plan.f[rows, None] + plan.g[columns] - 1 + similarity) / plan.epsilon - math.log(len(plan))).exp()


def own_shares(plan: TransportPlan) -> Tensor:
    """`N σ_ii`, `(N,)`: the share of its image's mass, and of its text's, that each pair of the support gets."""
    similarity = (plan.image_features * plan.text_features).sum(dim=1)
    return ((plan.f + plan.g - 1 + similarity) / plan.epsilon - math.log(len(plan))).exp()


def support_confidence(plan: TransportPlan) -> Tensor:
    """The confidence of the pairs in the support of `plan`, `(N,)`: `p(t_i | v_i) · p(v_i | t_i)`.

    `TransportPlan.confidence` is for pairs that are not in the support. For a pair in it, each factor is `N σ_ii`.
    """
    # Sinkhorn stops at a small marginal error, so that a share may be a little above 1.
    return own_shares(plan).clamp(max=1).square()
