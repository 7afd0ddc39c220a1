"""What a plan knows of the pairs of a frozen Flickr8k run: wrong pairs, false negatives, and whose a caption is.

`python benchmarks/evidence.py CHECKPOINT SHARDS LIST.csv FILE.json`: a checkpoint of `flickr8k-frozen`, the training
shards of its run, and the list of mismatched images that they were made by (`key,caption_key`). Features of the towers
come from the tables of `--frozen-features`. Windows of random pairs are coupled as in training, and answer three
questions:

- trust: AUROC of wrong against right pairs that are not in the window, by the plan's density, by the cosine, by a
  second witness that never saw the training, and by the sum of density and witness. The witness is the correlation of
  `exp(k cos)` of the image with the window's images and of the caption with the window's captions, in the features of
  the frozen towers (after Gromov-Wasserstein: Peyré, Cuturi, Solomon, *Gromov-Wasserstein averaging of kernel and
  distance matrices*, ICML 2016).
- false negatives: AUROC of the density at captions of the same picture, which count as negatives, against all others.
- rematching: among wrongly captioned images whose own caption is in the window, the share for which the plan's row has
  most of its mass there; the same for the product of two softmaxes, which has no marginals.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tower_features import model_features, tower_features

from openclip_otco.audit.score import auroc
from openclip_otco.files import write_text
from openclip_otco.method.solver import PlanSolver
from openclip_otco.models.folder import home
from openclip_otco.runs import checkpoint

SHARPNESS = (5.0, 10.0)
# Standard deviations of the witness to one of the density, in their sum.
WEIGHT = 0.5


class Pairs:
    """All pairs of the shards: joint and unimodal features, the image of each, and the image that its caption is of."""

    def __init__(self, path: Path, shards: str, mismatched: dict[str, str], frozen: Path) -> None:
        encoder = checkpoint.load(path, device="cpu")
        towers = tower_features(encoder, frozen, shards)
        self.images = model_features(encoder, "image", towers.images)
        self.texts = model_features(encoder, "text", towers.texts)
        self.image_towers, self.text_towers = (
            F.normalize(side - side.mean(0), dim=1) for side in (towers.images, towers.texts)
        )
        # A sample is named by its image and the number of its caption.
        keys = [name.rpartition("-")[0] for name in towers.names]
        numbers = {key: number for number, key in enumerate(sorted(set(keys)))}
        self.image = torch.tensor([numbers[key] for key in keys])
        self.caption = torch.tensor([numbers[mismatched.get(key, key)] for key in keys])

    @property
    def wrong(self) -> Tensor:
        return self.image != self.caption


def witness(pairs: Pairs, window: Tensor, asked: Tensor, sharpness: float) -> Tensor:
    """Correlation of the two rows of similarities to the window, `(asked,)`, without the pair's own image."""
    rows = []
    for part in asked.split(1024):
        by_image = (sharpness * pairs.image_towers[part] @ pairs.image_towers[window].T).exp()
        by_text = (sharpness * pairs.text_towers[part] @ pairs.text_towers[window].T).exp()
        other = (pairs.image[part][:, None] != pairs.image[window]).float()
        by_image, by_text = (
            other * (row - (other * row).sum(1, keepdim=True) / other.sum(1, keepdim=True))
            for row in (by_image, by_text)
        )
        rows.append(F.cosine_similarity(by_image, by_text, dim=1))
    return torch.cat(rows)


def standardized(x: Tensor) -> Tensor:
    return (x - x.mean()) / x.std()


def ask(pairs: Pairs, size: int, epsilon: float, seed: int) -> dict[str, float]:
    order = torch.randperm(len(pairs.image), generator=torch.Generator().manual_seed(seed))
    window, asked = order[:size], order[size:]
    plan = PlanSolver(epsilon=epsilon).solve(pairs.images[window], pairs.texts[window])
    v, t = pairs.images[asked], pairs.texts[asked]
    potentials = plan.potentials(v, t)
    density, wrong = plan.log_mass(v, t, potentials), pairs.wrong[asked].tolist()
    found = {"density": auroc(density.tolist(), wrong), "cosine": auroc((v * t).sum(1).tolist(), wrong)}
    for sharpness in SHARPNESS:
        second = witness(pairs, window, asked, sharpness)
        both = standardized(density) + WEIGHT * standardized(second)
        found[f"witness_{sharpness:g}"] = auroc(second.tolist(), wrong)
        found[f"density_and_witness_{sharpness:g}"] = auroc(both.tolist(), wrong)

    # Captions of the same picture among random negatives.
    some = torch.arange(min(2048, len(asked)))
    negatives = (potentials.f[some, None] + potentials.g[some] - 1 + v[some] @ t[some].T) / epsilon
    same = pairs.image[asked][some][:, None] == pairs.caption[asked][some]
    off = ~torch.eye(len(some), dtype=torch.bool)
    found["false_negatives"] = auroc(negatives[off].numpy(), (~same[off]).numpy())
    found |= rematching(pairs, window, plan.f, plan.g, epsilon)
    return found


def rematching(pairs: Pairs, window: Tensor, f: Tensor, g: Tensor, epsilon: float) -> dict[str, float]:
    similarity = pairs.images[window] @ pairs.texts[window].T
    own = pairs.image[window][:, None] == pairs.caption[window]
    wanted = pairs.wrong[window] & own.any(dim=1)
    itself = torch.eye(len(window), dtype=torch.bool)
    shares = {
        "plan": (f[:, None] + g - 1 + similarity) / epsilon,
        "softmaxes": (similarity / epsilon).log_softmax(1) + (similarity / epsilon).log_softmax(0),
    }
    found: dict[str, float] = {"rematchable": int(wanted.sum())}
    for name, share in shares.items():
        first = share.masked_fill(itself, -torch.inf)[wanted].argmax(dim=1, keepdim=True)
        found[f"rematched_by_{name}"] = float(own[wanted].gather(1, first).float().mean())
    return found


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """The arguments that name a run's pairs, a file for the answers, and how many windows are asked."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("shards")
    parser.add_argument("list", type=Path)
    parser.add_argument("json", type=Path)
    parser.add_argument("--frozen-features", type=Path, default=home() / "features")
    parser.add_argument("--seeds", type=int, default=3)
    return parser


def read_run(args: argparse.Namespace) -> tuple[Pairs, float]:
    """The pairs of the run that `parser_of`'s arguments name, and its ε."""
    with args.list.open(newline="", encoding="utf-8") as stream:
        mismatched = {row["key"]: row["caption_key"] for row in csv.DictReader(stream)}
    pairs = Pairs(args.checkpoint, args.shards, mismatched, args.frozen_features)
    return pairs, float(checkpoint.params(args.checkpoint).get("otco_epsilon") or PlanSolver.epsilon)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--windows", type=int, nargs="+", default=[1024, 4096])
    args = parser.parse_args()
    pairs, epsilon = read_run(args)
    found = []
    for size in args.windows:
        runs = [ask(pairs, size, epsilon, seed) for seed in range(args.seeds)]
        means = {name: round(sum(run[name] for run in runs) / len(runs), 4) for name in runs[0]}
        found.append(
            {
                "run": args.checkpoint.parent.parent.name,
                "window": size,
                "epsilon": epsilon,
                "seeds": args.seeds,
                **means,
            }
        )
        print(json.dumps(found[-1]))
    write_text(args.json, "".join(f"{json.dumps(line)}\n" for line in found))


if __name__ == "__main__":
    main()
