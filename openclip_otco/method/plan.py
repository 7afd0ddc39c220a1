"""A cached transport plan: it transports features to the other side, and measures how far a pair can be trusted."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from openclip_otco.ot.cost import CosineCost
from openclip_otco.ot.sinkhorn import soft_ctransform

# The augmented coordinates below are padded to a multiple of this, which fused attention kernels ask for.
_HEAD_ALIGNMENT = 8
# A saved plan must have an ε between this and its inverse. Costs lie in [0, 2], so a smaller or greater ε would
# overflow float32.
_SMALLEST_EPSILON = 1e-6

# Of a saved plan: half precision leaves norms this near to 1.
_NORM_TOLERANCE = 0.05
# Of a saved plan: costs lie in [0, 2], and no two potentials of one side differ by more than that. A broken file may
# hold larger ones, from which sums would overflow.
_LARGEST_POTENTIAL = 100.0


class Potentials(NamedTuple):
    """Dual potentials of images and of texts, `(n,)` each, in units of the cost."""

    f: Tensor
    g: Tensor


@dataclass(frozen=True)
class TransportPlan:
    """The entropic plan between `N` image and `N` text features. It keeps features and potentials, `O(N·d)`, no matrix.

    By the c-transform, it also has a row or a column for points that it was not made of (method, section 3). Both
    marginals are uniform.

    Args:
        image_features, text_features: `(N, d)` unit-norm float32 features; row `i` of both is one pair.
        f, g: `(N,)` dual potentials, in units of the cost `1 - v·t`.
        epsilon: entropic regularization `ε`.
        step: optimizer step at which the plan was made.
        diagnostics: what the solver measured, as plain numbers.
        coupled: whether `f` and `g` couple the points. `False` is for comparison only: then both are zero, the plan
            meets no marginals, and the shares of each row and of each column are a softmax of their own.

    Example:
        ```python
        plan = PlanSolver(epsilon=0.03).solve(image_features, text_features, step=0)
        moved = plan.transport_image(v, t)      # (B, d), unit norm, among the texts
        trust = plan.confidence(v, t)           # (B,), in (0, 1)
        ```
    """

    image_features: Tensor
    text_features: Tensor
    f: Tensor
    g: Tensor
    epsilon: float
    step: int = 0
    diagnostics: Mapping[str, float] = field(default_factory=dict)
    coupled: bool = True

    def __post_init__(self) -> None:
        shape = self.image_features.shape
        if (
            len(shape) != 2
            or not shape[0]
            or self.text_features.shape != shape
            or not self.f.shape == self.g.shape == shape[:1]
        ):
            raise ValueError(
                f"a plan needs (N, d) image and text features and (N,) potentials of one N; got "
                f"{tuple(self.image_features.shape)}, {tuple(self.text_features.shape)}, "
                f"{tuple(self.f.shape)} and {tuple(self.g.shape)}"
            )

    def __len__(self) -> int:
        """`N`, the size of the support."""
        return self.f.shape[0]

    def image_potential(self, v: Tensor) -> Tensor:
        """`f(v) = -ε log 1/N Σ_j exp((g_j - C(v, t_j))/ε)`, `(B,)`, of images `v`, `(B, d)`."""
        return self._potential(v, self.text_features, self.g)

    def text_potential(self, t: Tensor) -> Tensor:
        """`g(t) = -ε log 1/N Σ_i exp((f_i - C(v_i, t))/ε)`, `(B,)`, of texts `t`, `(B, d)`."""
        return self._potential(t, self.image_features, self.f)

    def potentials(self, v: Tensor, t: Tensor) -> Potentials:
        """`f(v)` and `g(t)`, `(B,)` each. `log_mass` and `log_confidence` need nothing else of the plan's support."""
        return Potentials(self.image_potential(v), self.text_potential(t))

    def log_mass(self, v: Tensor, t: Tensor, potentials: Potentials | None = None) -> Tensor:
        """`log dσ(v, t) = (f(v) + g(t) - C(v, t))/ε`, `(B,)`: the plan's density at the pairs `(v_i, t_i)`, against
        the product of the marginals. If the plan does not couple, row and column give two values; this is their mean.

        Args:
            v, t: `(B, d)` unit-norm image and text features; row `i` of both is one pair.
            potentials: of `v` and `t`, where they are known.
        """
        row, column = self._log_masses(v, t, potentials)
        return (row + column) / 2

    def _log_masses(self, v: Tensor, t: Tensor, potentials: Potentials | None = None) -> tuple[Tensor, Tensor]:
        """Two values of `log_mass`: by the row at `v_i`, and by the column at `t_i`. A coupling makes them equal."""
        v, t = v.detach().float(), t.detach().float()
        own_cost = 1.0 - (v * t).sum(dim=1)
        f, g = potentials or self.potentials(v, t)
        return (f + self.own(g) - own_cost) / self.epsilon, (self.own(f) + g - own_cost) / self.epsilon

    def log_confidence(self, v: Tensor, t: Tensor, potentials: Potentials | None = None) -> Tensor:
        """The logarithm of `confidence`, `(B,)`; it does not underflow. Arguments are those of `log_mass`."""
        # The N support points have weight 1/N each. A further pair of weight 1/N and density m takes the share m/(m+N).
        row, column = (F.logsigmoid(mass - math.log(len(self))) for mass in self._log_masses(v, t, potentials))
        return row + column

    def confidence(self, v: Tensor, t: Tensor) -> Tensor:
        """`p(t_i | v_i) · p(v_i | t_i)`, `(B,)`, in `(0, 1)`, detached.

        `p(t_i | v_i)` is the own pair's share of the plan's row at `v_i` over {own pair} ∪ {support}, and
        `p(v_i | t_i)` that of the column at `t_i`. Hub texts have low potentials, so they do not look like good pairs
        of everything.

        Args:
            v, t: `(B, d)` unit-norm image and text features; row `i` of both is one pair.
        """
        return self.log_confidence(v, t).exp()

    def transport_image(self, v: Tensor, t: Tensor | None = None) -> Tensor:
        """Images `v` moved to the texts' side: `normalize(Σ_j softmax_j((g_j + v·t_j)/ε) t_j)`, `(B, d)`.

        Args:
            v: `(B, d)` unit-norm image features; gradients flow to them.
            t: `(B, d)` their own texts. When given, each own pair joins the support of its row (its potential comes
                from the c-transform); it counts as a constant, as the rest of the support does.
        """
        own_potential = None if t is None else self.own(self.text_potential(t))
        return self._transport(v, self.text_features, self.g, t, own_potential)

    def transport_text(self, t: Tensor, v: Tensor | None = None) -> Tensor:
        """Texts `t` moved to the images' side: `normalize(Σ_i softmax_i((f_i + v_i·t)/ε) v_i)`, `(B, d)`.

        Args:
            t: `(B, d)` unit-norm text features; gradients flow to them.
            v: `(B, d)` their own images, or `None`; as in `transport_image`.
        """
        own_potential = None if v is None else self.own(self.image_potential(v))
        return self._transport(t, self.image_features, self.f, v, own_potential)

    def to(self, device: torch.device | str) -> TransportPlan:
        """The same plan on another device."""
        names = ("image_features", "text_features", "f", "g")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def state_dict(self) -> dict[str, object]:
        """Tensors and plain types only, so that `torch.load(weights_only=True)` reads it."""
        return {
            "image_features": self.image_features,
            "text_features": self.text_features,
            "f": self.f,
            "g": self.g,
            "epsilon": self.epsilon,
            "step": self.step,
            "diagnostics": dict(self.diagnostics),
            "coupled": self.coupled,
        }

    def digest(self) -> str:
        """A hash of features and potentials. It is equal on two ranks only if their plans are equal to the bit."""
        digest = hashlib.sha256()
        for tensor in (self.image_features, self.text_features, self.f, self.g):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @classmethod
    def from_state_dict(cls, state: Mapping[str, object]) -> TransportPlan:
        """The plan that `state_dict` described.

        Raises:
            TypeError: a field is missing, unknown or of another type.
            ValueError: the fields do not fit each other, or are not finite.
        """
        tensors = [state.get(name) for name in ("image_features", "text_features", "f", "g")]
        if not all(isinstance(tensor, Tensor) and tensor.dtype == torch.float32 for tensor in tensors):
            raise TypeError("a plan's features and potentials must be float32 tensors")
        plan = cls(**state)  # type: ignore[arg-type]
        if (type(plan.epsilon), type(plan.step), type(plan.coupled)) != (float, int, bool):
            raise TypeError("a plan's epsilon must be a float, its step an int and coupled a bool")
        if not _SMALLEST_EPSILON <= plan.epsilon <= 1 / _SMALLEST_EPSILON:
            raise ValueError(f"a plan's epsilon must lie between 1e-6 and 1e6; got {plan.epsilon}")
        features, potentials = torch.cat([plan.image_features, plan.text_features]), torch.cat([plan.f, plan.g])
        if not (bool(torch.isfinite(features).all()) and bool(torch.isfinite(potentials).all())):
            raise ValueError("a plan's features and potentials must be finite")
        if not bool(((features.norm(dim=1) - 1).abs() <= _NORM_TOLERANCE).all()):
            raise ValueError("a plan's features must have unit norm")
        if not bool((potentials.abs() <= _LARGEST_POTENTIAL).all()):
            raise ValueError(f"a plan's potentials must lie within {_LARGEST_POTENTIAL:g} of 0")
        if not all(isinstance(value, int | float) for value in dict(plan.diagnostics).values()):
            raise TypeError("a plan's diagnostics must be plain numbers")
        return plan

    def own(self, potential: Tensor) -> Tensor:
        """The potential that a new point has as a member of the support, from its c-transform `potential`."""
        return potential if self.coupled else torch.zeros_like(potential)

    def _potential(self, queries: Tensor, support: Tensor, potential: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(queries.device.type, enabled=False):
            log_weight = torch.full_like(potential, -math.log(len(self)))
            # The training loop has to notice a NaN among the queries, as with ClipLoss.
            cost = CosineCost(queries.float(), support, check_finite=False)
            return soft_ctransform(cost, potential, self.epsilon, log_weight)

    def _transport(
        self, queries: Tensor, support: Tensor, potential: Tensor, own: Tensor | None, own_potential: Tensor | None
    ) -> Tensor:
        """Scaled dot-product attention, with the potentials and the own pair folded into extra coordinates.

        A query `[q, 1, s]` meets support keys `[x_j, p_j, 0]` and one more key `[0, 0, 1]`, so that the logits are
        `q·x_j + p_j` and, for the own pair, `s = q·own + p(own)`: one fused call without a bias matrix. The values
        `[x_j, 0]` and `[0, 1]` bring back the average over the support and the own pair's share.
        """
        with torch.autocast(queries.device.type, enabled=False):
            q, d = queries.float(), support.shape[1]
            width = -(-(d + 2) // _HEAD_ALIGNMENT) * _HEAD_ALIGNMENT
            own = None if own is None else own.detach().float()
            keys = support.new_zeros(len(self) + (own is not None), width)
            keys[: len(self), :d], keys[: len(self), d] = support, potential
            values = keys.clone()
            values[:, d] = 0.0
            columns = [q, q.new_ones(len(q), 1), q.new_zeros(len(q), width - d - 1)]
            if own is not None and own_potential is not None:
                keys[-1, d + 1] = values[-1, d] = 1.0
                columns[2:] = [((q * own).sum(1) + own_potential)[:, None], q.new_zeros(len(q), width - d - 2)]
            query = torch.cat(columns, dim=1)
            out = F.scaled_dot_product_attention(
                query[None, None], keys[None, None], values[None, None], scale=1.0 / self.epsilon
            )[0, 0]
            mean = out[:, :d] if own is None else out[:, :d] + out[:, d : d + 1] * own
            return F.normalize(mean, dim=1)
