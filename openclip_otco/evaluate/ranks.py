"""Ranks: how many candidates come before a query's own. Similarities are computed tile by tile."""

import torch
from torch import Tensor

# Entries of a tile of similarities, 64 MiB in float32.
_TILE = 2**24
# Cosines of float32 vectors are no more exact than this. Two candidates whose cosines differ by less are a tie.
TIE = 1e-6


def ranks(
    queries: Tensor,
    candidates: Tensor,
    query_group: Tensor,
    candidate_group: Tensor,
    potentials: Tensor | None = None,
) -> Tensor:
    """Number of candidates of other groups that are at least as similar to a query as the best of its own group.

    A tie counts against the query, so that features that are all equal get no hits. With sorting, as in clip-benchmark
    and torchmetrics, the order of the data would decide a tie. Without ties their hit rates are equal to these.

    Args:
        queries: `(n, d)`, unit norm.
        candidates: `(m, d)`, unit norm.
        query_group: `(n,)`, numbers of groups.
        candidate_group: `(m,)`; each query's group has a candidate.
        potentials: `(m,)`, added to the cosines of each candidate; zero where `None`.

    Returns:
        `(n,)`, 0 for a query whose own candidate comes first. Recall at K is the share of ranks below K.
    """
    found = []
    rows = max(1, _TILE // len(candidates))
    for query, group in zip(queries.split(rows), query_group.split(rows), strict=True):
        scores = query @ candidates.T
        if potentials is not None:
            scores += potentials
        own = group[:, None] == candidate_group
        best = scores.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
        found.append(((scores >= best - TIE) & ~own).sum(dim=1))
    return torch.cat(found)
