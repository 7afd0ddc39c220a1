"""Where the plans that calibrate an evaluation come from: a checkpoint, or the pairs of training shards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from openclip_otco.data import samples
from openclip_otco.errors import UserError
from openclip_otco.evaluate.retriever import CalibratedRetriever

if TYPE_CHECKING:
    from openclip_otco.runs.encoder import Encoder


def retriever_of_checkpoint(checkpoint: Path, epsilon: float | None, device: torch.device | str) -> CalibratedRetriever:
    """A retriever with the plans that `--loss otco` cached.

    Args:
        checkpoint: of the run.
        epsilon: of the plans, which are solved again with it; `None`: as they were cached.
        device: where to search.

    Raises:
        UserError: the checkpoint holds no plans that can calibrate, or `epsilon` (`--calibrate-epsilon`) is too small.
    """
    try:
        return CalibratedRetriever.from_checkpoint(checkpoint, epsilon, device)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"--calibrate: {error}; name training shards by --calibrate-data") from error
    except RuntimeError as error:
        raise UserError(f"--calibrate-epsilon {epsilon}: {error}") from error


def retriever_of_shards(
    encoder: Encoder,
    data: str,
    pairs: int,
    epsilon: float,
    batch_size: int = 64,
    workers: int = 1,
    by_line: bool = False,
) -> CalibratedRetriever:
    """A retriever with a plan of the first `pairs` pairs of the training shards `data`.

    Args:
        epsilon: of the plan, in units of the cosine cost.
        encoder, data, pairs, batch_size, workers, by_line: as in `training_features`.

    Raises:
        UserError: shards or `epsilon` (`--calibrate-epsilon`) that cannot be used.
    """
    images, texts = training_features(encoder, data, pairs, batch_size, workers, by_line)
    try:
        return CalibratedRetriever.from_features(images, texts, epsilon, max_support=pairs, device=encoder.device)
    except RuntimeError as error:
        raise UserError(f"--calibrate-epsilon {epsilon}: {error}") from error


def training_features(
    encoder: Encoder, data: str, pairs: int, batch_size: int = 64, workers: int = 1, by_line: bool = False
) -> tuple[Tensor, Tensor]:
    """Image and text features, `(N, d)` each, of the first `pairs` pairs, or of all where there are fewer.

    An image with several captions makes as many pairs.

    Args:
        encoder: the model.
        data: shards, as for `--train-data`.
        batch_size: images encoded at once.
        workers: processes that decode, 0 for none.
        by_line: whether each line of a `txt` is a caption.

    Raises:
        UserError: shards that cannot be read, or hold no captions.
    """
    images: list[Tensor] = []
    texts: list[Tensor] = []
    missing = pairs
    try:
        with tqdm(total=pairs, desc="training pairs", unit="pair", disable=None) as bar:
            for batch in samples.batches(data, encoder.preprocess, batch_size, workers, by_line):
                captions = [(row, text) for row, sample in enumerate(batch) for text in sample.captions][:missing]
                if captions:
                    features = encoder.images([sample.image for sample in batch])
                    images.append(features[[row for row, _ in captions]])
                    texts.append(encoder.texts([text for _, text in captions]))
                missing -= len(captions)
                bar.update(len(captions))
                if not missing:
                    break
    except UserError as error:
        # The reader of shards names them `--data`.
        raise UserError(f"--calibrate-data {data}: {str(error).removeprefix(f'--data {data}: ')}") from error
    if not images:
        raise UserError(f"--calibrate-data {data}: no captions (.txt, .json) beside the images")
    return torch.cat(images), torch.cat(texts)


def check_disjoint(data: str, training: str) -> None:
    """Makes sure that no shard is used both to calibrate and to measure.

    Raises:
        UserError: a shard of `training` is one of `data` as well.
    """
    measured = {_identity(shard) for shard in samples.shards(data)}
    try:
        shards = samples.shards(training)
    except UserError as error:
        raise UserError(f"--calibrate-{str(error).removeprefix('--')}") from error
    shared = [shard for shard in shards if _identity(shard) in measured]
    if shared:
        raise UserError(
            f"--calibrate-data {training}: {shared[0]} belongs to --data; calibrate on training shards, never on those "
            "that the result is measured on"
        )


def _identity(shard: str) -> Any:
    """Equal for two names of one file; the name itself where the shard is no local file."""
    try:
        found = Path(shard).stat()
    except OSError:
        return shard
    return found.st_dev, found.st_ino
