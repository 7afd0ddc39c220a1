"""What to look at after a study: the commands that make pages of a run's data and plans."""

import shlex
import shutil
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from openclip_otco.study import shards
from openclip_otco.study.mismatch import mismatch
from openclip_otco.study.run import Run
from openclip_otco.study.study import Study


def commands(study: Study, runs: Sequence[Run], finished: Collection[str]) -> list[str]:
    """The command lines of `audit` and `inspect` for one run with plans; none without such a run.

    Of several runs it is the first one on the data with the most mismatched captions, where most is to be seen.

    Args:
        study: says which losses make plans, and how many captions of the data are mismatched.
        runs: of the study.
        finished: names of the runs that have results.
    """
    with_plans = {loss.name for loss in study.losses if loss.loss == "otco"}
    share = {setting.name: mismatch(setting) or 0.0 for setting in study.data}
    shown = [run for run in runs if run.name in finished and run.loss in with_plans and run.checkpoint.is_file()]
    for run in sorted(shown, key=lambda run: -share[run.data]):
        data = _shards(run)
        if data is not None:
            audit = ["audit", "--checkpoint", str(run.checkpoint), "--data", data, "--out", str(run.folder / "audit")]
            return [shlex.join([_program(), *words]) for words in (audit, ["inspect", str(run.folder)])]
    return []


def _shards(run: Run) -> str | None:
    """The training shards of `run`; None where it trains on CSV files or synthetic data."""
    if "--train-data" not in run.flags:
        return None
    data = shards.in_folder(run.flags[run.flags.index("--train-data") + 1], run.out)
    return data if data.endswith(".tar") else None


def _program() -> str:
    """How to call this environment's `openclip-otco`: by its name where the shell finds it, else by its path."""
    here = Path(sys.executable).with_name("openclip-otco")
    found = shutil.which(here.name)
    if not here.is_file() or (found is not None and Path(found).resolve() == here.resolve()):
        return here.name
    return str(here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else here)
