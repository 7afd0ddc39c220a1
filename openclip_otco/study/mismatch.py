"""Mismatch: the share of a data setting's training images that have another image's captions."""

import re

from openclip_otco.study.study import DataSetting

_NAME = re.compile(r"mismatch-(\d+)")


def mismatch(setting: DataSetting) -> float | None:
    """The share, 0 to 1, that the setting's data are made with, or that its name tells; None if neither tells.

    The names that tell are `clean`, and `mismatch-40` with any percentage. For captions of similar images, and for data
    without the mismatched pairs, it is None, as their shares do not compare with the others.
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
