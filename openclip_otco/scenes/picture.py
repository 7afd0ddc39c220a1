"""Picture: a scene drawn on a light, noisy background, with jitter in place, size, angle and tint."""

import io
import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from openclip_otco.scenes.scene import LAYOUTS, Scene

RGB = {
    "red": (214, 36, 40),
    "green": (38, 150, 58),
    "blue": (38, 84, 214),
    "yellow": (240, 212, 30),
    "orange": (244, 132, 20),
    "purple": (124, 44, 168),
    "pink": (244, 128, 190),
    "black": (28, 28, 30),
}
RADIUS = {"small": 0.075, "big": 0.13}
HOLE = 0.55  # the inner radius of a ring over its outer one
_TINT, _NOISE, _SUPERSAMPLED = 14, 7, 3
_JPEG = {"quality": 92, "subsampling": 0}


@dataclass(frozen=True)
class Spot:
    """Where a thing is drawn: centre and radius in units of the picture's side (y down), angle in radians."""

    x: float
    y: float
    radius: float
    angle: float


def _polygon(corners: int, turn: float = 0.0, inner: float = 1.0) -> list[tuple[float, float]]:
    """A regular polygon, or a star where `inner` is below 1, with one corner straight up at `turn` = 0."""
    steps = corners if inner == 1.0 else 2 * corners
    reach = [1.0 if k % 2 == 0 or inner == 1.0 else inner for k in range(steps)]
    turns = [turn + 2 * math.pi * k / steps for k in range(steps)]
    return [(r * math.sin(t), -r * math.cos(t)) for r, t in zip(reach, turns, strict=True)]


def _heart() -> list[tuple[float, float]]:
    turns = [2 * math.pi * k / 40 for k in range(40)]
    return [
        (math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16)
        for t in turns
    ]


_ARM = 0.36
OUTLINES: dict[str, list[tuple[float, float]]] = {
    "circle": _polygon(40),
    "square": [(0.84 * x, 0.84 * y) for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1))],
    "triangle": _polygon(3),
    "diamond": [(0.0, -1.1), (0.72, 0.0), (0.0, 1.1), (-0.72, 0.0)],
    "star": _polygon(5, inner=0.42),
    "cross": [
        (-_ARM, -1.0), (_ARM, -1.0), (_ARM, -_ARM), (1.0, -_ARM), (1.0, _ARM), (_ARM, _ARM),
        (_ARM, 1.0), (-_ARM, 1.0), (-_ARM, _ARM), (-1.0, _ARM), (-1.0, -_ARM), (-_ARM, -_ARM),
    ],
    "ring": _polygon(40),
    "heart": _heart(),
}  # fmt: skip


def place(scene: Scene, rng: random.Random) -> tuple[Spot, ...]:
    """One spot for each thing; the jitter keeps every relation that the layout's name states."""
    slots = LAYOUTS[scene.layout]
    xs, ys = {x for x, _ in slots}, {y for _, y in slots}
    # A row may lie higher or lower, a column more to the left or right: position alone gives no relation away.
    shift_x = rng.uniform(-0.16, 0.16) if len(slots) > 1 and len(xs) == 1 else 0.0
    shift_y = rng.uniform(-0.16, 0.16) if len(slots) > 1 and len(ys) == 1 else 0.0
    return tuple(
        Spot(
            round(x + shift_x + rng.uniform(-0.035, 0.035), 4),
            round(y + shift_y + rng.uniform(-0.035, 0.035), 4),
            round(RADIUS[thing.size] * rng.uniform(0.9, 1.1), 4),
            round(rng.uniform(-0.2, 0.2), 4),
        )
        for thing, (x, y) in zip(scene.things, slots, strict=True)
    )


def _background(size: int, rng: random.Random) -> Image.Image:
    """Two light colours that run into each other from side to side or from top to bottom."""
    ends = bytes(rng.randint(205, 245) for _ in range(6))
    gradient = Image.frombytes("RGB", (2, 1), ends).resize((size, size), Image.Resampling.BILINEAR)
    return gradient.transpose(Image.Transpose.ROTATE_90) if rng.random() < 0.5 else gradient


def render(scene: Scene, spots: tuple[Spot, ...], size: int, rng: random.Random) -> bytes:
    """The picture as a JPEG of `size` x `size` pixels, coded without chroma subsampling."""
    side = size * _SUPERSAMPLED
    canvas = _background(side, rng)
    draw = ImageDraw.Draw(canvas)
    ground = canvas.copy()
    for thing, spot in zip(scene.things, spots, strict=True):
        cos, sin = math.cos(spot.angle), math.sin(spot.angle)
        tint = tuple(min(255, max(0, level + rng.randint(-_TINT, _TINT))) for level in RGB[thing.colour])
        outline = [
            (
                round(side * (spot.x + spot.radius * (x * cos - y * sin))),
                round(side * (spot.y + spot.radius * (x * sin + y * cos))),
            )
            for x, y in OUTLINES[thing.kind]
        ]
        draw.polygon(outline, fill=tint)
        if thing.kind == "ring":
            reach = spot.radius * HOLE
            box = [round(side * v) for v in (spot.x - reach, spot.y - reach, spot.x + reach, spot.y + reach)]
            mask = Image.new("1", canvas.size)
            ImageDraw.Draw(mask).ellipse(box, fill=1)
            canvas.paste(ground, mask=mask)
    pixels = np.asarray(canvas.reduce(_SUPERSAMPLED), dtype=np.int16)
    # random.Random's bytes are the same in every version of Python; NumPy's streams promise less.
    noise = np.frombuffer(rng.randbytes(pixels.size), dtype=np.uint8).reshape(pixels.shape) % (2 * _NOISE + 1)
    noisy = np.clip(pixels + noise.astype(np.int16) - _NOISE, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", **_JPEG)
    return buffer.getvalue()
