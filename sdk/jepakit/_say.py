"""What a user is told. Lines on standard error may be lost, and the work goes on; a result on standard output may not."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, TextIO

from jepakit._files import reason_of
from jepakit.errors import WriteError


def say(text: str, *, end: str = "\n") -> None:
    """Print to standard error; where that is closed, full, or read by nobody, the text is lost."""
    if (stream := standard_error()) is not None:
        print(text, file=stream, end=end, flush=True)


def show(result: object, *, end: str = "\n") -> None:
    """Print to standard output; WriteError if it does not take the text, except for a closed pipe's BrokenPipeError."""
    with _taking():
        print(result, end=end)


def flush_shown() -> None:
    """Have everything that was shown written out, or raise as `show` does."""
    with _taking():
        if sys.stdout is not None:
            sys.stdout.flush()


@contextmanager
def _taking() -> Iterator[None]:
    """A block that prints to standard output, and raises as `show` does."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise WriteError(
            f"the result could not be printed ({reason_of(error)}), though the work before it is done: make room where "
            "standard output goes, or send it elsewhere"
        ) from error


def standard_error() -> Any:
    """Standard error as a file whose writes never fail; None if it was closed before the program began."""
    return None if sys.stderr is None else _Unfailing(sys.stderr)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether standard output or error is a terminal; None if it was closed before the program began."""
    try:
        return stream is not None and stream.isatty()
    except (ValueError, AttributeError):  # closed by the program, or its own object that can only write
        return False


class _Unfailing:
    """A stream whose `write` and `flush` pass over a full disk, a closed pipe, a closed file, and a missing `flush`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except Exception:  # also those of a notebook's stream
            _end_in_peace()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except Exception:
            _end_in_peace()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@cache
def _end_in_peace() -> None:
    """At exit, drop what still cannot be written: Python would try once more, and turn the exit code into 120."""
    atexit.register(lambda: drop_unwritten(sys.stderr))


def drop_unwritten(stream: TextIO | None) -> None:
    """Flush a stream of this process, into nothing if it cannot be written."""
    if stream is None:
        return
    try:
        stream.flush()
    except OSError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except (ValueError, AttributeError):  # closed, or an object without `flush`
        return
