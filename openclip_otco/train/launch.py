"""`openclip-otco train`: checks which OpenCLIP would be run, then runs its training script with the same arguments.

An OpenCLIP without the plugin point reads `--loss otco` as an abbreviation of its own flag `--loss-dist-impl otco`. It
trains CLIP and gives no warning. Such an OpenCLIP is found after an upgrade of open_clip_torch, in another environment,
and in a checkout of OpenCLIP, because Python prefers the checkout's `src/` to the installed copy.
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
    """Says in one line why a training of this process would lack OTCO's losses, and the cure; None if it would not.

    The check looks at the files that this process would import, in whatever folder they are.
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
        0 if the training ended well; 1 if the script returned an error, which `python -m` would ignore; 2 if the script
        was not started, with one line that says why.
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
    cure = "run pip install --force-reinstall --no-deps . in the checkout of openclip_otco, in this environment"
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
