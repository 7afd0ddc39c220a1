"""Ranks: how many candidates come before a query's own, tile by tile."""

import torch
from torch import Tensor

# Entries of a tile of similarities: 64 MiB in float32, whatever the number of candidates.
_TILE = 2**24
# Unit vectors in float32 do not tell smaller differences of their cosines apart: such candidates are a tie.
TIE = 1e-6


def ranks(
    queries: Tensor,
    candidates: Tensor,
    query_group: Tensor,
    candidate_group: Tensor,
    potentials: Tensor | None = None,
) -> Tensor:
    """Number of foreign candidates that are at least as similar to a query as the best candidate of its own group.

    A tie counts against the query, so that features that are all the same get no hits: sorting would give them those
    that the order of the data makes. That is also why the hit rates of clip-benchmark and torchmetrics, which sort,
    are not used here; without ties they are equal.

    Args:
        queries: `(n, d)`, unit norm.
        candidates: `(m, d)`, unit norm.
        query_group: `(n,)`, numbers of groups.
        candidate_group: `(m,)`; each query's group has a candidate.
        potentials: `(m,)`, what is added to the cosines of each candidate; nothing where `None`.

    Returns:
        `(n,)`, 0 for a query whose own candidate comes first; recall at K is the share of ranks below K.
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
