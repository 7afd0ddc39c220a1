"""A study: the cross of losses, seeds and data settings."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FlagValue = bool | int | float | str | list[Any]
Flags = dict[str, FlagValue]

# Losses that OpenCLIP has without the patch, and the flags that choose them.
BUILT_IN_LOSSES: Mapping[str, Flags] = {"clip": {}, "siglip": {"siglip": True}}


@dataclass(frozen=True)
class DataSetting:
    """What the runs train on.

    Args:
        name: its name in the study.
        scenes: options of the `scenes` command, which makes the data; None for other data.
        flags: of OpenCLIP; they name the data, where neither scenes nor Flickr8k are made.
        flickr8k: the part of Flickr8k to make the data of; None for other data.
    """

    name: str
    scenes: Flags | None
    flags: Flags
    flickr8k: "Flickr8k | None" = None


@dataclass(frozen=True)
class Flickr8k:
    """Flickr8k, where a share of the images have all captions from other images.

    Args:
        mismatch: the share, in percent.
        near: whether the other image is a similar one.
        matched_only: whether the mismatched images are left out, as by a filter that knows them.
        folder: where the data set lies.
    """

    mismatch: int = 0
    near: bool = False
    matched_only: bool = False
    folder: str | None = None

    @property
    def list_name(self) -> str:
        """Name of the list of mismatched images, without `.csv`."""
        return f"mismatch-{'near-' if self.near else ''}{self.mismatch}"


@dataclass(frozen=True)
class Loss:
    """A loss of the study: its name there, what `--loss` is given, and further flags."""

    name: str
    loss: str
    flags: Flags

    @property
    def selection(self) -> Flags:
        """The flags that choose this loss.

        Built-in losses get OpenCLIP's own: unpatched OpenCLIP reads `--loss X` as `--loss-dist-impl X`.
        """
        return BUILT_IN_LOSSES.get(self.loss, {"loss": self.loss})


@dataclass(frozen=True)
class Study:
    """A study, as its file describes it; the first loss is the baseline of the others."""

    source: str
    name: str
    note: str
    seeds: tuple[int, ...]
    flags: Flags
    data: tuple[DataSetting, ...]
    losses: tuple[Loss, ...]

    @property
    def needs_patch(self) -> bool:
        """Whether a loss is asked for that unpatched OpenCLIP lacks."""
        return any(loss.loss not in BUILT_IN_LOSSES for loss in self.losses)


def arguments(flags: Mapping[str, FlagValue]) -> list[str]:
    """Command line of `flags`: true is a switch, false leaves the flag out, a list is repeated values."""
    words: list[str] = []
    for key, value in flags.items():
        if value is False:
            continue
        words.append(f"--{key}")
        if isinstance(value, list):
            words.extend(map(str, value))
        elif value is not True:
            words.append(str(value))
    return words
