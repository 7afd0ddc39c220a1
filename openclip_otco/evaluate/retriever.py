"""Plan-calibrated retrieval: the potentials of a plan over training features are added to the similarities.

In high dimensions a few points, the hubs, are near to everything, and are found for queries that are not theirs (Dinu,
Lazaridou and Baroni, *Improving zero-shot learning by mitigating the hubness problem*, ICLR workshop 2015). Remedies
weigh a candidate by how near it is to a bank of other queries: inverted softmax (Smith et al., ICLR 2017), querybank
normalisation (Bogolin et al., CVPR 2022). A potential of the entropic plan (method, section 3) does so as well:
`g(t) = -ε log 1/N Σ_i exp((f_i - C(v_i, t))/ε)` is low for a text that is near to many training images `v_i`. Images
that few training texts are near to count more. With all `f_i = 0` it is the inverted softmax at temperature `ε`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from openclip_otco.method.plan import TransportPlan
from openclip_otco.method.solver import PlanSolver
from openclip_otco.ot.cost import full_precision
from openclip_otco.rules import AT_LEAST_ONE, one_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

WAYS = ("image_to_text", "text_to_image")
# Chosen on Flickr8k (docs/calibrate.md).
EPSILON = 0.1
# The largest support whose cost is kept as a matrix.
MAX_SUPPORT = 8192

# Entries of a tile of scores: 64 MiB in float32.
_TILE = 2**24
# Rows of the gallery in a tile, at most.
_GALLERY_TILE = 2**14
# In half precision unit vectors have norms that differ from one by a percent.
_NORM_ERROR = 0.02

Array = TypeVar("Array", Tensor, "NDArray")


class Hits(NamedTuple, Generic[Array]):
    """What a search found. Row `i` of both arrays, `(n, k)`, is about query `i`; its best candidate comes first."""

    indices: Array
    """Rows of the gallery, int64."""
    scores: Array
    """Calibrated similarities. They order the candidates of one query; their absolute value has no meaning."""


class CalibratedRetriever:
    """Search by `s(v, t) + g(t)` for the texts of images, by `s(v, t) + f(v)` for the images of texts.

    `s` is the cosine; `g` and `f` are the potentials that a plan gives to the candidates, in the same units. The plan
    is one of *training* features. If it were made from the queries, the answer to one query would depend on the others,
    and a test set would reveal its own pairs. The potentials of several plans are averaged, which reduces their noise.

    Queries and gallery are `(n, d)` and `(m, d)` unit-norm features of the model that gave the training features. Both
    are numpy or both are torch, of any floating type; half precision becomes float32. The search runs on the device of
    the plans, a tile at a time. Beyond potentials and results it needs `O(tile)` memory for a gallery of any size, and
    the gallery may be a `numpy.memmap`.

    Args:
        plans: one plan or several, of one width and on one device.

    Raises:
        ValueError: no plan, one without potentials (`coupled=False`), or plans of different widths or devices.

    Examples:
        >>> import torch
        >>> from openclip_otco import CalibratedRetriever
        >>> train_images, train_texts, images, texts = (
        ...     torch.nn.functional.normalize(torch.randn(n, 16), dim=1) for n in (256, 256, 3, 1000))
        >>> retriever = CalibratedRetriever.from_features(train_images, train_texts)
        >>> hits = retriever.search(images, texts, k=5)
        >>> tuple(hits.indices.shape), tuple(hits.scores.shape)
        ((3, 5), (3, 5))
        >>> potentials = retriever.potentials(texts)  # once for a gallery that is searched again and again
        >>> again = retriever.search(images, texts, k=5, potentials=potentials)
        >>> torch.equal(again.indices, hits.indices)
        True
        >>> tuple(retriever.search(texts, images, k=2, way="text_to_image").indices.shape)
        (1000, 2)
    """

    def __init__(self, plans: TransportPlan | Sequence[TransportPlan]) -> None:
        self.plans = (plans,) if isinstance(plans, TransportPlan) else tuple(plans)
        if not self.plans:
            raise ValueError("calibration needs a plan")
        if not all(plan.coupled for plan in self.plans):
            raise ValueError("calibration needs potentials, which a plan of the coupling `softmax` does not have")
        places = {(plan.image_features.shape[1], plan.image_features.device) for plan in self.plans}
        if len(places) > 1:
            raise ValueError(f"plans must have one width and one device; got {sorted(map(str, places))}")

    @classmethod
    def from_features(
        cls,
        image_features: Array,
        text_features: Array,
        epsilon: float = EPSILON,
        max_support: int = MAX_SUPPORT,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> CalibratedRetriever:
        """A retriever with one plan of training features.

        Args:
            image_features, text_features: `(N, d)` unit-norm features, row `i` of both one pair; numpy or torch.
            epsilon: `ε > 0`, in units of the cosine. With a small one the potentials follow single training points;
                with a large one they only subtract a candidate's mean similarity.
            max_support: couple so many pairs at most, a seeded subsample where there are more. Above 8,192 no matrix
                is kept, and the solver is slower.
            seed: of the subsample.
            device: where to solve and search; that of the features if they are tensors, else the CPU.

        Raises:
            TypeError: the features are neither numpy arrays nor tensors, or not floating.
            ValueError: the features are empty, of different shapes, not of unit norm or not finite; or a setting is out
                of its range.
            RuntimeError: Sinkhorn stopped far from its marginals, as with a very small `ε`.
        """
        if _shape(image_features, "image_features") != _shape(text_features, "text_features"):
            raise ValueError(
                f"image_features and text_features must be pairs, (N, d) each; got {tuple(image_features.shape)} "
                f"and {tuple(text_features.shape)}"
            )
        AT_LEAST_ONE.check(max_support=max_support)
        if device is None:
            device = image_features.device if isinstance(image_features, Tensor) else "cpu"
        chosen: Tensor | slice = slice(None)
        if len(image_features) > max_support:
            generator = torch.Generator().manual_seed(seed)
            chosen = torch.randperm(len(image_features), generator=generator)[:max_support].sort().values
        images = _rows(image_features, chosen, torch.device(device), "image_features").float()
        texts = _rows(text_features, chosen, torch.device(device), "text_features").float()
        return cls(PlanSolver(epsilon=epsilon).solve(images, texts))

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Path | str, epsilon: float | None = EPSILON, device: torch.device | str = "cpu"
    ) -> CalibratedRetriever:
        """A retriever with the plans that `--loss otco` cached in a checkpoint of OpenCLIP's training script.

        Args:
            checkpoint: the file, as `runs/NAME/checkpoints/epoch_N.pt`.
            epsilon: plans with another `ε` are made anew from their features; with `None` all plans stay as they are.
                Plans that measure trust have another one.
            device: where to search.

        Raises:
            ValueError: the file cannot be read, or holds no plans with potentials.
        """
        from openclip_otco.runs.checkpoint import cached_plans

        plans = [plan.to(device) for plan in cached_plans(Path(checkpoint))]
        if not plans:
            raise ValueError(
                f"{checkpoint}: holds no cached plans; it was not trained with --loss otco, or not for long enough"
            )
        return cls([recoupled(plan, epsilon) for plan in plans])

    @property
    def device(self) -> torch.device:
        """The device of the plans, where the search runs."""
        return self.plans[0].f.device

    def to(self, device: torch.device | str) -> CalibratedRetriever:
        """The same retriever on another device."""
        return CalibratedRetriever([plan.to(device) for plan in self.plans])

    @full_precision
    def potentials(self, gallery: Array, way: str = "image_to_text") -> Array:
        """`(m,)` float32, what is added to each candidate's similarity, in units of the cosine.

        As `s + g = [q, 1] · [x, g]`, an index for inner products can hold the gallery with one more coordinate.

        Args:
            gallery: `(m, d)` features of texts for `image_to_text`, of images for `text_to_image`.
            way: `image_to_text` or `text_to_image`.

        Raises:
            TypeError, ValueError: as `search` does.
        """
        self._check(gallery, way, "gallery")
        parts = [
            self._potentials(_rows(gallery, tile, self.device, "gallery"), way)
            for tile in _slices(len(gallery), _GALLERY_TILE)
        ]
        return _as_given(torch.cat(parts), gallery)

    @full_precision
    def search(
        self,
        queries: Array,
        gallery: Array,
        k: int = 10,
        way: str = "image_to_text",
        potentials: Array | None = None,
    ) -> Hits[Array]:
        """The `k` best candidates of each query, the best first. The order of candidates with equal scores is open.

        Args:
            queries: `(n, d)` features of images for `image_to_text`, of texts for `text_to_image`.
            gallery: `(m, d)` features of the other side.
            k: `1 <= k <= m`.
            way: `image_to_text` or `text_to_image`.
            potentials: `(m,)`, the result of `potentials` for this gallery and way; computed if `None`.

        Returns:
            Indices and scores, `(n, k)` each, numpy or torch as the queries are, and on their device.

        Raises:
            TypeError: the arrays are of two kinds, neither numpy nor torch, or not floating.
            ValueError: wrong shapes or width, `k` greater than the gallery, an unknown way, or features that are not
                finite or not of unit norm.
        """
        self._check(queries, way, "queries")
        self._check(gallery, way, "gallery")
        if isinstance(queries, Tensor) != isinstance(gallery, Tensor):
            raise TypeError(
                f"queries and gallery must be of one kind; got {type(queries).__name__} and {type(gallery).__name__}"
            )
        m = len(gallery)
        if not 1 <= k <= m:
            raise ValueError(f"k must lie in 1 to {m}, the size of the gallery; got {k}")
        if potentials is None:
            potentials = self.potentials(gallery, way)
        elif tuple(potentials.shape) != (m,):
            raise ValueError(f"potentials must be ({m},), one for each row of the gallery; got {potentials.shape}")
        candidate_potentials = torch.as_tensor(potentials, device=self.device)
        columns = min(m, _GALLERY_TILE)
        found = [
            self._best(_rows(queries, tile, self.device, "queries"), gallery, candidate_potentials, k)
            for tile in _slices(len(queries), max(1, _TILE // (columns + k)))
        ]
        scores, indices = (torch.cat(parts) for parts in zip(*found, strict=True))
        return Hits(_as_given(indices, queries), _as_given(scores, queries))

    def _best(self, queries: Tensor, gallery: Array, potentials: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Scores and indices, `(n, k)` each. Each tile's best candidates compete with the best ones so far."""
        best = queries.new_empty(len(queries), 0)
        indices = torch.empty(len(queries), 0, dtype=torch.int64, device=self.device)
        for tile in _slices(len(gallery), _GALLERY_TILE):
            candidates = _rows(gallery, tile, self.device, "gallery")
            dtype = torch.promote_types(queries.dtype, candidates.dtype)
            scores = queries.to(dtype) @ candidates.to(dtype).T + potentials[tile]
            top, column = scores.topk(min(k, scores.shape[1]), dim=1)
            both = torch.cat([best, top], dim=1)
            best, place = both.topk(min(k, both.shape[1]), dim=1)
            indices = torch.cat([indices, column + tile.start], dim=1).gather(1, place)
        return best, indices

    def _potentials(self, candidates: Tensor, way: str) -> Tensor:
        if way == "image_to_text":
            found = [plan.text_potential(candidates) for plan in self.plans]
        else:
            found = [plan.image_potential(candidates) for plan in self.plans]
        return torch.stack(found).mean(dim=0)

    def _check(self, features: Array, way: str, name: str) -> None:
        one_of(WAYS).check(way=way)
        width = self.plans[0].image_features.shape[1]
        if _shape(features, name)[1] != width:
            raise ValueError(f"{name} must be {width} wide, as the plan's features are; got {tuple(features.shape)}")


