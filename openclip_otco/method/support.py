"""A plan's block: the mass that it puts on a few rows and columns, and what that says of their pairs."""

from __future__ import annotations

import math

from torch import Tensor

from openclip_otco.method.plan import TransportPlan


def row_shares(plan: TransportPlan, rows: Tensor, columns: Tensor) -> Tensor:
    """`N σ_ij` for images `rows` and texts `columns`, `(len(rows), len(columns))`: shares of each image's mass.

    A share is of all texts of the support, so that a block's rows add up to at most 1. Both marginals are uniform:
    the same number is the share of the text's mass that the image gets.

    Args:
        plan: a plan that couples; that of `--otco-coupling softmax` has no marginals, and these are no shares then.
        rows, columns: indices into the support.
    """
    similarity = plan.image_features[rows] @ plan.text_features[columns].T
    return ((plan.f[rows, None] + plan.g[columns] - 1 + similarity) / plan.epsilon - math.log(len(plan))).exp()


def own_shares(plan: TransportPlan) -> Tensor:
    """`N σ_ii`, `(N,)`: what each pair of the support of `plan` gets of its image's mass, and of its text's."""
    similarity = (plan.image_features * plan.text_features).sum(dim=1)
    return ((plan.f + plan.g - 1 + similarity) / plan.epsilon - math.log(len(plan))).exp()


def support_confidence(plan: TransportPlan) -> Tensor:
    """The confidence of the pairs in the support of `plan`, `(N,)`: `p(t_i | v_i) · p(v_i | t_i)`.

    `TransportPlan.confidence` is for pairs that join the support; of one that is in it, each factor is `N σ_ii`.
    """
    # What Sinkhorn leaves of the marginal error may lift a share a little above 1.
    return own_shares(plan).clamp(max=1).square()
