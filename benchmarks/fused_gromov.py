"""Does fused Gromov-Wasserstein transport make a better plan? What such a plan knows of wrong pairs, beside the plan.

`python benchmarks/fused_gromov.py CHECKPOINT SHARDS LIST.csv FILE.jsonl`: the arguments of `evidence.py`. A file
is of one checkpoint; docs/results/fused-gromov.jsonl is two of them, one after the other.

The fused plan couples a window by the distance of image and text, as the plan does, and also so that images which lie
near each other go to texts which lie near each other (Vayer, Chapel, Flamary, Tavenard, Courty, *Optimal transport for
structured data with application on graphs*, ICML 2019; with entropy Peyré, Cuturi, Solomon, *Gromov-Wasserstein
averaging of kernel and distance matrices*, ICML 2016). With the structures `K` of the images and `L` of the texts it
minimizes

    Σ_ij σ_ij C_ij + λ Σ_ijkl σ_ij σ_kl (K_ik - L_jl)² - ε H(σ).

`K` and `L` are `exp(k cos)` of the frozen towers' features, centred and divided by their standard deviation. The frozen
towers are unimodal and saw no training, so that they are evidence of their own. A solution σ is the entropic plan of
the costs `C_ij + 2 λ Σ_kl σ_kl (K_ik - L_jl)²`. The costs of a pair outside the window follow from its similarities to
the window, and its density follows from the c-transforms, as for the plan. POT makes at most 100 steps of at most 100
Sinkhorn iterations, so that a plan with a large λ need not have converged.

A window holds one caption of each of its pictures, and the pairs that are asked about are of other pictures. A line of
the output is a mean over windows, for one `k` (`sharpness`) and one λ (`strength`); at λ = 0 the fused plan is the
plan:

- `inside`, `outside`: AUROC of wrong pairs by the density, of the window's own pairs and of others;
- `witness`: AUROC outside by the second witness of `evidence.py` (`k` = 5); `density_and_witness`: by the sum of it and
  the plan's density;
- `rematched` of `rematchable`: among wrongly captioned images of the window whose own caption is there, the share for
  which it is the plan's first choice among other pairs' captions;
- `steps`: Sinkhorn problems that POT solved for the fused plan, `slower`: its time by that of the package's plan.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import ot
import torch
import torch.nn.functional as F
from evidence import WEIGHT, Pairs, parser_of, read_run, standardized, witness
from scipy.special import logsumexp

from openclip_otco.audit.score import auroc
from openclip_otco.files import write_text
from openclip_otco.method.solver import PlanSolver

WITNESS_SHARPNESS = 5.0
SHARPNESS = (1.0, 5.0)
STRENGTHS = (0.0, 0.01, 0.03, 0.1, 0.3)
Matrix = np.ndarray[Any, np.dtype[np.float64]]


class Structure:
    """Similarities within one tower, to the points of a window, on the scale of the window's own."""

    def __init__(self, window: torch.Tensor, sharpness: float) -> None:
        self.window, self.sharpness = window.double(), sharpness
        kernel = self._kernel(self.window)
        self.means, self.mean = kernel.mean(1), kernel.mean()
        self.spread = self._centred(kernel).std()

    def __call__(self, points: torch.Tensor) -> Matrix:
        """`(n, N)`."""
        return (self._centred(self._kernel(points.double())) / self.spread).numpy()

    def _kernel(self, points: torch.Tensor) -> torch.Tensor:
        return (self.sharpness * F.normalize(points, dim=1) @ F.normalize(self.window, dim=1).T).exp()

    def _centred(self, kernel: torch.Tensor) -> torch.Tensor:
        return kernel - kernel.mean(1, keepdim=True) - self.means + self.mean


class FusedPlan:
    """The fused plan of a window, and its density at any pair.

    Args:
        costs: `(N, N)` of the window's images and texts.
        images, texts: their structures, `(N, N)` each.
        strength: λ. epsilon: ε.
    """

    def __init__(self, costs: Matrix, images: Matrix, texts: Matrix, strength: float, epsilon: float) -> None:
        self.images, self.texts, self.epsilon, self.weight = images, texts, epsilon, 2 * strength
        uniform = np.full(len(costs), 1 / len(costs))
        self.plan, log = ot.gromov.entropic_fused_gromov_wasserstein(
            # POT has (1 - α) C and α times the structure: all costs, and so ε, are divided by 1 + λ.
            costs, images, texts, uniform, uniform, "square_loss", epsilon / (1 + strength), symmetric=True,
            alpha=strength / (1 + strength), max_iter=100, tol=1e-6, warmstart=True, log=True,
            numItermax=100, stopThr=1e-5,
        )  # fmt: skip
        # POT looks at the error in the first step and in every tenth one after it.
        self.steps = 10 * len(log["err"]) - 9
        self.costs = costs + self.weight * structure_costs(images, texts, self.plan)
        # In logarithms: the structure can make the range of the costs too large for a kernel.
        _, log = ot.sinkhorn(
            uniform, uniform, self.costs, epsilon, method="sinkhorn_log", numItermax=300, stopThr=1e-4, log=True
        )
        shift = epsilon * np.log(len(costs))
        self.f, self.g = epsilon * log["log_u"] + shift, epsilon * log["log_v"] + shift

    def log_density(self) -> Matrix:
        """Of the window's images and texts, against the product of the marginals, `(N, N)`."""
        return (self.f[:, None] + self.g - self.costs) / self.epsilon

    def log_mass(self, to_texts: Matrix, to_images: Matrix, own: Matrix, images: Matrix, texts: Matrix) -> Matrix:
        """The log density at `n` pairs, `(n,)`.

        Args:
            to_texts, to_images: costs of the pairs' images to the window's texts, and of their texts to its images,
                `(n, N)` each.
            own: `(n,)` costs of image and text of each pair.
            images, texts: structures of the pairs, `(n, N)` each.
        """
        to_texts = to_texts + self.weight * structure_costs(images, self.texts, self.plan)
        to_images = to_images + self.weight * structure_costs(self.images, texts, self.plan).T
        squares = images**2 @ self.plan.sum(1) + texts**2 @ self.plan.sum(0)
        own = own + self.weight * (squares - 2 * ((images @ self.plan) * texts).sum(1))
        return (self._transformed(to_texts, self.g) + self._transformed(to_images, self.f) - own) / self.epsilon

    def _transformed(self, costs: Matrix, other: Matrix) -> Matrix:
        """Potentials `(n,)` by c-transform of the other side's."""
        return -self.epsilon * (logsumexp((other - costs) / self.epsilon, axis=1) - np.log(len(other)))


