"""Work in separate processes: a function called once (`isolated`), or a script asked for one block after another (`Script`)."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, Self


class EndedError(Exception):
    """A process ended without an answer, or was ended because it took too long."""


def isolated(work: Callable[..., Any], *arguments: Any, preload: Sequence[str], timeout_s: float | None = None) -> Any:
    """What `work` returns in its own process with one thread. Raises EndedError.

    Forked from a server that has imported the modules `preload` and computed nothing: saves seconds of imports each.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, work, arguments))
    process.start()
    sender.close()
    try:
        if receiver.poll(timeout_s):
            return receiver.recv()
        process.kill()
        raise EndedError(f"no answer within {timeout_s:g} s")
    except EOFError:
        process.join()
        raise EndedError(f"its process died, exit code {process.exitcode}") from None
    finally:
        process.join()
        process.close()
        receiver.close()


def _send(sender: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch  # here, as those that only ask scripts do without it

    torch.set_num_threads(1)
    sender.send(work(*arguments))


class Script:
    """A command that answers each line of its input with a line of JSON; killed at the end of the block.

    options  of subprocess.Popen
    """

    def __init__(self, command: Sequence[object], **options: Any) -> None:
        self._process = subprocess.Popen(
            [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def asked(self, line: str = "run") -> Any:
        """Send the line and wait for its answer. Raises EndedError."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise EndedError("it ended early") from None
        return self.answer()

    def answer(self) -> Any:
        """Wait for an answer, such as the one that says that the script has started. Raises EndedError."""
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise EndedError("it ended early")
        return json.loads(line)
