"""From a window of features to a transport plan: initial plan, Sinkhorn refinement, diagnostics."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from openclip_otco.method.plan import TransportPlan
from openclip_otco.ot import CosineCost, combinatorial_plan, exact_plan, nearest_potentials, sinkhorn
from openclip_otco.ot.cost import Cost, RememberedParts, as_matrix_if_small, tiles
from openclip_otco.ot.defaults import ADDITIVE_ERROR, EPSILON
from openclip_otco.ot.divergence import plan_rows, sinkhorn_divergence
from openclip_otco.ot.group import ALONE, Group
from openclip_otco.rules import AT_LEAST_ONE, POSITIVE, SHARE_ABOVE_ZERO, one_of

INITIAL_PLANS = ("combinatorial", "emd", "previous", "none")
COUPLINGS = ("transport", "softmax")
# The drift between windows is only logged. A few hundred points of each window are enough for it, and it must take
# less time than the plan. Its ε is greater than that of plans. With the ε of plans, two windows of an unchanged model
# are nearly as far apart as two windows of a model that has changed, because no point has a near neighbour in the
# other window (benchmarks/drift.py).
_DRIFT_SUPPORT = 256
_DRIFT_EPSILON = 1.0
# Processes share the work on a plan if each gets at least this many points. The first process makes a smaller plan
# alone, for all of them.
_LEAST_PART = 8
# If the L1 marginal error of a plan stays above this, the plan is not a coupling, and its confidence means nothing.
_WORST_ERROR = 0.1


@dataclass(frozen=True)
class PlanSolver:
    """Couples image and text features (method, sections 1 and 2).

    Args:
        epsilon: entropic regularization `ε > 0`.
        initial_plan: where Sinkhorn starts. `combinatorial`: a plan whose cost is at most `δ·max(C)` too high. `emd`:
            an exact plan, by POT. With both, the potentials of the previous plan are taken instead if they are nearer
            to the solution. `previous`: these potentials alone. `none`: potentials of zero.
        additive_error: `δ` of the combinatorial plan, in `(0, 1]`.
        tolerance: L1 marginal error at which Sinkhorn stops.
        max_iterations: the largest number of Sinkhorn's iterations.
        seed: breaks the combinatorial plan's ties.
        group: the processes that make a plan together. The first one makes the initial plan, and each does its share
            of the rest. If there are fewer than eight points for each process, the first one makes the whole plan, and
            only its copy of the plan has Sinkhorn's diagnostics.
        coupling: `transport`; or `softmax`, for comparison: potentials of zero, so that no marginals are met.

    Raises:
        ValueError: a setting out of its range.
    """

    epsilon: float = EPSILON
    initial_plan: str = "combinatorial"
    additive_error: float = ADDITIVE_ERROR
    tolerance: float = 1e-3
    max_iterations: int = 2000
    seed: int = 0
    group: Group = ALONE
    coupling: str = "transport"

    def __post_init__(self) -> None:
        one_of(COUPLINGS).check(coupling=self.coupling)
        one_of(INITIAL_PLANS).check(initial_plan=self.initial_plan)
        POSITIVE.check(epsilon=self.epsilon, tolerance=self.tolerance)
        SHARE_ABOVE_ZERO.check(additive_error=self.additive_error)
        AT_LEAST_ONE.check(max_iterations=self.max_iterations)

    def solve(
        self, image_features: Tensor, text_features: Tensor, step: int = 0, previous: TransportPlan | None = None
    ) -> TransportPlan:
        """The plan of `(N, d)` unit-norm image and text features, row `i` of both being one pair.

        Args:
            image_features, text_features: detached and taken to float32.
            step: optimizer step, kept with the plan.
            previous: the last plan, for a warm start and for the drift.

        Raises:
            ValueError: features that are empty, of different shapes or not finite.
            RuntimeError: the exact plan did not finish, or Sinkhorn stopped far from its marginals.
        """
        return self.group.attempt(lambda: self._solve(image_features, text_features, step, previous))

    def _solve(
        self, image_features: Tensor, text_features: Tensor, step: int, previous: TransportPlan | None
    ) -> TransportPlan:
        started = time.perf_counter()
        with torch.no_grad(), torch.autocast(image_features.device.type, enabled=False):
            images, texts = image_features.detach().float(), text_features.detach().float()
            cost: Cost = CosineCost(images, texts)
            diagnostics: dict[str, float] = {}
            if self.coupling != "transport":
                f, g = images.new_zeros(2, len(images))
            elif len(images) >= _LEAST_PART * self.group.count:
                f, g = self._potentials(cost, texts, previous, diagnostics, self.group)
            else:
                f, g = self.group.first(
                    lambda: torch.stack(self._potentials(cost, texts, previous, diagnostics, ALONE)),
                    images.new_zeros(2, len(images)),
                )
            if previous is not None and previous.image_features.shape[1] == images.shape[1]:
                sides = ((previous.image_features, images), (previous.text_features, texts))
                image, text = self.group.first(
                    lambda: torch.stack([_drift(*side) for side in sides]), images.new_zeros(2)
                ).tolist()
                diagnostics |= {"drift_image": image, "drift_text": text}
        diagnostics["seconds"] = time.perf_counter() - started
        return TransportPlan(images, texts, f, g, self.epsilon, step, diagnostics, self.coupling == "transport")

    def _potentials(
        self,
        cost: Cost,
        texts: Tensor,
        previous: TransportPlan | None,
        diagnostics: dict[str, float],
        group: Group,
    ) -> tuple[Tensor, Tensor]:
        """`f` and `g`, `(N,)` each, of the entropic plan."""
        # A single process reads the whole cost many times. So does the first of several, if it makes an initial plan.
        whole = group.count == 1 or (group.rank == 0 and self.initial_plan in ("combinatorial", "emd"))
        if whole:
            cost = as_matrix_if_small(cost)
        if group.count > 1:
            cost = RememberedParts(cost)
        result = sinkhorn(
            cost,
            self.epsilon,
            init=self._start(cost, texts, previous, diagnostics, group),
            tol=self.tolerance,
            max_iterations=self.max_iterations,
            group=group,
        )
        if not result.marginal_error <= _WORST_ERROR:
            raise RuntimeError(
                f"Sinkhorn is still {result.marginal_error:.2g} from its marginals after {result.iterations} "
                f"iterations at epsilon={self.epsilon}; try a larger epsilon"
            )
        diagnostics |= {"iterations": result.iterations, "marginal_error": result.marginal_error}
        diagnostics |= _plan_figures(cost, result.f, result.g, self.epsilon, group)
        return result.f, result.g

    def _start(
        self,
        cost: Cost,
        texts: Tensor,
        previous: TransportPlan | None,
        diagnostics: dict[str, float],
        group: Group,
    ) -> tuple[Tensor, Tensor] | None:
        candidates = []
        if self.initial_plan in ("combinatorial", "emd"):
            initial = group.first(lambda: self._initial(cost), texts.new_zeros(len(texts) + 1))
            diagnostics["additive_error"] = float(initial[-1])
            candidates.append(initial[:-1])
        if self.initial_plan != "none" and previous is not None and previous.text_features.shape[1] == texts.shape[1]:
            mine = group.part(len(texts))
            candidates.append(group.joined(previous.text_potential(texts[mine]), len(texts)))
        if not candidates:
            return None
        nearest = nearest_potentials(cost, candidates, self.epsilon, group=group) if len(candidates) > 1 else 0
        return torch.zeros_like(candidates[nearest]), candidates[nearest]

    def _initial(self, cost: Cost) -> Tensor:
        """`(N + 1,)`: `g` of the initial plan, and as the last entry the proven bound of its additive error."""
        if self.initial_plan == "emd":
            plan = exact_plan(cost)
        else:
            plan = combinatorial_plan(cost, self.additive_error, seed=self.seed)
        return torch.cat([plan.g, plan.g.new_tensor([plan.additive_error])])


def _plan_figures(cost: Cost, f: Tensor, g: Tensor, epsilon: float, group: Group) -> dict[str, float]:
    """Objective `<σ, C>`, entropy `-Σ σ log σ` in nats, and the mass on own pairs `Σ_i σ_ii`, in `[0, 1]`."""
    n = len(f)
    a = torch.full_like(f, 1 / n)
    mine = group.part(n)
    part, f_mine = (cost, f) if group.count == 1 else (cost.restricted(mine, slice(None)), f[mine])

    own = torch.arange(n, device=f.device)[mine]
    own_mass = ((f + g)[mine] - cost.entries(own, own)).div_(epsilon).exp_().sum(dtype=torch.float64) / n**2
    objective, potentials = f.new_zeros(2, dtype=torch.float64)
    for tile in tiles(part):
        plan = plan_rows(part, tile, f_mine, g, epsilon, a[: tile.stop - tile.start], a)
        potentials += (plan @ g + plan.sum(dim=1) * f_mine[tile]).sum(dtype=torch.float64)
        objective += plan.mul_(part.rows(tile)).sum(dtype=torch.float64)
    objective, potentials, own_mass = group.total(torch.stack([objective, potentials, own_mass])).tolist()
    # log σ_ij = (f_i + g_j - C_ij)/ε - 2 log n
    entropy = 2 * math.log(n) - (potentials - objective) / epsilon
    return {"objective": objective, "entropy": entropy, "own_pair_mass": own_mass}


def _drift(before: Tensor, after: Tensor) -> Tensor:
    """Sinkhorn divergence `S_1` between evenly spaced points of two windows; 0.01 is a small drift, 1 a large one."""
    before, after = (x[:: -(-len(x) // _DRIFT_SUPPORT)] for x in (before, after))
    return sinkhorn_divergence(before, after, _DRIFT_EPSILON)
