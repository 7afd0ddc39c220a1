"""`openclip-otco compare`: runs the cross of a study, and writes its results, table and pictures."""

import argparse
import asyncio
import contextlib
import os
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
from openclip_otco.study.child import Launcher
from openclip_otco.study.lock import locked
from openclip_otco.study.progress import Progress
from openclip_otco.study.results import Result
from openclip_otco.study.run import OPEN_CLIP, Run, RunFailed, run_name, runs
from openclip_otco.study.study import Study, load, shipped_studies

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
        UserError: the study cannot be used.
    """
    try:
        study = load(args.study)
        out = args.out or Path("runs") / study.name
        if args.dry_run:
            print("\n".join(commands(study, out, trainer)))
            return OK
        if args.table_only:
            report(study, out, _of_study(study, out / "results.jsonl"))
            return OK
        if study.needs_patch and trainer == OPEN_CLIP:
            check_patched(study)
        with _stopped_by_signals():
            return compare(study, out, trainer, args.jobs)
    except KeyboardInterrupt:
        print("openclip-otco compare: stopped; finished runs are kept, the same command goes on", file=sys.stderr)
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
    """Run what is not finished of `study` in the folder `out`, `jobs` at once, then report; 1 if a run failed, else 0.

    Raises:
        UserError: scenes cannot be made, or another process is at work in the folder.
        KeyboardInterrupt: a signal stopped it; all that it had started is stopped as well.
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
            if older := _of_other_versions(kept.values()):
                print(older, file=sys.stderr)
        failed = _run_all(to_do, cross, kept, out, trainer, jobs, lock)
        if kept:
            report(study, out, list(kept.values()))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return FAILED if failed else OK


def report(study: Study, out: Path, found: Sequence[Result]) -> None:
    """Write table and pictures of `found` into `out`, and print the table and where they are.

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
        print("\nSee what the plans see, on two pages:", *pages, sep="\n")


def commands(study: Study, out: Path, trainer: Sequence[str] = OPEN_CLIP) -> list[str]:
    """The command lines that `study` would run, finished or not: those that make scenes first."""
    scenes = [shards.scenes_command(data, out / "data" / data.name) for data in study.data if data.scenes is not None]
    return [shlex.join(command) for command in (*scenes, *(each.command(trainer) for each in runs(study, out)))]


def _run_all(
    to_do: Sequence[Run],
    cross: Sequence[Run],
    kept: dict[str, Result],
    out: Path,
    trainer: Sequence[str],
    jobs: int,
    lock: int,
) -> list[str]:
    """Run `to_do`, adding to `kept` and to the file of results after each; the names of the runs that failed."""
    if not to_do:
        return []
    failed: list[str] = []
    # Descendants hold the lock too, so that a training which outlives a killed command keeps its folder.
    launcher = Launcher(_threads(jobs), keep=(lock,))
    turns = asyncio.Semaphore(jobs)

    async def one(each: Run) -> None:
        async with turns:
            progress.start(each)
            try:
                result = await each.execute(lambda line: progress.watch(each, line), trainer, launcher)
            except RunFailed as error:
                failed.append(each.name)
                tail = "\n".join(f"  {line}" for line in error.tail)
                progress.end(each, f"{each.name} failed: {error}; its output ends with\n{tail}")
                return
        kept[each.name] = result
        # The order of the study, whatever the order in which runs got finished.
        results.write(out / "results.jsonl", [kept[each.name] for each in cross if each.name in kept])
        progress.end(each, f"{each.name}: rsum {result.rsum_last:.1f}, best {result.rsum_best:.1f}")

    async def all_of_them() -> None:
        with _cancelled_by_signals():
            # A group, and not gather(): it ends when the last run is stopped, and not the first.
            async with asyncio.TaskGroup() as group:
                for each in to_do:
                    group.create_task(one(each))

    with contextlib.closing(Progress(to_do)) as progress:
        try:
            asyncio.run(all_of_them())
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
    return failed


def _threads(jobs: int) -> dict[str, str]:
    """The cores shared out among `jobs` runs, which would otherwise take all of them each."""
    if jobs == 1 or "OMP_NUM_THREADS" in os.environ:
        return {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(1, cores // jobs))}


def _of_other_versions(kept: Iterable[Result]) -> str | None:
    """A line that names the runs made by other versions than those of now; None without any."""
    now = results.versions()
    other = {result.run: changed for result in kept if (changed := result.versions.items() - now.items())}
    if not other:
        return None
    then = sorted(set().union(*other.values()))
    which = ", ".join(f"{package} {number} (now {now.get(package, 'none')})" for package, number in then)
    return f"warning: {len(other)} of the kept runs were made with {which}: {', '.join(other)}"


def _of_study(study: Study, path: Path) -> list[Result]:
    """The results in `path` of the runs of `study`, each once: a line that stands there twice is no further seed."""
    names = {run_name(d.name, loss.name, seed) for d in study.data for loss in study.losses for seed in study.seeds}
    found: dict[str, Result] = {}
    for result in results.read(path):
        if result.run in names and found.setdefault(result.run, result) != result:
            raise UserError(f"{path}: has two different lines of {result.run}; remove one")
    return list(found.values())


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


@contextlib.contextmanager
def _cancelled_by_signals() -> Iterator[None]:
    """Let the signals of `_stopped_by_signals` cancel the present task: in the midst of a loop they must not raise."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        loop.add_signal_handler(number, task.cancel)
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
