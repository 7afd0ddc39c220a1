"""What OpenCLIP calls for `--frozen-features`: the flag, its checks, the hook, and the saving."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from openclip_otco.models.folder import home
from openclip_otco.rules import AT_LEAST_ONE
from openclip_otco.train.model_call import batches_have_names
from openclip_otco.train.options import end
from openclip_otco.train.training_callback import PlanWriter, TrainingCallback

# Below this share of inputs seen before, the memory costs more than it saves.
_LEAST_SHARE = 0.25


class FrozenFeaturesPlugin:
    """The plugin `frozen-features` of the entry-point group `open_clip_train.plugins`."""

    name = "frozen-features"
    losses = ()

    def __init__(self) -> None:
        self._towers: Sequence[Any] = ()

    def add_arguments(self, group: argparse._ArgumentGroup) -> None:
        """Adds the plugin's flags to a group of OpenCLIP's parser."""
        group.add_argument(
            "--frozen-features",
            type=str,
            nargs="?",
            default=None,
            const=str(home() / "features"),
            metavar="DIR",
            help="Encode each input of a locked tower only once, and keep the features in this folder (without DIR: "
            "%(const)s). Needs --lock-image, or --lock-text with --lock-text-freeze-layer-norm.",
        )

        group.add_argument(
            "--frozen-image-size",
            type=int,
            default=None,
            metavar="PIXELS",
            help="With --frozen-features: enlarge images to this size for the locked image tower, so that loaders "
            "deal with small ones.",
        )

    def check_args(self, parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
        """If features cannot be kept with these arguments, ends with exit code 2 and one line that says why."""
        if args.frozen_image_size is not None:
            if args.frozen_features is None:
                end(parser, "argument --frozen-image-size: needs --frozen-features")
            if not AT_LEAST_ONE.accepts(args.frozen_image_size):
                end(parser, f"argument --frozen-image-size: must be {AT_LEAST_ONE.text}, got {args.frozen_image_size}")
        if args.frozen_features is None:
            return

        def refuse(reason: str) -> NoReturn:
            end(parser, f"argument --frozen-features: {reason}")

        # OpenCLIP 4 counts the head, which may be trained, as the last group of a tower.
        most_unlocked = 1 if batches_have_names() else 0
        image = args.lock_image and args.lock_image_unlocked_groups <= most_unlocked
        text = args.lock_text and args.lock_text_unlocked_layers <= most_unlocked
        if not image and not text:
            refuse("no tower is locked; add --lock-image, or --lock-text with --lock-text-freeze-layer-norm")
        if text and not args.lock_text_freeze_layer_norm:
            refuse("--lock-text leaves layer norms trainable; add --lock-text-freeze-layer-norm")
        if args.lock_image and args.lock_image_freeze_bn_stats:
            refuse(
                "drop --lock-image-freeze-bn-stats: --frozen-features freezes the statistics already, and that flag "
                "removes the activations inside timm's batch norms"
            )
        if getattr(args, "torchscript", False) or getattr(args, "trace", False):  # OpenCLIP 4 has them no longer
            refuse("not with --torchscript or --trace")
        try:
            Path(args.frozen_features).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            refuse(f"{args.frozen_features} cannot be made ({error.strerror or error}); name a folder")

    def prepare_model(self, args: argparse.Namespace, model: nn.Module) -> None:
        """Lets the locked towers take their features from the folder.

        Raises:
            RuntimeError: a locked tower is of a kind that the flag does not know.
        """
        self._towers = ()
        if args.frozen_features is None:
            return
        from openclip_otco.frozen.towers import freeze_towers

        self._towers = freeze_towers(model, Path(args.frozen_features), args.precision, args.frozen_image_size)
        kinds = {tower.kind for tower in self._towers}
        wanted = {kind for kind in ("image", "text") if getattr(args, f"lock_{kind}")}
        if missing := sorted(wanted - kinds):
            raise RuntimeError(
                f"--frozen-features knows timm's image towers and Hugging Face's text towers, locked as a whole; the "
                f"{missing[0]} tower of {args.model} is none of them. Drop the flag or choose another model"
            )

    def prepare_data(self, args: argparse.Namespace, data: dict[str, Any], preprocess: Any, tokenizer: Any) -> None:
        """Lets batches hold features in place of images and captions, unless there is a reason against it."""
        if not self._towers:
            return
        from openclip_otco.frozen.data import TableData

        tables = TableData(args, self._towers, preprocess, tokenizer)
        if (obstacle := tables.obstacle(data)) is None:
            tables.replace(data)
        elif args.rank == 0:
            logging.info(f"Frozen features: images and captions are read from the shards, as {obstacle}")

    def create_callbacks(self, args: argparse.Namespace, loss: object) -> list[FrozenFeaturesCallback]:
        """The callback that saves what the towers remember; none without the flag."""
        return [FrozenFeaturesCallback(self._towers, master=args.rank == 0)] if self._towers else []


class FrozenFeaturesCallback(TrainingCallback):
    """After each epoch, saves the features that the towers remember, and logs the share of inputs that they remembered.

    Args:
        towers: `FrozenTower`s.
        master: whether this process logs.
    """

    name = "frozen-features"

    def __init__(self, towers: Sequence[Any], master: bool = True) -> None:
        self.towers, self.master = towers, master
        self._epochs = 0

    def on_epoch_end(self, *, epoch: int, step: int, writer: PlanWriter | None = None) -> None:
        """Saves on each rank, as each saw inputs of its own."""
        self._epochs += 1
        told = []
        for tower in self.towers:
            memory = tower.memory
            if memory is None or not memory.asked:
                continue
            share = memory.hits / memory.asked
            told.append(f"{tower.kind.capitalize()} Remembered: {share:.4f} ({len(memory)} kept)")
            # The first epoch fills the memory.
            if self.master and self._epochs > 1 and share < _LEAST_SHARE:
                logging.warning(
                    f"Frozen features: only {share:.0%} of the {tower.kind} inputs were seen before; random "
                    'augmentation defeats --frozen-features. For images, train with --aug-cfg "scale=(1.0, 1.0)".'
                )
            memory.hits = memory.asked = 0
            try:
                memory.save()
            except OSError as error:  # a full disk is no reason to lose a run
                logging.warning(f"Frozen features: {memory.path} cannot be written, going on without. {error}")
        if self.master and told:
            logging.info(f"Frozen Features: {' '.join(told)}")
