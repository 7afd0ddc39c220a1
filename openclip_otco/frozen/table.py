"""A table of rows by key, in files that are mapped into memory and grow by whole parts."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from openclip_otco.frozen.save import save_tensors

_PARTS = ("part-*.safetensors", "failed-*.safetensors")


class FeatureTable:
    """Rows of `d` numbers, each with a key of 64 bits, and the keys for which no row can be made.

    A part is a file with some keys and their rows. Its content never changes. Several processes may add parts at the
    same time; after `reload`, a process sees the parts of the others. Rows stay on the disk until `take` reads them, so
    a table may be larger than memory.

    Args:
        folder: the folder of the parts; `add` makes it. A part that cannot be read is ignored, with a warning.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._parts: dict[str, Tensor] = {}
        self._starts = torch.zeros(1, dtype=torch.int64)
        self._keys = self._rows = torch.zeros(0, dtype=torch.int64)
        self._failed: dict[str, Tensor] = {}
        self._broken: set[str] = set()
        self._may_lack_parts = True

    def __len__(self) -> int:
        """Number of rows; a key that two processes added at once counts twice."""
        self._catch_up()
        return int(self._starts[-1])

    def reload(self) -> None:
        """Loads the parts that were added to the folder since the last time."""
        self._may_lack_parts = False
        known = {*self._parts, *self._failed, *self._broken}
        there = sorted(path for kind in _PARTS for path in self.folder.glob(kind))
        new = {path.name: path for path in there if path.name not in known}
        keys = []
        for name, path in new.items():
            try:
                with safe_open(str(path), framework="pt") as file:
                    part_keys = file.get_tensor("keys")
                    if name.startswith("failed-"):
                        self._failed[name] = part_keys
                        continue
                    features = file.get_tensor("features")
                if len(part_keys) != len(features):
                    raise ValueError(f"{len(part_keys)} keys, {len(features)} rows")
            except (SafetensorError, OSError, ValueError) as error:
                logging.warning(f"Frozen features: {path} is not usable and its rows will be made anew. {error}")
                self._broken.add(name)
                continue
            self._parts[name] = features
            keys.append(part_keys)
        if keys:
            first = int(self._starts[-1])
            sizes = torch.tensor([0, *(len(features) for features in self._parts.values())])
            self._starts = sizes.cumsum(0)
            added = torch.cat(keys)
            self._keys, order = torch.cat([self._keys, added]).sort(stable=True)
            self._rows = torch.cat([self._rows, torch.arange(first, first + len(added))])[order]

    def find(self, keys: Tensor) -> Tensor:
        """The rows `(n,)` int64 of `keys`, `(n,)` int64; -1 where there is none."""
        self._catch_up()
        if not len(self._keys):
            return torch.full_like(keys, -1)
        places = torch.searchsorted(self._keys, keys).clamp_(max=len(self._keys) - 1)
        return torch.where(self._keys[places] == keys, self._rows[places], -1)

    def failed(self, keys: Tensor) -> Tensor:
        """Which of `keys`, `(n,)` int64, were found to have no row; `(n,)` bool."""
        self._catch_up()
        return torch.isin(keys, torch.cat([keys.new_empty(0), *self._failed.values()]))

    def take(self, rows: Tensor) -> Tensor:
        """The numbers `(n, d)` of `rows`, `(n,)` int64 as `find` gives them."""
        parts = list(self._parts.values())
        of_part = torch.searchsorted(self._starts, rows, right=True) - 1
        taken = parts[0].new_empty(len(rows), *parts[0].shape[1:])
        for part in of_part.unique().tolist():
            here = (of_part == part).nonzero().flatten()
            taken[here] = parts[part][rows[here] - self._starts[part]]
        return taken

    def add(self, keys: Tensor, features: Tensor) -> None:
        """Writes a part, whole or not at all.

        Args:
            keys: `(n,)` int64.
            features: `(n, d)`.

        Raises:
            OSError: the folder cannot be written.
        """
        self._write("part", {"keys": keys, "features": features})

    def add_failed(self, keys: Tensor) -> None:
        """Records that no row can be made for these keys, `(n,)` int64, so that no later pass tries it.

        Raises:
            OSError: the folder cannot be written.
        """
        self._write("failed", {"keys": keys})

    def _write(self, kind: str, content: dict[str, Tensor]) -> None:
        # The same part from two processes has the same name.
        name = f"{kind}-{hashlib.sha256(content['keys'].numpy().tobytes()).hexdigest()[:16]}.safetensors"
        save_tensors(self.folder / name, content)
        self._broken.discard(name)
        # Not `reload` here: a pass adds thousands of parts, and nobody may ask for their rows before its end.
        self._may_lack_parts = True

    def _catch_up(self) -> None:
        if self._may_lack_parts:
            self.reload()
