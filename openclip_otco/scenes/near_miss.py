"""Near miss: a scene that differs from another in one fact, so that only a careful reader tells them apart."""

import random
from collections.abc import Callable
from dataclasses import replace

from openclip_otco.scenes.scene import COLOURS, KINDS, SIZES, Scene

_MIRRORS = ({"left": "right", "right": "left"}, {"top": "bottom", "bottom": "top"})


def _mirrored(scene: Scene, rng: random.Random) -> Scene:
    things = list(scene.things)
    if len(things) == 1:
        mirror = rng.choice(_MIRRORS)
        return replace(scene, layout=" ".join(mirror.get(word, word) for word in scene.layout.split()))
    if scene.layout == "one over two":
        things[1], things[2] = things[2], things[1]
    elif scene.layout == "two over one":
        things[0], things[1] = things[1], things[0]
    else:
        things.reverse()
    return replace(scene, things=tuple(things))


def _colours_swapped(scene: Scene, rng: random.Random) -> Scene:
    if len(scene.things) == 1:
        return scene
    things = list(scene.things)
    i, j = rng.sample(range(len(things)), 2)
    things[i], things[j] = replace(things[i], colour=things[j].colour), replace(things[j], colour=things[i].colour)
    return replace(scene, things=tuple(things))


def _changed(fact: str, values: tuple[str, ...]) -> Callable[[Scene, random.Random], Scene]:
    def change(scene: Scene, rng: random.Random) -> Scene:
        things = list(scene.things)
        i = rng.randrange(len(things))
        others = [value for value in values if value != getattr(things[i], fact)]
        things[i] = replace(things[i], **{fact: rng.choice(others)})
        return replace(scene, things=tuple(things))

    return change


NEAR_MISSES: dict[str, Callable[[Scene, random.Random], Scene]] = {
    "mirrored": _mirrored,
    "colours swapped": _colours_swapped,
    "resized": _changed("size", SIZES),
    "recoloured": _changed("colour", COLOURS),
    "reshaped": _changed("kind", KINDS),
}
_WEIGHTS = (3, 3, 2, 2, 2)


def near_miss(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    """A near miss of `scene` and the name of the change; the things of the result differ from each other too."""
    while True:
        name = rng.choices(list(NEAR_MISSES), _WEIGHTS)[0]
        other = NEAR_MISSES[name](scene, rng)
        if other != scene and len(set(other.things)) == len(other.things):
            return name, other