def structure_costs(images: Matrix, texts: Matrix, plan: Matrix) -> Matrix:
    """`Σ_kl σ_kl (K_ik - L_jl)²` of `n` images and `m` texts, `(n, m)`, from their structures `(n, N)`, `(m, N)`."""
    squares = (images**2 @ plan.sum(1))[:, None] + texts**2 @ plan.sum(0)
    return squares - 2 * images @ plan @ texts.T


def ask(pairs: Pairs, size: int, epsilon: float, seed: int) -> Iterator[dict[str, float]]:
    """A line for each `k` and λ."""
    order = torch.randperm(len(pairs.image), generator=torch.Generator().manual_seed(seed))
    # One caption of each picture, the first in this order.
    _, first = np.unique(pairs.image[order].numpy(), return_index=True)
    order = order[torch.from_numpy(np.sort(first))]
    window, asked = order[:size], order[size:]
    v, t = pairs.images.double(), pairs.texts.double()
    costs = (1 - v[window] @ t[window].T).numpy()
    to_texts, to_images = (1 - v[asked] @ t[window].T).numpy(), (1 - t[asked] @ v[window].T).numpy()
    own = (1 - (v[asked] * t[asked]).sum(1)).numpy()
    wrong = pairs.wrong.tolist()
    wrong_inside, wrong_outside = ([wrong[i] for i in part.tolist()] for part in (window, asked))
    matched = (pairs.image[window][:, None] == pairs.caption[window]).numpy()
    rematchable = np.array(wrong_inside) & matched.any(1)

    begin = time.perf_counter()
    alone = PlanSolver(epsilon=epsilon).solve(pairs.images[window], pairs.texts[window])
    seconds_alone = time.perf_counter() - begin
    second = witness(pairs, window, asked, WITNESS_SHARPNESS)
    both = standardized(alone.log_mass(pairs.images[asked], pairs.texts[asked])) + WEIGHT * standardized(second)
    for sharpness, strength in itertools.product(SHARPNESS, STRENGTHS):
        image, text = (Structure(side[window], sharpness) for side in (pairs.image_towers, pairs.text_towers))
        inside = image(pairs.image_towers[window]), text(pairs.text_towers[window])
        outside = image(pairs.image_towers[asked]), text(pairs.text_towers[asked])
        begin = time.perf_counter()
        fused = FusedPlan(costs, *inside, strength, epsilon)
        seconds = time.perf_counter() - begin
        density = fused.log_density()
        choice = np.where(np.eye(size, dtype=bool), -np.inf, density).argmax(1)
        yield {
            "sharpness": sharpness,
            "strength": strength,
            "inside": auroc(np.diag(density).tolist(), wrong_inside),
            "outside": auroc(fused.log_mass(to_texts, to_images, own, *outside).tolist(), wrong_outside),
            "witness": auroc(second.tolist(), wrong_outside),
            "density_and_witness": auroc(both.tolist(), wrong_outside),
            "rematched": float(matched[np.arange(size), choice][rematchable].mean()),
            "rematchable": int(rematchable.sum()),
            "steps": fused.steps,
            "slower": seconds / seconds_alone,
        }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--window", type=int, default=1024)
    args = parser.parse_args()
    pairs, epsilon = read_run(args)
    of = {"run": args.checkpoint.parent.parent.name, "checkpoint": args.checkpoint.name, "window": args.window}
    windows = [list(ask(pairs, args.window, epsilon, seed)) for seed in range(args.seeds)]
    lines = []
    for answers in zip(*windows, strict=True):
        means = {name: round(sum(answer[name] for answer in answers) / len(answers), 4) for name in answers[0]}
        lines.append(of | {"epsilon": epsilon, "seeds": args.seeds} | means)
        print(json.dumps(lines[-1]))
    write_text(args.json, "".join(f"{json.dumps(line)}\n" for line in lines))


if __name__ == "__main__":
    main()
