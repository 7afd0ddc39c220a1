"""Child processes: their output line by line, and an end to all that they started."""

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
    """Starts children with `environment` beside this process's own, and leaves the descriptors `keep` open in them."""

    environment: Mapping[str, str] = field(default_factory=dict)
    keep: tuple[int, ...] = ()

    async def run(self, command: Sequence[str], output: Path, watch: Callable[[str], None]) -> int:
        """Run `command`, with each line of its output handed to `watch` and kept in the file `output`; its exit code.

        A cancellation, or an exception out of `watch`, stops the child with all that it started, and goes on up.
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
    """Lines of any length, ended by a line feed or, as progress bars do it, by a carriage return."""
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
            # And not wait(): with output that nobody reads, that may never come back.
            await asyncio.wait_for(child.communicate(), _SECONDS_TO_STOP)
    finally:
        # To what did not listen, and to what the child itself left behind.
        _signal(child, signal.SIGKILL)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(child.communicate(), _SECONDS_TO_STOP)


def _signal(child: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)
