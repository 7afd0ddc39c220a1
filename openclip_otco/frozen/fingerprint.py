"""Fingerprints of functions: an image transform or a tokenizer is recognized by its outputs for a few samples."""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_TIMES = 8
# Square, or longer than the 3:4 to 4:3 that RandomResizedCrop draws from. So with `scale=(1, 1)` its crop of each of
# these is the same every time: the whole picture, or the same crop of its middle.
_SIZES = ((96, 160), (301, 200), (64, 64), (400, 640))
_CAPTIONS = (
    "A brown dog, and a black one, run through the snow; nobody follows them!",
    "Two GIRLS in red-white costumes (1920s) sing \"Ça ira\" at the café – 100 % naïve…",
    "un hombre camina por la playa 犬が走る 🐕 #dog @home http://example.com/a_b?c=d",
    "!\"#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_`abcdefghijklmnopqrstuvwxyz{|}~",
    "photograph of architecture surrounded by unbelievably heterogeneous landscapes " * 20,
    "",
)  # fmt: skip


def sample_images() -> list[bytes]:
    """Pictures of noise, of several shapes and sizes, as PNG files."""
    generator, files = np.random.default_rng(0), []
    for height, width in _SIZES:
        # Coarse and fine structure, so that different ways of resizing give different pixels.
        coarse = generator.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3)).repeat(8, axis=0).repeat(8, axis=1)
        fine = generator.integers(-20, 21, (height, width, 3))
        pixels = (coarse[:height, :width] + fine).clip(0, 255).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        files.append(stream.getvalue())
    return files


def sample_captions() -> list[bytes]:
    """Captions with all of ASCII, other scripts, a long one and an empty one, as UTF-8."""
    return [caption.encode() for caption in _CAPTIONS]


def fingerprint(function: Callable[[bytes], Tensor], samples: Sequence[bytes]) -> str | None:
    """A hash of the outputs of `function` for the samples, sixteen hexadecimal digits; None if its outputs are random.

    It calls `function` eight times for each sample; randomness that is too rare to show in these calls is not found.
    Python's, NumPy's and torch's random numbers are the same for each rank and seed here, and are restored afterwards.
    """
    digests = set()
    with own_random_numbers():
        for _ in range(_TIMES):
            content = hashlib.sha256()
            for sample in samples:
                out = function(sample).contiguous()
                content.update(f"{tuple(out.shape)} {out.dtype}\n".encode())
                content.update(out.flatten().view(torch.uint8).numpy().tobytes())
            digests.add(content.hexdigest()[:16])
    return digests.pop() if len(digests) == 1 else None


@contextmanager
def own_random_numbers() -> Iterator[None]:
    """Gives its block the same random numbers each time, and then restores those of Python, NumPy and torch."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            random.seed(0)
            np.random.seed(0)
            torch.manual_seed(0)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
