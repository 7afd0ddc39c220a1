"""Training and validation data of a run with locked towers: features from tables in place of images and captions."""

from __future__ import annotations

import argparse
import hashlib
import io
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from open_clip import get_input_dtype
from open_clip_train.data import DataInfo, SharedEpoch, expand_urls, get_dataset_fn, get_wds_dataset
from open_clip_train.precision import get_autocast
from PIL import Image
from torch import Tensor

from openclip_otco.data.shard import is_local
from openclip_otco.frozen.fill import Input, fill, lacking, share
from openclip_otco.frozen.fingerprint import fingerprint, own_random_numbers, sample_captions, sample_images
from openclip_otco.frozen.loader import BatchesInOrder, PairTable, SeededBatches, loader
from openclip_otco.frozen.shard_pairs import ShardPairs, shard_pairs
from openclip_otco.frozen.table import FeatureTable
from openclip_otco.frozen.towers import FrozenTower
from openclip_otco.train.model_call import batches_have_names

_SPLITS = ("train", "val")
# Augmentations that change only some images, so that the fingerprint of a few samples may miss them.
_RARE = ("hflip", "vflip", "color_jitter", "auto_augment")
# Images and captions that a tower encodes at a time.
_IMAGES, _CAPTIONS = 64, 256
# On a network file system, files that another machine wrote may appear late.
_SECONDS_TO_APPEAR = 60.0
_SECONDS_BETWEEN_LINES = 10.0
# Ranks wait for each other's encoding, and not all have as much to do.
_LONGEST_PASS = timedelta(days=7)


def _is_rarely_random(aug_cfg: Mapping[str, Any] | None) -> bool:
    """Whether `--aug-cfg` asks for an augmentation of timm that may leave the samples of a fingerprint unchanged."""
    return any(value and (name in _RARE or name.endswith("_prob")) for name, value in (aug_cfg or {}).items())


