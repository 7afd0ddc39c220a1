"""Pairs: the scenes and captions of one split, with families of near misses spread over it."""

import random
from collections.abc import Collection
from dataclasses import dataclass

from openclip_otco.scenes.caption import describe
from openclip_otco.scenes.near_miss import near_miss
from openclip_otco.scenes.scene import Scene, draw_scene

# How many near misses a family has besides its base scene.
NEAR_MISS_COUNTS = (0, 1, 1)
_TRIES = 20


@dataclass(frozen=True)
class Pair:
    """A scene, its caption, its family's number, and how it differs from the family's base scene ("" for the base)."""

    scene: Scene
    caption: str
    family: int
    near_miss: str


def make_pairs(count: int, seed: str, avoid: Collection[Scene] = ()) -> list[Pair]:
    """`count` pairs in random order, no two of them with equal scenes or equal captions.

    Args:
        count: number of pairs.
        seed: names the random stream; equal seeds give equal pairs.
        avoid: scenes that must not come up, such as those of the other split.
    """
    rng = random.Random(seed)
    scenes, captions = set(avoid), set[str]()
    pairs: list[Pair] = []
    family = 0
    while len(pairs) < count:
        base = draw_scene(rng)
        if base in scenes:
            continue
        members = [("", base)] + [near_miss(base, rng) for _ in range(rng.choice(NEAR_MISS_COUNTS))]
        for name, scene in members[: count - len(pairs)]:
            caption = next((text for _ in range(_TRIES) if (text := describe(scene, rng)) not in captions), None)
            if scene in scenes or caption is None:
                continue
            scenes.add(scene)
            captions.add(caption)
            pairs.append(Pair(scene, caption, family, name))
        family += 1
    rng.shuffle(pairs)
    return pairs
