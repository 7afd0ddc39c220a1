"""Features of locked towers, read from the tables of `--frozen-features`, and the checkpoint's features made of them.

Only one image and one caption are encoded, to check that a table belongs to the checkpoint's towers.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from openclip_otco.audit.source import Shards
from openclip_otco.frozen.shard_pairs import content_key
from openclip_otco.frozen.table import FeatureTable
from openclip_otco.runs.encoder import Encoder

_ROWS_AT_ONCE = 4096
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Towers:
    """Pairs of shards: their names, and the features `(n, e)` of the image tower and of the text tower."""

    names: list[str]
    images: Tensor
    texts: Tensor


def tower_features(encoder: Encoder, folder: Path, shards: str, pairs: int | None = None) -> Towers:
    """The locked towers' features of the first `pairs` pairs of `shards`; of all pairs where it is `None`.

    Args:
        folder: of `--frozen-features`; a run on these shards has filled its tables.

    Raises:
        SystemExit: no table of these towers holds all of the pairs.
    """
    names: list[str] = []
    keys: dict[str, list[int]] = {"image": [], "text": []}
    first: dict[str, bytes] = {}
    for sample in Shards(shards).samples():
        for kind, content in (("image", sample.files["jpg"]), ("text", sample.files["txt"])):
            keys[kind].append(content_key(content))
            first.setdefault(kind, content)
        names.append(sample.key)
        if len(names) == pairs:
            break
    with Image.open(io.BytesIO(first["image"])) as image:
        _, image_row = encoder.images_and_tower([encoder.preprocess(image.convert("RGB"))])
    _, text_row = encoder.texts_and_tower([first["text"].decode()])
    return Towers(
        names,
        _rows(folder, "image", torch.tensor(keys["image"]), image_row),
        _rows(folder, "text", torch.tensor(keys["text"]), text_row),
    )


def model_features(encoder: Encoder, kind: str, towers: Tensor) -> Tensor:
    """Unit-norm features `(n, d)` that the model makes of its tower's `(n, e)`; `kind` is `image` or `text`."""
    encode = encoder.model.encode_image if kind == "image" else encoder.model.encode_text
    with torch.inference_mode(), encoder.autocast():
        made = torch.cat([encode(part.to(encoder.device)).float().cpu() for part in towers.split(_ROWS_AT_ONCE)])
    return F.normalize(made, dim=1)


def _rows(folder: Path, kind: str, keys: Tensor, first: Tensor) -> Tensor:
    """The rows of `keys` in the table whose row for the first key equals `first`, `(1, e)`."""
    for path in sorted(folder.glob(f"{kind}-*/")):
        table = FeatureTable(path)
        rows = table.find(keys)
        if (rows < 0).any():
            continue
        found = table.take(rows).float()
        if found.shape[1:] == first.shape[1:] and torch.allclose(found[:1], first, _TOLERANCE, _TOLERANCE):
            return found
    raise SystemExit(
        f"--frozen-features {folder}: no table of the checkpoint's {kind} tower holds all pairs of these shards; train "
        "on them with --frozen-features first"
    )
