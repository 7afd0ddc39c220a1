"""`openclip-otco train`: OpenCLIP's training script with the same arguments, after a look at what would be run.

An OpenCLIP without the plugin point takes `--loss otco` for short for its own `--loss-dist-impl otco`, and trains CLIP
without a word. It is there after an upgrade of open_clip_torch, in another environment, and in a checkout of OpenCLIP,
whose `src/` Python prefers to the installed copy.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import distributions, entry_points
from pathlib import Path

from openclip_otco.patch import diff, installation

GROUP = "open_clip_train.plugins"
OK, FAILED, UNUSABLE = 0, 1, 2


def problem() -> str | None:
    """Why a training that this process starts would not have OTCO's losses, in one line with the cure; None if it has.

    What is looked at is what this process would import, wherever that lies.
    """
    found = installation.status()
    if found.state is installation.State.NOT_INSTALLED:
        return f"OpenCLIP's training script is not installed: pip install '{installation.DISTRIBUTION}[training]'"
    if found.state is not installation.State.PATCHED:
        what = f"{diff.PACKAGE} in {found.folder} ({found.state.value}) would train CLIP whatever --loss says"
        return f"{what}; {_cure(found)}"
    return _plugin_problem()


def launch(arguments: Sequence[str]) -> int:
    """Runs OpenCLIP's training script, in this process, as `python -m open_clip_train.main` does.

    Args:
        arguments: of OpenCLIP's script.

    Returns:
        0; 1 where the script stopped with an error of its own, which `python -m` would pass over in silence; 2 after
        one line where it was not started.
    """
    if (reason := problem()) is not None:
        print(f"openclip-otco train: {reason}", file=sys.stderr)
        return UNUSABLE
    # OpenCLIP's messages name the program.
    sys.argv = ["openclip-otco train", *arguments]
    from open_clip_train.main import main

    return FAILED if main(list(arguments)) else OK


def _cure(found: installation.Status) -> str:
    if found.folder == Path.cwd():
        return "it lies in this folder: start from another one"
    if found.state is installation.State.UNPATCHED or found.state is installation.State.PARTIAL:
        target = "" if found.folder in _installed() else f" --target {found.folder} --version {found.version}"
        return f"run openclip-otco patch{target}"
    if found.state is installation.State.UNSUPPORTED:
        versions = " or ".join(installation.supported_versions())
        return f"there is no patch for version {found.version}: install {installation.DISTRIBUTION} {versions}"
    return "openclip-otco patch --status says what to do"


def _installed() -> list[Path]:
    found = distributions(name=installation.DISTRIBUTION)
    return [Path(str(distribution.locate_file(""))) for distribution in found]


def _plugin_problem() -> str | None:
    from openclip_otco.train.plugin import OTCOPlugin

    points = entry_points(group=GROUP, name=OTCOPlugin.name)
    cure = "run pip install --force-reinstall --no-deps openclip-otco in this environment"
    if not points:
        return f"OpenCLIP does not find the plugin {OTCOPlugin.name} (entry points {GROUP}); {cure}"
    for point in points:
        try:
            loaded = point.load()
        except Exception as error:
            return f"OpenCLIP cannot load the plugin {point.name} ({point.value}): {error!r}; {cure}"
        if loaded is not OTCOPlugin:
            return f"OpenCLIP would load another plugin {point.name} ({point.value}); uninstall the package that has it"
    return None
