"""Ranks: how many candidates come before a query's own, tile by tile."""

from collections.abc import Callable

import torch
from torch import Tensor

Similarity = Callable[[Tensor, Tensor], Tensor]

# Entries of a tile of similarities: 64 MiB in float32, whatever the number of candidates.
_TILE = 2**24
# Unit vectors in float32 do not tell smaller differences of their cosines apart: such candidates are a tie.
TIE = 1e-6


def cosine(queries: Tensor, candidates: Tensor) -> Tensor:
    """Rows of the similarity matrix, `(n, m)`, of unit-norm features `(n, d)` and `(m, d)`."""
    return queries @ candidates.T


def ranks(
    queries: Tensor,
    candidates: Tensor,
    query_group: Tensor,
    candidate_group: Tensor,
    similarity: Similarity = cosine,
) -> Tensor:
    """Number of foreign candidates that are at least as similar to a query as the best candidate of its own group.

    A tie counts against the query, so that features that are all the same get no hits: sorting would give them those
    that the order of the data makes. That is also why the hit rates of clip-benchmark and torchmetrics, which sort,
    are not used here; without ties they are equal.

    Args:
        queries: `(n, d)`, finite.
        candidates: `(m, d)`, finite.
        query_group: `(n,)`, numbers of groups.
        candidate_group: `(m,)`; each query's group has a candidate.
        similarity: gives rows of the similarity matrix for some queries and all candidates.

    Returns:
        `(n,)`, 0 for a query whose own candidate comes first; recall at K is the share of ranks below K.
    """
    found = []
    rows = max(1, _TILE // len(candidates))
    for query, group in zip(queries.split(rows), query_group.split(rows), strict=True):
        scores = similarity(query, candidates)
        own = group[:, None] == candidate_group
        best = scores.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
        found.append(((scores >= best - TIE) & ~own).sum(dim=1))
    return torch.cat(found)
