"""Scene: what a picture shows, told apart from how it is drawn and how it is described."""

import random
from dataclasses import dataclass

COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "black")
KINDS = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
SIZES = ("small", "big")

# Slots in units of the picture's side, x to the right and y down; things fill them in reading order.
LAYOUTS: dict[str, tuple[tuple[float, float], ...]] = {
    "top left": ((0.24, 0.24),),
    "top": ((0.5, 0.24),),
    "top right": ((0.76, 0.24),),
    "left": ((0.24, 0.5),),
    "middle": ((0.5, 0.5),),
    "right": ((0.76, 0.5),),
    "bottom left": ((0.24, 0.76),),
    "bottom": ((0.5, 0.76),),
    "bottom right": ((0.76, 0.76),),
    "row of two": ((0.28, 0.5), (0.72, 0.5)),
    "column of two": ((0.5, 0.28), (0.5, 0.72)),
    "row of three": ((0.19, 0.5), (0.5, 0.5), (0.81, 0.5)),
    "column of three": ((0.5, 0.19), (0.5, 0.5), (0.5, 0.81)),
    "one over two": ((0.5, 0.27), (0.27, 0.73), (0.73, 0.73)),
    "two over one": ((0.27, 0.27), (0.73, 0.27), (0.5, 0.73)),
}
COUNT_WEIGHTS = {1: 0.06, 2: 0.47, 3: 0.47}


@dataclass(frozen=True)
class Thing:
    """One shape: its kind, colour and size are members of `KINDS`, `COLOURS` and `SIZES`."""

    kind: str
    colour: str
    size: str


@dataclass(frozen=True)
class Scene:
    """One to three different things in the slots of a layout; equal scenes state equal facts."""

    layout: str
    things: tuple[Thing, ...]


def draw_scene(rng: random.Random) -> Scene:
    """Draws a scene whose things differ from each other."""
    count = rng.choices(list(COUNT_WEIGHTS), list(COUNT_WEIGHTS.values()))[0]
    layout = rng.choice([name for name, slots in LAYOUTS.items() if len(slots) == count])
    things: list[Thing] = []
    while len(things) < count:
        thing = Thing(rng.choice(KINDS), rng.choice(COLOURS), rng.choice(SIZES))
        if thing not in things:
            things.append(thing)
    return Scene(layout, tuple(things))
