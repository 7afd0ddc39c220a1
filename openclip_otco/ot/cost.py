"""Ground costs: what it costs to move mass from image `i` to text `j`. Solvers read them tile by tile."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import ParamSpec, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from openclip_otco.ot.finite import finite_rows

# Elements of a tile. On a CPU they are 2 MiB of float32, which stay in the cache during the operations on a tile. On a
# GPU they are enough to keep it busy.
TILE_ELEMENTS = 2**19
GPU_TILE_ELEMENTS = 2**25
# Tiles of a lazy cost are larger by this factor, as a matrix product of few rows is slow.
LAZY_FACTOR = 8
# Up to this many entries a cost may be kept as a matrix: 256 MiB of float32.
DENSE_ENTRIES = 8192 * 8192


class Cost(Protocol):
    """An `(n, m)` cost that need not exist as a matrix."""

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and of columns."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the costs."""

    @property
    def device(self) -> torch.device:
        """Where the costs are computed."""

    def rows(self, index: slice | Tensor, out: Tensor | None = None) -> Tensor:
        """The rows `index` of the matrix, `(len(index), m)`. Do not change them: they may be the cost's own memory.

        A cost that has to compute its rows may do so in `out`, which has their shape.
        """
        ...

    def entries(self, rows: Tensor, cols: Tensor) -> Tensor:
        """`C[rows, cols]`, `(k,)`, of two indices `(k,)`."""
        ...

    def restricted(self, rows: slice | Tensor, cols: slice | Tensor) -> Cost:
        """The cost between `rows` and `cols` alone: slices, or indices, `(k,)` and `(l,)`."""
        ...

    def transposed(self) -> Cost:
        """The same cost with rows and columns exchanged."""
        ...


CostLike: TypeAlias = "Cost | Tensor"


P = ParamSpec("P")
R = TypeVar("R")


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Runs a solver outside autocast, as potentials and costs need more than half precision."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

    return run


