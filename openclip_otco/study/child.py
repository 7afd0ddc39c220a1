"""Child processes: their output is read line by line, and they are stopped with all that they started."""

import asyncio
import codecs
import contextlib
import io
import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_SECONDS_TO_STOP = 10


@dataclass(frozen=True)
class Launcher:
    """Starts child processes.

    Args:
        environment: variables of the children, added to those of this process.
        keep: file descriptors that stay open in the children.
    """

    environment: Mapping[str, str] = field(default_factory=dict)
    keep: tuple[int, ...] = ()

    async def run(self, command: Sequence[str], output: Path, watch: Callable[[str], None]) -> int:
        """Run `command` to its end, and return its exit code.

        A cancellation or an exception of `watch` stops the child with all that it started, and is raised again.

        Args:
            command: the program and its arguments.
            output: file that keeps the output.
            watch: is called with each line of the output.
        """
        child = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **self.environment},
            pass_fds=self.keep,
            # Its own process group: Ctrl-C reaches this process alone, which then stops loader workers as well.
            start_new_session=True,
        )
        try:
            assert child.stdout is not None
            with open(output, "w", encoding="utf-8", buffering=1) as file:
                async for line in _lines(child.stdout):
                    file.write(line)
                    watch(line)
            return await child.wait()
        except BaseException:
            await _stop(child)
            raise


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Lines of any length. A line ends with a line feed or, as in progress bars, with a carriage return."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(errors="replace"), translate=True)
    rest = ""
    while chunk := await stream.read(2**16):
        *lines, rest = (rest + decoder.decode(chunk)).split("\n")
        for line in lines:
            yield f"{line}\n"
    if rest := rest + decoder.decode(b"", final=True):
        yield rest


async def _stop(child: asyncio.subprocess.Process) -> None:
    try:
        _signal(child, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            # Not wait(), which never returns while a full pipe of unread output blocks the child.
            await asyncio.wait_for(child.communicate(), _SECONDS_TO_STOP)
    finally:
        # For processes that ignored SIGTERM, and for those that the child left behind.
        _signal(child, signal.SIGKILL)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(child.communicate(), _SECONDS_TO_STOP)


def _signal(child: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)
