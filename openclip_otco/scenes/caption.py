"""Caption: an English sentence that is true of a scene, though it need not tell all of it."""

import random

from openclip_otco.scenes.scene import Scene, Thing

# How often a fact is left out.
UNTOLD_SIZE, UNTOLD_COLOUR, UNTOLD_KIND, UNTOLD_LAYOUT = 0.1, 0.04, 0.04, 0.06
MIN_WORDS, MAX_WORDS = 6, 25

_NAMES = {
    "circle": ("circle", "circle", "disc"),
    "square": ("square", "square", "box"),
    "diamond": ("diamond", "diamond", "rhombus"),
    "cross": ("cross", "cross", "plus sign"),
    "ring": ("ring", "ring", "hoop"),
    "purple": ("purple", "purple", "violet"),
    "big": ("big", "large"),
    "small": ("small", "little", "tiny"),
}
_OPENINGS = ("a picture of", "a drawing of", "an image of", "here is", "this is", "we see", "you can see")

_CORNER = ("{a} in the {layout} corner", "{a} in the {layout}", "in the {layout} corner there is {a}")
_EDGE = ("{a} at the {layout}", "{a} near the {layout} edge", "there is {a} at the {layout} of the picture")
_SIDE = ("{a} on the {layout}", "{a} near the {layout} edge", "{a} can be seen on the {layout} side")
_TOLD: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("top left", "top right", "bottom left", "bottom right"), _CORNER),
    **dict.fromkeys(("top", "bottom"), _EDGE),
    **dict.fromkeys(("left", "right"), _SIDE),
    "middle": ("{a} in the middle", "{a} at the centre", "{a} is placed in the centre of the picture"),
    "row of two": (
        "{a} to the left of {b}",
        "{a} left of {b}",
        "{a} is to the left of {b}",
        "{b} to the right of {a}",
        "{b} is right of {a}",
        "{b} with {a} on its left",
        "{a} with {b} on its right",
        "{a} has been put to the left of {b}",
        "{b} is placed to the right of {a}",
        "{a} on the left and {b} on the right",
        "on the left {a}, on the right {b}",
        "to the right of {a} there is {b}",
        "left of {b} is {a}",
    ),
    "column of two": (
        "{a} above {b}",
        "{a} over {b}",
        "{a} is above {b}",
        "{b} below {a}",
        "{b} under {a}",
        "{b} is underneath {a}",
        "{b} with {a} above it",
        "{a} with {b} below it",
        "{a} has been put above {b}",
        "{b} is placed under {a}",
        "{a} at the top and {b} at the bottom",
        "at the top {a}, at the bottom {b}",
        "beneath {a} there is {b}",
        "above {b} is {a}",
    ),
    "row of three": (
        "{a}, {b} and {c} from left to right",
        "{c}, {b} and {a} from right to left",
        "{b} between {a} on the left and {c} on the right",
        "{a} on the left, {b} in the middle, {c} on the right",
        "{b} has {a} to its left and {c} to its right",
        "from left to right: {a}, {b}, {c}",
        "{b} is placed right of {a} and left of {c}",
    ),
    "column of three": (
        "{a}, {b} and {c} from top to bottom",
        "{c}, {b} and {a} from bottom to top",
        "{b} between {a} above and {c} below",
        "{a} at the top, {b} in the middle, {c} at the bottom",
        "{b} has {a} above it and {c} below it",
        "from top to bottom: {a}, {b}, {c}",
        "{b} is placed under {a} and over {c}",
    ),
    "one over two": (
        "{a} above {b} on the left and {c} on the right",
        "{a} at the top, {b} at the bottom left, {c} at the bottom right",
        "{b} and {c}, left to right, under {a}",
        "below {a} are {b} on the left and {c} on the right",
        "{b} left of {c}, and {a} over both",
    ),
    "two over one": (
        "{a} on the left and {b} on the right above {c}",
        "{a} at the top left, {b} at the top right, {c} at the bottom",
        "{a} and {b}, left to right, over {c}",
        "above {c} are {a} on the left and {b} on the right",
        "{b} right of {a}, and {c} under both",
    ),
}
_UNTOLD: dict[int, tuple[str, ...]] = {
    1: ("nothing but {a}", "{a} on a plain background", "{a} all alone"),
    2: ("{a} next to {b}", "{a} and {b}", "{a} together with {b}", "{a} close to {b}"),
    3: ("{a}, {b} and {c}", "{a} together with {b} and {c}", "three shapes: {a}, {b}, {c}"),
}


def _named(fact: str, rng: random.Random) -> str:
    return rng.choice(_NAMES.get(fact, (fact,)))


def _phrase(thing: Thing, rng: random.Random) -> str:
    words = [] if rng.random() < UNTOLD_SIZE else [_named(thing.size, rng)]
    if rng.random() < UNTOLD_KIND:
        words += [_named(thing.colour, rng), "shape"]
    elif rng.random() < UNTOLD_COLOUR:
        words += [_named(thing.kind, rng)]
    else:
        words += [_named(thing.colour, rng), _named(thing.kind, rng)]
    article = "one" if rng.random() < 0.08 else "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words])


def describe(scene: Scene, rng: random.Random) -> str:
    """A caption of `MIN_WORDS` to `MAX_WORDS` words, drawn from templates, synonyms and what is left untold."""
    while True:
        things = list(scene.things)
        told = rng.random() >= UNTOLD_LAYOUT
        if not told:
            rng.shuffle(things)
        template = rng.choice(_TOLD[scene.layout] if told else _UNTOLD[len(things)])
        phrases = dict(zip("abc", (_phrase(thing, rng) for thing in things), strict=False))
        text = template.format(layout=scene.layout, **phrases)
        if template.startswith("{") and " is " not in template and " has " not in template and rng.random() < 0.3:
            text = f"{rng.choice(_OPENINGS)} {text}"
        if rng.random() < 0.5:
            text = text[0].upper() + text[1:]
        if rng.random() < 0.5:
            text += "."
        if MIN_WORDS <= len(text.split()) <= MAX_WORDS:
            return text