class TableData:
    """Replaces OpenCLIP's datasets by datasets of features.

    A batch holds features of the locked image tower in place of images. If the text tower is locked too, the batch
    holds its features; else it holds the tokens of the captions. A `FrozenTower` accepts features or its usual inputs.

    Args:
        args: OpenCLIP's.
        towers: what `freeze_towers` found.
        preprocess: the image transforms of training and of validation.
        tokenizer: from a list of texts to tokens `(n, L)`.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        towers: Sequence[FrozenTower],
        preprocess: tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]],
        tokenizer: Callable[[list[str]], Tensor],
    ) -> None:
        self.args, self.folder = args, Path(args.frozen_features)
        self.towers = {tower.kind: tower for tower in towers}
        self.preprocess = dict(zip(_SPLITS, preprocess, strict=True))
        self.tokenizer = tokenizer
        self.fingerprints: dict[str, str | None] = {}
        self._tables: dict[tuple[str, str | None], FeatureTable] = {}
        self._group: Any = None

    def obstacle(self, data: Mapping[str, DataInfo]) -> str | None:
        """Why batches must hold images and captions from the shards; None if they can hold features."""
        args = self.args
        if "image" not in self.towers:
            return "the image tower is not locked"
        if args.loss == "simclr":
            return "--loss simclr makes views of images"
        if args.distill_model:
            return "--distill-model sees images, too"
        if getattr(args, "horovod", False):  # OpenCLIP 4 has it no longer
            return "--horovod"
        if args.dataset_resampled:
            return "--dataset-resampled draws shards"
        for split in self._splits(data):
            given = getattr(args, f"{split}_data")
            if get_dataset_fn(given, args.dataset_type) is not get_wds_dataset:
                return f"--{split}-data is no WebDataset"
            if strange := [url for url in expand_urls(given)[0] if not is_local(url)]:
                return f"{strange[0]} is not local"
            if self._fingerprint(split, self._image(split)) is None or _is_rarely_random(args.aug_cfg):
                return 'augmentation is random; for whole images, train with --aug-cfg "scale=(1.0, 1.0)"'
        return None

    def replace(self, data: dict[str, DataInfo]) -> None:
        """Encodes the inputs that no table has yet, each rank its share, and puts loaders of features into `data`.

        Raises:
            RuntimeError: a shard is missing or empty, the folder cannot be written, or ranks do not share it.
        """
        splits = self._splits(data)
        self._group = dist.new_group(backend="gloo", timeout=_LONGEST_PASS) if self.args.distributed else None
        try:
            # Transforms draw random numbers even where these change nothing. A run that encodes must train with the
            # same random numbers as a later run, which finds all features in the tables.
            with own_random_numbers():
                for split in splits:
                    data[split] = self._replaced(split, data[split])
        finally:
            if self._group is not None:
                dist.destroy_process_group(self._group)

    def _replaced(self, split: str, old: DataInfo) -> DataInfo:
        args, flag = self.args, f"--{split}-data"
        shards = [Path(url) for url in expand_urls(getattr(args, f"{split}_data"))[0]]
        sources = (self._image(split), self._text())
        try:
            pairs = self._pairs(shards)
            tables = {source.kind: self._table(split, source) for source in sources}
            for source in sources:
                self._fill(tables[source.kind], shards, pairs, source)
        except OSError as error:
            raise RuntimeError(f"--frozen-features {self.folder}, {flag}: {error}") from error
        rows = {kind: table.find(torch.cat([getattr(each, kind) for each in pairs])) for kind, table in tables.items()}
        usable = (rows["image"] >= 0) & (rows["text"] >= 0)
        self._check_equal_on_all_ranks(usable)
        if not usable.any():
            raise RuntimeError(f"{flag}: none of its {len(usable)} pairs can be read")
        table = PairTable(tables["image"], tables["text"], rows["image"][usable], rows["text"][usable])
        if args.rank == 0:
            logging.info(f"Frozen features: {split} has {len(table):,} pairs of {len(shards):,} shards, all encoded")
            if left_out := len(usable) - len(table):
                logging.warning(f"Frozen features: {left_out:,} pairs of {flag} cannot be decoded and are left out")
        return self._data_info(split, table, old)

    def _check_equal_on_all_ranks(self, usable: Tensor) -> None:
        # A disk that two machines share may show a file to one of them first. With other pairs, a rank would have other
        # batches, and nobody would notice.
        if self._group is None:
            return
        digests: list[Any] = [None] * self.args.world_size
        dist.all_gather_object(digests, hashlib.sha256(usable.numpy().tobytes()).hexdigest(), group=self._group)
        if len(set(digests)) > 1:
            raise RuntimeError(
                f"--frozen-features {self.folder}: ranks see different features there; start the training again"
            )

    def _data_info(self, split: str, table: PairTable, old: DataInfo) -> DataInfo:
        args = self.args
        epoch = SharedEpoch(old.shared_epoch.get_value())
        batches: SeededBatches | BatchesInOrder
        if split == "train":
            batches = SeededBatches(
                len(table),
                args.batch_size,
                old.dataloader.num_batches,
                args.seed,
                epoch.get_value,
                args.rank,
                args.world_size,
            )
        else:
            batches = BatchesInOrder(len(table), args.batch_size)
        on_gpu = torch.device(args.device).type == "cuda"
        dataloader: Any = loader(table, batches, args.workers, on_gpu, named=batches_have_names())
        dataloader.num_batches, dataloader.num_samples = old.dataloader.num_batches, old.dataloader.num_samples
        return DataInfo(dataloader=dataloader, shared_epoch=epoch)

    def _pairs(self, shards: Sequence[Path]) -> list[ShardPairs]:
        """What the shards hold; each rank reads its share of them."""
        rank, world_size = self.args.rank, self.args.world_size
        mine, told = [], time.monotonic()
        for number, shard in enumerate(shards[rank::world_size], 1):
            mine.append(shard_pairs(shard, self.folder / "shards"))
            if rank == 0 and time.monotonic() - told > _SECONDS_BETWEEN_LINES:
                told = time.monotonic()
                logging.info(f"Frozen features: {number * world_size:,} of {len(shards):,} shards read")
        if self._group is None:
            return mine
        theirs: list[Any] = [None] * world_size
        dist.all_gather_object(theirs, mine, group=self._group)
        return [theirs[number % world_size][number // world_size] for number in range(len(shards))]

    def _fill(self, table: FeatureTable, shards: Sequence[Path], pairs: Sequence[ShardPairs], source: Input) -> None:
        args = self.args
        keys = [lacking(table, pairs, source.kind)]
        if self._group is not None:
            # All ranks take the list of the first one. Their own lists may differ, as another run may be adding rows.
            dist.broadcast_object_list(keys, src=0, group=self._group)
        mine = share(keys[0], args.rank, args.world_size)
        unread = torch.tensor(fill(table, shards, mine, source, args.workers, tell=args.rank == 0))
        if self._group is not None:
            dist.all_reduce(unread, group=self._group)
        asked = torch.cat(keys[0])
        deadline = time.monotonic() + _SECONDS_TO_APPEAR
        while self._unknown(table, asked) > unread:
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"--frozen-features {self.folder}: rank {args.rank} does not see what other ranks wrote; name a "
                    "folder that all ranks share"
                )
            time.sleep(1)

    @staticmethod
    def _unknown(table: FeatureTable, keys: Tensor) -> int:
        table.reload()
        return int(((table.find(keys) < 0) & ~table.failed(keys)).sum())

    def _table(self, split: str, source: Input) -> FeatureTable:
        """The table of the rows of `source`, made once. Captions of both splits are in the same table."""
        prepared = self._fingerprint(split if source.kind == "image" else "text", source)
        key = source.kind, prepared
        if key not in self._tables:
            tower = self.towers.get(source.kind)
            # Different types of devices round differently, so each type has its own table.
            made_by = f"{tower.digest()} {torch.device(self.args.device).type}" if tower else "tokens"
            content = hashlib.sha256(f"{made_by} {prepared}".encode())
            self._tables[key] = FeatureTable(self.folder / f"{source.kind}-{content.hexdigest()[:16]}")
        return self._tables[key]

    def _image(self, split: str) -> Input:
        transform = self.preprocess[split]

        def prepare(content: bytes) -> Tensor:
            with Image.open(io.BytesIO(content)) as image:
                return transform(image.convert("RGB"))

        return Input("image", prepare, self._encoder("image"), _IMAGES)

    def _text(self) -> Input:
        def prepare(content: bytes) -> Tensor:
            return self.tokenizer([content.decode()])[0]

        return Input("text", prepare, self._encoder("text"), _CAPTIONS)

    def _encoder(self, kind: str) -> Callable[[Tensor], Tensor]:
        args, tower = self.args, self.towers.get(kind)
        if tower is None:
            return Tensor.int
        device = torch.device(args.device)
        autocast, dtype = get_autocast(args.precision, device_type=device.type), get_input_dtype(args.precision)

        def encode(inputs: Tensor) -> Tensor:
            inputs = inputs.to(device, dtype=dtype if kind == "image" else None)
            with autocast():
                return tower.compute(inputs)

        return encode

    def _fingerprint(self, name: str, source: Input) -> str | None:
        if name not in self.fingerprints:
            samples = sample_images() if source.kind == "image" else sample_captions()
            self.fingerprints[name] = fingerprint(source.prepare, samples)
        return self.fingerprints[name]

    def _splits(self, data: Mapping[str, DataInfo]) -> list[str]:
        return [split for split in _SPLITS if split in data]