def recoupled(plan: TransportPlan, epsilon: float | None) -> TransportPlan:
    """`plan` itself if it has this `ε`, or if `epsilon` is `None`; else a plan of its features with this `ε`.

    Raises:
        ValueError, RuntimeError: as `PlanSolver` does.
    """
    # A plan that was not coupled stays as it is, and the retriever refuses it.
    if epsilon is None or epsilon == plan.epsilon or not plan.coupled:
        return plan
    return PlanSolver(epsilon=epsilon).solve(plan.image_features, plan.text_features, plan.step)


def _shape(features: Array, name: str) -> tuple[int, int]:
    if not isinstance(features, Tensor | np.ndarray):
        raise TypeError(f"{name} must be a numpy array or a torch tensor; got {type(features).__name__}")
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"{name} must be a non-empty (n, d) matrix; got {tuple(features.shape)}")
    return features.shape[0], features.shape[1]


def _rows(features: Array, index: slice | Tensor, device: torch.device, name: str) -> Tensor:
    """Some rows of checked features, on `device`, in float32 or wider."""
    if isinstance(features, Tensor):
        rows = features.detach()[index if isinstance(index, slice) else index.to(features.device)]
    else:
        # A copy, as torch wants memory that it can write to, and a memory map may be read-only.
        rows = torch.from_numpy(np.array(features[index if isinstance(index, slice) else index.numpy()]))
    if not rows.is_floating_point():
        raise TypeError(f"{name} must be floating; got {features.dtype}")
    rows = rows.to(device).to(torch.promote_types(rows.dtype, torch.float32))
    norms = torch.linalg.vector_norm(rows, dim=1)
    # NaN and infinity fail this as well.
    if not bool(((norms - 1).abs() <= _NORM_ERROR).all()):
        raise ValueError(f"{name} must be finite and of unit norm; got norms of {norms.min():.3g} to {norms.max():.3g}")
    return rows


def _as_given(result: Tensor, given: Array) -> Array:
    """`result` as a numpy array or a tensor, whichever `given` is, and on its device."""
    return result.to(given.device) if isinstance(given, Tensor) else result.cpu().numpy()


def _slices(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))
