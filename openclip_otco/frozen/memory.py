"""Memory: an encoder's outputs, found by the content of its inputs; in this process, and in a file that runs share."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from openclip_otco.files import locked
from openclip_otco.frozen.save import save_tensors

# Features of 200,000 images of 1,280 numbers each. Random views are never asked for again, and must not fill a disk.
MOST_BYTES = 1 << 30
_KEY_BYTES = 16


def input_keys(inputs: Tensor) -> list[bytes]:
    """A key for each of the `(B, ...)` inputs: 16 bytes of the SHA-256 of its numbers."""
    rows = inputs.detach().cpu().contiguous().flatten(1).view(torch.uint8).numpy()
    return [hashlib.sha256(row).digest()[:_KEY_BYTES] for row in rows]


class FeatureMemory:
    """Remembers what an encoder gave for each input.

    When it is full, it forgets the input that was not asked for the longest time. The file holds only inputs that were
    asked for at least twice, unless `save` is told to keep everything.

    Args:
        path: the file; made by `save`. One that cannot be read is passed over, with a warning.
        most_bytes: of features, in memory as in the file.
    """

    def __init__(self, path: Path, most_bytes: int = MOST_BYTES) -> None:
        self.path, self.most_bytes = path, most_bytes
        self.hits = self.asked = 0
        self._rows: OrderedDict[bytes, Tensor] = OrderedDict(_read(path))
        self._worth_keeping = set(self._rows)
        self._saved = set(self._worth_keeping)

    def __len__(self) -> int:
        return len(self._rows)

    def __call__(self, inputs: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """The features of `inputs`, `(B, d)`, without gradient, on their device; `encode` gets those that are new.

        Args:
            inputs: `(B, ...)`.
            encode: from `(b, ...)` to `(b, d)`, sample by sample.
        """
        # Features kept during evaluation must be normal tensors, which training may use.
        with torch.inference_mode(False), torch.no_grad():
            keys = input_keys(inputs)
            new = {key: index for index, key in enumerate(keys) if key not in self._rows}
            if new:
                for key, row in zip(new, encode(inputs[list(new.values())]).cpu(), strict=True):
                    self._rows[key] = row.clone()
            for key in keys:
                self._rows.move_to_end(key)
            self._worth_keeping.update(key for key in keys if key not in new)
            self.asked += len(keys)
            self.hits += len(keys) - len(new)
            features = torch.stack([self._rows[key] for key in keys])
            self._shrink()
        return features.to(inputs.device)

    def save(self, everything: bool = False) -> None:
        """Adds to the file the rows that it lacks. It is written whole or not at all, also if several processes do so.

        Args:
            everything: whether to save also inputs that were asked for only once. An evaluation does so, because its
                inputs are the same each time.

        Raises:
            OSError: the file cannot be written.
        """
        if everything:
            self._worth_keeping.update(self._rows)
        if self._worth_keeping <= self._saved:
            return
        with locked(self.path):
            kept = {**_read(self.path), **{key: row for key, row in self._rows.items() if key in self._worth_keeping}}
            rows = list(kept.items())[-self._most_rows(next(iter(kept.values()))) :]
            keys = torch.frombuffer(bytearray(b"".join(key for key, _ in rows)), dtype=torch.uint8)
            content = {"keys": keys.view(-1, _KEY_BYTES), "features": torch.stack([row for _, row in rows])}
            save_tensors(self.path, content)
        self._saved = set(self._worth_keeping)

    def _most_rows(self, row: Tensor) -> int:
        return max(1, self.most_bytes // (row.numel() * row.element_size()))

    def _shrink(self) -> None:
        most = self._most_rows(next(iter(self._rows.values())))
        while len(self._rows) > most:
            key, _ = self._rows.popitem(last=False)
            self._worth_keeping.discard(key)


def _read(path: Path) -> dict[bytes, Tensor]:
    if not path.is_file():
        return {}
    try:
        # Not load_file, which opens the file twice. If another process replaced the file in between, features would be
        # read at the wrong places.
        content = load(path.read_bytes())
        keys, features = content["keys"], content["features"]
        if len(keys) != len(features):
            raise ValueError(f"{len(keys)} keys, {len(features)} features")
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        logging.warning(f"Frozen features: {path} is not usable and will be made anew. {error}")
        return {}
    return dict(zip((key.numpy().tobytes() for key in keys), features, strict=True))