class CosineCost:
    """`C_ij = 1 - x_i · y_j`, in `[0, 2]`; only the features are kept.

    Args:
        x: `(n, d)` unit-norm features. Half precision becomes float32.
        y: `(m, d)` unit-norm features, on the same device.
        check_finite: look for NaN and infinity, in one pass over the features; on a GPU the caller waits for it.

    Raises:
        TypeError: the features are no tensors.
        ValueError: they are empty, not two-dimensional, of different width, or not finite.
    """

    def __init__(self, x: Tensor, y: Tensor, check_finite: bool = True) -> None:
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            raise TypeError(f"features must be torch tensors; got {type(x).__name__} and {type(y).__name__}")
        if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or 0 in (*x.shape, *y.shape):
            raise ValueError(
                f"features must be non-empty (n, d) and (m, d) matrices of one width d; "
                f"got {tuple(x.shape)} and {tuple(y.shape)}"
            )
        dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        self.x, self.y = x.detach().to(dtype), y.detach().to(dtype)
        for name, features in (("x", self.x), ("y", self.y)):
            if check_finite and not bool(finite_rows(features).all()):
                raise ValueError(f"features {name} hold NaN or infinity; drop those rows before coupling")

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and of columns."""
        return self.x.shape[0], self.y.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of the costs."""
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        """Where the costs are computed."""
        return self.x.device

    def rows(self, index: slice | Tensor, out: Tensor | None = None) -> Tensor:
        """As `Cost.rows`."""
        return torch.mm(self.x[index], self.y.T, out=out).neg_().add_(1.0)

    def entries(self, rows: Tensor, cols: Tensor) -> Tensor:
        """As `Cost.entries`."""
        step = max(1, TILE_ELEMENTS // self.x.shape[1])
        pairs = zip(rows.split(step), cols.split(step), strict=True)
        return torch.cat([1.0 - (self.x[i] * self.y[j]).sum(dim=1) for i, j in pairs])

    def restricted(self, rows: slice | Tensor, cols: slice | Tensor) -> CosineCost:
        """As `Cost.restricted`."""
        return CosineCost(self.x[rows], self.y[cols], check_finite=False)

    def transposed(self) -> CosineCost:
        """As `Cost.transposed`."""
        return CosineCost(self.y, self.x, check_finite=False)


class DenseCost:
    """A cost that is given as its `(n, m)` matrix.

    Raises:
        ValueError: the matrix is empty, not two-dimensional, sparse, or not finite.
    """

    def __init__(self, matrix: Tensor) -> None:
        matrix = matrix.detach()
        if matrix.ndim != 2 or matrix.numel() == 0:
            raise ValueError(f"a cost must be a non-empty (n, m) matrix; got {tuple(matrix.shape)}")
        if matrix.is_complex():
            raise ValueError(f"a cost must be real; got {matrix.dtype}")
        if matrix.layout != torch.strided:
            raise ValueError(
                f"a cost must be a dense matrix; got {matrix.layout}. Give each missing entry a large finite cost"
            )
        self.matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        # The range shows NaN and infinity, as in `finite_rows`.
        self.range = _range(self.matrix)
        if not all(map(math.isfinite, self.range)):
            raise ValueError("the cost matrix holds NaN or infinity; give forbidden pairs a large finite cost instead")

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and of columns."""
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the costs."""
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        """Where the costs are computed."""
        return self.matrix.device

    def rows(self, index: slice | Tensor, out: Tensor | None = None) -> Tensor:
        """As `Cost.rows`."""
        return self.matrix[index]

    def entries(self, rows: Tensor, cols: Tensor) -> Tensor:
        """As `Cost.entries`."""
        return self.matrix[rows, cols]

    def restricted(self, rows: slice | Tensor, cols: slice | Tensor) -> DenseCost:
        """As `Cost.restricted`."""
        return DenseCost(self.matrix[rows][:, cols])

    def transposed(self) -> DenseCost:
        """As `Cost.transposed`."""
        swapped = object.__new__(DenseCost)
        swapped.matrix, swapped.range = self.matrix.T, self.range
        return swapped


def as_cost(cost: CostLike) -> Cost:
    """The cost itself, or a matrix wrapped in `DenseCost`.

    Raises:
        TypeError: it is neither a cost nor a matrix.
        ValueError: the matrix is empty, not two-dimensional, not real or not finite.
    """
    if isinstance(cost, Tensor):
        return DenseCost(cost)
    if not hasattr(cost, "rows"):
        raise TypeError(f"a cost must be a torch.Tensor or a CosineCost; got {type(cost).__name__} (torch.as_tensor?)")
    return cost


def as_matrix_if_small(cost: Cost, entries: int | None = None) -> Cost:
    """The cost as a matrix, if it has no more than `DENSE_ENTRIES` entries; else the cost itself.

    The matrix is worth its memory to a solver that reads the cost many times.

    Args:
        cost: the cost.
        entries: a number of entries that decides in the place of the cost's own.
    """
    n, m = cost.shape
    small = (n * m if entries is None else entries) <= DENSE_ENTRIES
    return DenseCost(all_rows(cost)) if small and not isinstance(cost, DenseCost) else cost


class RememberedParts:
    """A cost that remembers its parts: each is made by `as_matrix_if_small` when it is first asked for.

    It serves a process that solves with the same few parts of a cost several times.

    Args:
        cost: the cost between all rows and columns.
    """

    def __init__(self, cost: Cost) -> None:
        self.cost = cost
        self.shape, self.dtype, self.device = cost.shape, cost.dtype, cost.device
        self._parts: dict[tuple[int, ...], Cost] = {}

    def rows(self, index: slice | Tensor, out: Tensor | None = None) -> Tensor:
        """As `Cost.rows`."""
        return self.cost.rows(index, out)

    def entries(self, rows: Tensor, cols: Tensor) -> Tensor:
        """As `Cost.entries`."""
        return self.cost.entries(rows, cols)

    def restricted(self, rows: slice | Tensor, cols: slice | Tensor) -> Cost:
        """As `Cost.restricted`."""
        if not isinstance(rows, slice) or not isinstance(cols, slice):
            return self.cost.restricted(rows, cols)
        part = (*rows.indices(self.shape[0]), *cols.indices(self.shape[1]))
        if part not in self._parts:
            self._parts[part] = as_matrix_if_small(self.cost.restricted(rows, cols))
        return self._parts[part]

    def transposed(self) -> Cost:
        """As `Cost.transposed`."""
        return self.cost.transposed()


def all_rows(cost: Cost) -> Tensor:
    """All rows of `cost`, `(n, m)`. Do not change them: they may be the cost's own memory."""
    return cost.rows(slice(0, cost.shape[0]))


def rows_per_tile(cost: Cost) -> int:
    """How many rows of `cost` may be asked for at a time."""
    if cost.device.type == "cuda":
        elements = GPU_TILE_ELEMENTS
    else:
        elements = TILE_ELEMENTS * (1 if isinstance(cost, DenseCost) else LAZY_FACTOR)
    return max(1, elements // cost.shape[1])


def tiles(cost: Cost) -> Iterator[slice]:
    """Slices that cover the rows of `cost`, none larger than a tile (but at least one row)."""
    n, step = cost.shape[0], rows_per_tile(cost)
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def workspaces(cost: Cost) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The `tiles`, each with its rows and with memory of their shape to work in.

    All tiles share the same memory. New memory for every tile can cost more time than the work itself. It would also
    make the heap grow by a tile for each small result, as that comes to lie between two tiles.
    """
    rows_memory, work = torch.empty(
        2, min(rows_per_tile(cost), cost.shape[0]), cost.shape[1], dtype=cost.dtype, device=cost.device
    )
    for tile in tiles(cost):
        size = tile.stop - tile.start
        yield tile, cost.rows(tile, rows_memory[:size]), work[:size]


def cost_range(cost: Cost) -> tuple[float, float]:
    """The least and the greatest entry of `cost`, in one pass over its tiles."""
    if isinstance(cost, DenseCost):
        return cost.range
    low, high = zip(*(torch.aminmax(rows) for _, rows, _ in workspaces(cost)), strict=True)
    return float(torch.stack(low).min()), float(torch.stack(high).max())


def _range(matrix: Tensor) -> tuple[float, float]:
    low, high = torch.stack(torch.aminmax(matrix)).tolist()
    return low, high
