"""`openclip-otco compare`: does all runs of a study, and writes its results, table and pictures."""

import argparse
import contextlib
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from openclip_otco.errors import UserError
from openclip_otco.runs.arguments import positive
from openclip_otco.study import look, results, shards
from openclip_otco.study.jobs import run_all, stop_signals
from openclip_otco.study.lock import locked
from openclip_otco.study.results import Result
from openclip_otco.study.run import OPEN_CLIP, Run, run_names, runs
from openclip_otco.study.study import Study
from openclip_otco.study.study_file import load, shipped_studies

OK, FAILED, STOPPED = 0, 1, 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `compare` to `parser`."""
    parser.add_argument(
        "study", metavar="STUDY", help=f"a study file, or a study of the package: {', '.join(shipped_studies())}"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="output folder (default: runs/NAME of the study)")
    parser.add_argument(
        "--jobs",
        type=positive,
        default=1,
        metavar="N",
        help="runs at once, which share the cores unless OMP_NUM_THREADS is set (default: 1)",
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--table-only", action="store_true", help="rebuild table and pictures from the kept results")
    only.add_argument("--dry-run", action="store_true", help="print the commands and run nothing")


def run(args: argparse.Namespace, trainer: Sequence[str] = OPEN_CLIP) -> int:
    """Do what `args` ask for; `trainer` is what Python runs as the training script.

    Returns:
        The exit code: 0, 1 if a run failed, 130 if stopped by Ctrl-C.

    Raises:
        UserError: the study or the output folder cannot be used.
    """
    study = load(args.study)
    out = args.out or Path("runs") / study.name
    try:
        if args.dry_run:
            print("\n".join(commands(study, out, trainer)))
            return OK
        if args.table_only:
            found = results.read_named(out / "results.jsonl", run_names(study))
            if warning := _warning_of_other_flags(study, out, found):
                print(warning, file=sys.stderr)
            report(study, out, found)
            return OK
        if study.needs_patch and trainer == OPEN_CLIP:
            check_patched(study)
        with _stopped_by_signals():
            return compare(study, out, trainer, args.jobs)
    except OSError as error:
        raise UserError(f"--out {out}: {error}; make it writable, free space, or name another folder") from error
    except KeyboardInterrupt:
        print("openclip-otco compare: stopped; finished runs are kept; run it again to go on", file=sys.stderr)
        return STOPPED


def check_patched(study: Study) -> None:
    """Make sure that the training script knows `--loss`.

    Unpatched, it takes `--loss otco` for an abbreviation of `--loss-dist-impl otco` and silently trains CLIP.

    Raises:
        UserError: it is not patched; the message is that of `openclip-otco patch --status`.
    """
    status = subprocess.run(
        [sys.executable, "-m", "openclip_otco.cli", "patch", "--status"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if status.returncode:
        raise UserError(
            f"{study.source}: its losses need a patched OpenCLIP (`openclip-otco patch`): {status.stdout.strip()}"
        )


def compare(study: Study, out: Path, trainer: Sequence[str] = OPEN_CLIP, jobs: int = 1) -> int:
    """Run what is not finished of `study`, `jobs` runs at once, then report.

    Args:
        study: the study; its finished runs are kept as they are.
        out: folder of its data, runs and results.
        trainer: what Python runs as the training script.
        jobs: how many runs at once.

    Returns:
        1 if a run failed, else 0.

    Raises:
        UserError: scenes cannot be made, or another process is at work in the folder.
        KeyboardInterrupt: a signal stopped it. All processes that it started are stopped as well.
    """
    out.mkdir(parents=True, exist_ok=True)
    with locked(out) as lock:
        for setting in study.data:
            shards.make(setting, out)
        cross = runs(study, out)
        kept = {each.name: result for each in cross if (result := each.finished()) is not None}
        to_do = [each for each in cross if each.name not in kept]
        if kept:
            results.write(out / "results.jsonl", kept.values())
            print(f"{len(kept)} of {len(cross)} runs are finished and kept", file=sys.stderr)
            if warning := _warning_of_other_versions(kept.values()):
                print(warning, file=sys.stderr)

        def keep(finished: Run, result: Result) -> None:
            kept[finished.name] = result
            # In the study's order, whatever the order in which the runs end.
            results.write(out / "results.jsonl", [kept[each.name] for each in cross if each.name in kept])

        failed = run_all(to_do, keep, trainer, jobs, lock)
        if kept:
            report(study, out, list(kept.values()))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return FAILED if failed else OK


def report(study: Study, out: Path, found: Sequence[Result]) -> None:
    """Write the table and the pictures of the results `found` into `out`; print the table, and where they are.

    Raises:
        UserError: there are no results.
    """
    if not found:
        raise UserError(f"{out / 'results.jsonl'}: has no results of study {study.name}")
    # Not at the top: they load scipy and matplotlib, which `--help` and `--dry-run` do without.
    from openclip_otco.study import figure, table

    page = table.markdown(study, found, f"openclip-otco compare {_portable(study.source)}")
    results.write_text(out / "table.md", page)
    pictures = figure.draw(study, found, out)
    print(page)
    for path in (out / "table.md", *pictures):
        print(path)
    if pages := look.commands(study, runs(study, out), {result.run for result in found}):
        print("\nTo look at a run's plans and data, on two pages:", *pages, sep="\n")


def commands(study: Study, out: Path, trainer: Sequence[str] = OPEN_CLIP) -> list[str]:
    """All command lines of `study`, also those of finished runs; those that make scenes come first."""
    scenes = [shards.scenes_command(data, out / "data" / data.name) for data in study.data if data.scenes is not None]
    return [shlex.join(command) for command in (*scenes, *(each.command(trainer) for each in runs(study, out)))]


def _warning_of_other_versions(kept: Iterable[Result]) -> str | None:
    """A line that names the runs that other versions than the present ones have made; None without such runs."""
    now = results.versions()
    other = {result.run: changed for result in kept if (changed := result.versions.items() - now.items())}
    if not other:
        return None
    then = sorted(set().union(*other.values()))
    which = ", ".join(f"{package} {number} (now {now.get(package, 'none')})" for package, number in then)
    return f"warning: {len(other)} of the kept runs were made with {which}: {', '.join(other)}"


def _warning_of_other_flags(study: Study, out: Path, found: Iterable[Result]) -> str | None:
    """A line that names the results made with other flags than the study has now; None without such results."""
    now = {each.name: each for each in runs(study, out)}
    other = [
        each.run for each in found if (each.flags, each.scenes) != (list(now[each.run].flags), now[each.run].scenes)
    ]
    if not other:
        return None
    return f"warning: {len(other)} of the results have other flags than {study.source}: {', '.join(other)}"


def _portable(source: str) -> str:
    """`source` without folders of this machine."""
    path = Path(source)
    return path.name if path.is_absolute() else path.as_posix()


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Let the `stop_signals` stop the command as Ctrl-C does, SIGINT even where a shell had let it be ignored."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
