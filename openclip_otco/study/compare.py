"""`openclip-otco compare`: runs the cross of a study, and writes its results, table and picture."""

import argparse
import contextlib
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from openclip_otco.study import results, shards
from openclip_otco.study.progress import Progress
from openclip_otco.study.results import Result
from openclip_otco.study.run import OPEN_CLIP, Run, RunFailed, run_name, runs
from openclip_otco.study.study import Study, StudyError, load, shipped_studies

OK, FAILED, UNUSABLE, STOPPED = 0, 1, 2, 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `compare` to `parser`."""
    parser.add_argument(
        "study", metavar="STUDY", help=f"a study file, or a study of the package: {', '.join(shipped_studies())}"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="output folder (default: runs/NAME of the study)")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--table-only", action="store_true", help="rebuild table and picture from the kept results")
    only.add_argument("--dry-run", action="store_true", help="print the commands and run nothing")


def run(args: argparse.Namespace, trainer: Sequence[str] = OPEN_CLIP) -> int:
    """Do what `args` ask for; `trainer` is what Python runs as the training script.

    Returns:
        The exit code: 0, 1 if a run failed, 2 for an unusable study, 130 if stopped by Ctrl-C.
    """
    try:
        study = load(args.study)
        out = args.out or Path("runs") / study.name
        if args.dry_run:
            print("\n".join(commands(study, out, trainer)))
            return OK
        if args.table_only:
            report(study, out, _of_study(study, results.read(out / "results.jsonl")))
            return OK
        if study.needs_patch and trainer == OPEN_CLIP:
            check_patched(study)
        with _stopped_by_signals():
            return compare(study, out, trainer)
    except StudyError as error:
        print(f"openclip-otco compare: {error}", file=sys.stderr)
        return UNUSABLE
    except KeyboardInterrupt:
        print("openclip-otco compare: stopped; finished runs are kept, the same command goes on", file=sys.stderr)
        return STOPPED


def check_patched(study: Study) -> None:
    """Make sure that the training script knows `--loss`.

    Unpatched, it takes `--loss otco` for an abbreviation of `--loss-dist-impl otco` and silently trains CLIP.

    Raises:
        StudyError: it is not patched; the message is that of `openclip-otco patch --status`.
    """
    status = subprocess.run(
        [sys.executable, "-m", "openclip_otco.cli", "patch", "--status"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if status.returncode:
        raise StudyError(
            f"{study.source}: its losses need a patched OpenCLIP (`openclip-otco patch`): {status.stdout.strip()}"
        )


def compare(study: Study, out: Path, trainer: Sequence[str] = OPEN_CLIP) -> int:
    """Run what is not finished of `study` in the folder `out`, then report; 1 if a run failed, else 0.

    Raises:
        StudyError: scenes cannot be made.
    """
    out.mkdir(parents=True, exist_ok=True)
    for setting in study.data:
        shards.make(setting, out)
    cross = runs(study, out)
    kept = {each.name: result for each in cross if (result := each.finished()) is not None}
    to_do = [each for each in cross if each.name not in kept]
    if kept:
        results.write(out / "results.jsonl", kept.values())
        print(f"{len(kept)} of {len(cross)} runs are finished and kept", file=sys.stderr)
    failed = _run_all(to_do, cross, kept, out, trainer)
    if kept:
        report(study, out, list(kept.values()))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return FAILED if failed else OK


def report(study: Study, out: Path, found: Sequence[Result]) -> None:
    """Write table and picture of `found` into `out`, and print the table and where they are.

    Raises:
        StudyError: there are no results.
    """
    if not found:
        raise StudyError(f"{out / 'results.jsonl'}: has no results of study {study.name}")
    # Not at the top: they load scipy and matplotlib, which `--help` and `--dry-run` do without.
    from openclip_otco.study import figure, table

    page = table.markdown(study, found, f"openclip-otco compare {_portable(study.source)}")
    results.write_text(out / "table.md", page)
    pictures = figure.draw(study, found, out / "rsum")
    print(page)
    for path in (out / "table.md", *pictures):
        print(path)


def commands(study: Study, out: Path, trainer: Sequence[str] = OPEN_CLIP) -> list[str]:
    """The command lines that `study` would run, finished or not: those that make scenes first."""
    scenes = [shards.scenes_command(data, out / "data" / data.name) for data in study.data if data.scenes is not None]
    return [shlex.join(command) for command in (*scenes, *(each.command(trainer) for each in runs(study, out)))]


def _run_all(
    to_do: Sequence[Run], cross: Sequence[Run], kept: dict[str, Result], out: Path, trainer: Sequence[str]
) -> list[str]:
    """Run `to_do`, adding to `kept` and to the file of results after each; the names of the runs that failed."""
    if not to_do:
        return []
    failed = []
    progress = Progress(to_do)
    with contextlib.closing(progress):
        for each in to_do:
            progress.start(each)
            try:
                result = each.execute(progress.watch, trainer)
            except RunFailed as error:
                failed.append(each.name)
                tail = "\n".join(f"  {line}" for line in error.tail)
                progress.end(f"{each.name} failed: {error}; its output ends with\n{tail}")
                continue
            kept[each.name] = result
            # The order of the study, whatever the order in which runs got finished.
            results.write(out / "results.jsonl", [kept[each.name] for each in cross if each.name in kept])
            progress.end(f"{each.name}: rsum {result.rsum_last:.1f}, best {result.rsum_best:.1f}")
    return failed


def _of_study(study: Study, found: Sequence[Result]) -> list[Result]:
    names = {run_name(d.name, loss.name, seed) for d in study.data for loss in study.losses for seed in study.seeds}
    return [result for result in found if result.run in names]


def _portable(source: str) -> str:
    """`source` as it may be printed: no folders of this machine."""
    path = Path(source)
    return path.name if path.is_absolute() else path.as_posix()


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Let SIGTERM stop the command as Ctrl-C does, and SIGINT too where a shell had it ignored."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
