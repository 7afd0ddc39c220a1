"""Ground costs: what it takes to move image `i` onto text `j`, asked for tile by tile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

# Elements of a tile: 16 MiB of float32, small enough to stay near the cache and large enough to keep a GPU busy.
TILE_ELEMENTS = 2**22


class Cost(Protocol):
    """An `(n, m)` cost that need not exist as a matrix."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def rows(self, index: slice | Tensor) -> Tensor:
        """The rows `index` of the matrix, `(len(index), m)`; a fresh tensor that the caller may overwrite."""
        ...

    def transposed(self) -> Cost:
        """The same cost with rows and columns exchanged."""
        ...


CostLike: TypeAlias = "Cost | Tensor"


class CosineCost:
    """`C_ij = 1 - x_i · y_j`, in `[0, 2]`; only the features are kept.

    Args:
        x: `(n, d)` unit-norm features. Half precision is taken up to float32.
        y: `(m, d)` unit-norm features, on the same device.
        check_finite: look for NaN and infinity; costs a pass, and on a GPU a wait for it.

    Raises:
        ValueError: the features are empty, not two-dimensional, of different width, or not finite.
    """

    def __init__(self, x: Tensor, y: Tensor, check_finite: bool = True) -> None:
        if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or 0 in (*x.shape, *y.shape):
            raise ValueError(
                f"features must be non-empty (n, d) and (m, d) matrices of one width d; "
                f"got {tuple(x.shape)} and {tuple(y.shape)}"
            )
        dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        self.x, self.y = x.detach().to(dtype), y.detach().to(dtype)
        for name, features in (("x", self.x), ("y", self.y)):
            if check_finite and not bool(torch.isfinite(features).all()):
                raise ValueError(f"features {name} hold NaN or infinity; drop those rows before coupling")

    @property
    def shape(self) -> tuple[int, int]:
        return self.x.shape[0], self.y.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        return self.x.device

    def rows(self, index: slice | Tensor) -> Tensor:
        return torch.mm(self.x[index], self.y.T).neg_().add_(1.0)

    def transposed(self) -> CosineCost:
        swapped = object.__new__(CosineCost)
        swapped.x, swapped.y = self.y, self.x
        return swapped


class DenseCost:
    """A cost that is given as its `(n, m)` matrix.

    Raises:
        ValueError: the matrix is empty, not two-dimensional, or not finite.
    """

    def __init__(self, matrix: Tensor) -> None:
        if matrix.ndim != 2 or matrix.numel() == 0:
            raise ValueError(f"a cost must be a non-empty (n, m) matrix; got {tuple(matrix.shape)}")
        self.matrix = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
        if not bool(torch.isfinite(self.matrix).all()):
            raise ValueError("the cost matrix holds NaN or infinity; give forbidden pairs a large finite cost instead")

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    def rows(self, index: slice | Tensor) -> Tensor:
        return self.matrix[index].clone()

    def transposed(self) -> DenseCost:
        swapped = object.__new__(DenseCost)
        swapped.matrix = self.matrix.T
        return swapped


def as_cost(cost: CostLike) -> Cost:
    """A `Cost` as it is; a matrix wrapped in `DenseCost`."""
    return DenseCost(cost) if isinstance(cost, Tensor) else cost


def rows_per_tile(cost: Cost) -> int:
    """How many rows of `cost` may be asked for at a time."""
    return max(1, TILE_ELEMENTS // cost.shape[1])


def tiles(cost: Cost) -> Iterator[slice]:
    """Slices that cover the rows of `cost`, none with more than `TILE_ELEMENTS` entries (but at least one row)."""
    n, step = cost.shape[0], rows_per_tile(cost)
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def cost_range(cost: Cost) -> tuple[float, float]:
    """The least and the greatest entry of `cost`, in one streamed pass."""
    low, high = zip(*(torch.aminmax(cost.rows(tile)) for tile in tiles(cost)), strict=True)
    return float(torch.stack(low).min()), float(torch.stack(high).max())
