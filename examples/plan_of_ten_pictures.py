"""A plan between ten pictures and their captions, four of which belong to another picture.

    python examples/plan_of_ten_pictures.py --out plan.png

It downloads nothing and takes a few seconds. The pictures are rendered. In place of CLIP's towers there are counts of
colours and of words, and two linear maps that take both into one space (`openclip_otco.audit.canonical`). The maps are
learned from 500 other pairs, of which 40 % have a wrong caption, too. docs/plan.md shows what comes out.
"""

from __future__ import annotations

import argparse
import io
import random
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from openclip_otco.audit.canonical import Moments, canonical_space
from openclip_otco.method.plan import TransportPlan
from openclip_otco.method.posterior import log_posterior, matched_share
from openclip_otco.method.solver import PlanSolver
from openclip_otco.scenes.mismatch import mismatch
from openclip_otco.scenes.pairs import make_pairs
from openclip_otco.scenes.picture import place, render

SHOWN, OTHERS, WRONG = 10, 500, 0.4
PIXELS, LEVELS = 48, 4


@dataclass(frozen=True)
class Captioned:
    """Pictures and what stands below them.

    Attributes:
        pictures: `n` of them.
        captions: one below each picture.
        owner: the picture that each caption tells of, by its number; its own number where the caption is right.
    """

    pictures: Sequence[Image.Image]
    captions: list[str]
    owner: list[int]


def captioned(count: int, wrong: float, seed: str) -> Captioned:
    """`count` rendered pictures, of which a share `wrong` has the caption of another one."""
    rng = random.Random(seed)
    pairs = make_pairs(count, seed)
    pictures = [Image.open(io.BytesIO(render(p.scene, place(p.scene, rng), PIXELS, rng))) for p in pairs]
    captions = [pair.caption for pair in pairs]
    lent = mismatch(captions, wrong, rng)
    owner = [lent.get(index, index) for index in range(count)]
    return Captioned(pictures, [captions[index] for index in owner], owner)


def colour_features(pictures: Sequence[Image.Image]) -> Tensor:
    """`(n, LEVELS³)`: the root of the share of pixels in each cell of the cube of colours."""
    shares = []
    for picture in pictures:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
        counts, _ = np.histogramdd(pixels, bins=(LEVELS,) * 3, range=((0, 256),) * 3)
        shares.append(np.sqrt(counts.ravel() / len(pixels)))
    return torch.tensor(np.stack(shares))


def word_features(captions: Sequence[str], words: Sequence[str]) -> Tensor:
    """`(n, len(words))`: 1 where the caption has the word."""
    return torch.tensor([[float(word in caption.split()) for word in words] for caption in captions]).double()


def comparable(shown: Captioned, others: Captioned) -> tuple[Tensor, Tensor]:
    """Unit-norm features of the shown pictures and captions in one space, which the others' pairs teach."""
    words = sorted({word for caption in others.captions for word in caption.split()})
    images, texts = colour_features(others.pictures), word_features(others.captions, words)
    image_mean, text_mean = images.mean(dim=0), texts.mean(dim=0)
    one_each = torch.ones(len(images), dtype=images.dtype)
    space = canonical_space(Moments.of(images - image_mean, texts - text_mean, one_each))
    return (
        space.images(colour_features(shown.pictures) - image_mean),
        space.texts(word_features(shown.captions, words) - text_mean),
    )


def masses(plan: TransportPlan) -> Tensor:
    """The plan as a matrix `(n, n)`: the mass that each picture (row) gives to each caption (column); 1 in total."""
    cost = 1 - plan.image_features @ plan.text_features.T
    return torch.exp((plan.f[:, None] + plan.g - cost) / plan.epsilon) / len(plan) ** 2


def probabilities(plan: TransportPlan) -> Tensor:
    """`(n,)`: how likely each picture and the caption below it are matched, as `--loss otco` computes it."""
    log_ratio = plan.log_mass(plan.image_features, plan.text_features)
    share = matched_share(log_ratio)
    return share * log_posterior(log_ratio, share).exp()


def table(shown: Captioned, shares: Tensor, probability: Tensor) -> list[str]:
    """What the plan says of each picture and the caption below it; `shares` are its rows, each with the sum 1."""
    told = ["picture  its caption is  mass to it  most mass to  probability"]
    for number, owner in enumerate(shown.owner):
        truth = "right" if owner == number else f"of picture {owner}"
        best = f"caption {int(shares[number].argmax())}"
        told.append(f"{number:7}  {truth:14}  {shares[number, number]:10.0%}  {best:12}  {probability[number]:11.2f}")
    return told


def heat_map(shown: Captioned, shares: Tensor) -> Figure:
    """A row for each picture, a column for each caption; own pairs are framed, wrong ones dashed."""
    figure = Figure(figsize=(10, 10), layout="constrained")
    axis = figure.add_subplot()
    axis.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    for row in range(len(shares)):
        for column in range(len(shares)):
            share = float(shares[row, column])
            if share >= 0.01:
                colour = "white" if share > 0.6 else "black"
                axis.text(column, row, f"{share:.0%}", ha="center", va="center", color=colour)
        _frame(axis, row, right=shown.owner[row] == row)
        box = OffsetImage(np.asarray(shown.pictures[row]), zoom=0.85)
        axis.add_artist(AnnotationBbox(box, (-0.95, row), frameon=False, annotation_clip=False))
    captions = [f"{number}: {textwrap.fill(text, 26)}" for number, text in enumerate(shown.captions)]
    axis.set_xticks(range(len(captions)), captions, rotation=90, fontsize=9)
    axis.set_yticks(range(len(captions)), [str(number) for number in range(len(captions))])
    axis.tick_params(axis="y", length=0, pad=52)
    axis.set_title("Share of each picture's mass that goes to each caption")
    axis.set_ylabel("picture")
    axis.set_xlabel(
        "caption; green frame: it stands below the picture, and is right; red: it stands there, and is wrong"
    )
    return figure


def _frame(axis: Axes, number: int, right: bool) -> None:
    colour, line = ("green", "-") if right else ("red", "--")
    corner = (number - 0.48, number - 0.48)
    axis.add_patch(Rectangle(corner, 0.96, 0.96, fill=False, linewidth=2.5, edgecolor=colour, linestyle=line))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A plan between ten pictures and their captions, as a picture.")
    parser.add_argument("--out", type=Path, default=Path("plan.png"), help="the picture (%(default)s)")
    parser.add_argument("--epsilon", type=float, default=0.1, help="how soft the plan is (%(default)s)")
    parser.add_argument("--seed", default="ten", help="any word; another one gives other pictures (%(default)s)")
    args = parser.parse_args(arguments)

    shown = captioned(SHOWN, WRONG, args.seed)
    images, texts = comparable(shown, captioned(OTHERS, WRONG, f"{args.seed}, the others"))
    plan = PlanSolver(epsilon=args.epsilon).solve(images, texts)
    mass = masses(plan)
    shares = mass / mass.sum(dim=1, keepdim=True)
    print(f"Each picture gives {mass.sum(dim=1).mean():.0%} of the mass, and each caption takes as much.")
    print(*table(shown, shares, probabilities(plan)), sep="\n")
    heat_map(shown, shares).savefig(args.out, dpi=80)
    print(f"The plan as a picture: {args.out}")


if __name__ == "__main__":
    main()
