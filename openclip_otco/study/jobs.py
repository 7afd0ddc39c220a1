"""The runs of a study at work, several at once."""

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence

from openclip_otco.study.child import Launcher
from openclip_otco.study.progress import Progress
from openclip_otco.study.results import Result
from openclip_otco.study.run import Run, RunFailed

# Takes a run that has finished, and its result.
Keep = Callable[[Run, Result], None]


def run_all(to_do: Sequence[Run], keep: Keep, trainer: Sequence[str], jobs: int, lock: int) -> list[str]:
    """Train and evaluate the runs `to_do`, with a line for each and a bar for all of them.

    Args:
        to_do: the runs, in the order in which they start.
        keep: is called as soon as a run has finished.
        trainer: what Python runs as the training script.
        jobs: how many runs are at work at once.
        lock: descriptor of the lock on the study's folder.

    Returns:
        The names of the runs that failed.

    Raises:
        KeyboardInterrupt: a signal came. The runs at work are stopped, with all that they started.
    """
    if not to_do:
        return []
    # Descendants hold the lock too, so that a training which outlives a killed command keeps its folder.
    launcher = Launcher(_threads(jobs), keep=(lock,))
    with contextlib.closing(Progress(to_do)) as progress:
        work = _Work(keep, trainer, launcher, progress)
        try:
            asyncio.run(work.all(to_do, jobs))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
    return work.failed


class _Work:
    """Executes runs, shows their progress, and remembers in `failed` which of them failed."""

    def __init__(self, keep: Keep, trainer: Sequence[str], launcher: Launcher, progress: Progress) -> None:
        self.keep, self.trainer, self.launcher, self.progress = keep, trainer, launcher, progress
        self.failed: list[str] = []

    async def all(self, to_do: Sequence[Run], jobs: int) -> None:
        turns = asyncio.Semaphore(jobs)
        with _cancelled_by_signals():
            # A group, and not gather(): it ends when the last run is stopped, and not the first.
            async with asyncio.TaskGroup() as group:
                for run in to_do:
                    group.create_task(self._one(run, turns))

    async def _one(self, run: Run, turns: asyncio.Semaphore) -> None:
        async with turns:
            self.progress.start(run)
            try:
                result = await run.execute(lambda line: self.progress.watch(run, line), self.trainer, self.launcher)
                self.keep(run, result)
            except RunFailed as error:
                self.failed.append(run.name)
                tail = "\n".join(f"  {line}" for line in error.tail)
                self.progress.end(run, f"{run.name} failed: {error}; its output ends with\n{tail}")
                return
            except OSError as error:  # a full disk must not stop the other runs
                self.failed.append(run.name)
                self.progress.end(run, f"{run.name} failed: {error}")
                return
        self.progress.end(run, f"{run.name}: rsum {result.rsum_last:.1f}, best {result.rsum_best:.1f}")


def stop_signals() -> list[signal.Signals]:
    """The signals that stop a command and its runs: Ctrl-C, `kill`, and, without `nohup`, the end of the terminal."""
    ignores_hangup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *(() if ignores_hangup else (signal.SIGHUP,))]


def _threads(jobs: int) -> dict[str, str]:
    """The environment that shares out the cores among `jobs` runs; each would otherwise use all of them."""
    if jobs == 1 or "OMP_NUM_THREADS" in os.environ:
        return {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(1, cores // jobs))}


@contextlib.contextmanager
def _cancelled_by_signals() -> Iterator[None]:
    """Let the `stop_signals` cancel the present task. An exception in the midst of the loop would leave it broken."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in stop_signals()}
    for number in before:
        loop.add_signal_handler(number, task.cancel)
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
