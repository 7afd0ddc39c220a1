"""Processes that start at once: forks of one process that has loaded what OpenCLIP's training script imports.

A fresh interpreter takes five seconds of a core for these imports, and the suite starts more than sixty. A fork has
the same modules and none of the state of the tests. Nothing of this package or of OpenCLIP's training script is
loaded beforehand, so that each fork finds the copies that its own paths say.

This module imports only what Python itself brings: each fork loads it first, under paths that it changes then.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import resource
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Long enough for a machine that does ten times as much as it can; a test that hangs ends all the same.
PATIENCE = 540
PRELOADED = ["torch", "torch._dynamo", "torch.utils.tensorboard", "torchvision", "pandas", "scipy.optimize",
             "scipy.sparse", "open_clip", "timm", "webdataset", "ot", "pytest", "hypothesis",
             "transformers.models.bert.modeling_bert"]  # fmt: skip

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(PRELOADED)


@atexit.register
def _kill_what_is_left() -> None:
    """Before `multiprocessing` waits for it: a run that a failed test left behind must not hold up the end."""
    for process in multiprocessing.active_children():
        process.kill()


class Fork:
    """A Python module that runs as `python -m` would run it, as far as the tests look at it.

    Args:
        module: its name, which is looked up on `PYTHONPATH` of the environment first.
        arguments: of its command line.
        folder: where it runs.
        environment: all of its environment variables.
        output: file that takes what it prints and warns, behind what is there.
        file_size: no file that it writes can grow beyond so many bytes, as on a full disk.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        output: Path,
        file_size: int | None = None,
    ) -> None:
        arguments = (module, list(arguments), str(folder), dict(environment), str(output), file_size)
        self._process = _CONTEXT.Process(target=_run, args=arguments)
        self._process.start()

    def poll(self) -> int | None:
        """Its exit code, `None` while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float = PATIENCE) -> int:
        """Its exit code, once it has ended."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            self.kill()
            raise TimeoutError(f"still running after {timeout} s")
        return code

    def kill(self) -> None:
        self._process.kill()


class Forks:
    """Several that belong together, as the ranks of a training; the exit code is that of the first one that failed."""

    def __init__(self, forks: Sequence[Fork]) -> None:
        self._forks = forks

    def poll(self) -> int | None:
        codes = [fork.poll() for fork in self._forks]
        return None if None in codes else next(filter(None, codes), 0)

    def wait(self, timeout: float = PATIENCE) -> int:
        return next(filter(None, [fork.wait(timeout) for fork in self._forks]), 0)

    def kill(self) -> None:
        for fork in self._forks:
            fork.kill()


def start_ranks(target: Any, world: int, *arguments: Any) -> None:
    """Runs `target(rank, world, *arguments)` in `world` processes; an error in one of them is raised here."""
    import torch.multiprocessing

    torch.multiprocessing.start_processes(target, (world, *arguments), nprocs=world, start_method="forkserver")


def _run(
    module: str,
    arguments: list[str],
    folder: str,
    environment: dict[str, str],
    output: str,
    file_size: int | None,
) -> None:
    # As in a fresh interpreter, for the workers of data loaders.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
