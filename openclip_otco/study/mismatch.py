"""Mismatch: the share of a data setting's training images that got another image's captions."""

import re

from openclip_otco.study.study import DataSetting

_NAME = re.compile(r"mismatch-(\d+)")


def mismatch(setting: DataSetting) -> float | None:
    """The share in 0 to 1: what the setting's data are given, else what its name says; None if neither tells.

    The names that say it are `clean` and `mismatch-40` with any percentage, and no others. Captions of similar images,
    and data without the mismatched pairs, are not of that scale: None.
    """
    if setting.scenes is not None:
        share = setting.scenes.get("mismatch", 0.0)
        return float(share) if isinstance(share, int | float) else None
    if setting.flickr8k is not None:
        special = setting.flickr8k.near or setting.flickr8k.matched_only
        return None if special else setting.flickr8k.mismatch / 100
    if setting.name == "clean":
        return 0.0
    found = _NAME.fullmatch(setting.name)
    return int(found[1]) / 100 if found and int(found[1]) <= 100 else None
