"""Output for the user. Lines on standard error may be lost, and the work goes on; results on standard output may not."""

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
    """Print to standard output; raises BrokenPipeError for a closed pipe, WriteError for any other failure to write."""
    with _taking():
        print(result, end=end)


def flush_shown() -> None:
    """Flush standard output; raises as `show` does."""
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
    """Whether a standard stream is a terminal; False for None, which Python sets if it was closed before the program began."""
    try:
        return stream is not None and stream.isatty()
    except (ValueError, AttributeError):  # closed by the program, or its own object that can only write
        return False


class _Unfailing:
    """A stream whose `write` and `flush` ignore all errors: a full disk, a closed pipe or file, a missing `flush`."""

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
    """At exit, drop what still cannot be written: otherwise Python tries once more, fails, and exits with code 120."""
    atexit.register(lambda: drop_unwritten(sys.stderr))


def drop_unwritten(stream: TextIO | None) -> None:
    """Flush a standard stream; if it cannot be written, drop its text."""
    if stream is None:
        return
    try:
        stream.flush()
    except OSError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except (ValueError, AttributeError):  # closed, or an object without `flush`
        return
