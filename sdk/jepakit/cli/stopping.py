"""How commands react to signals that stop them."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from jepakit._say import say

_ONE_STOP_S = 5.0


@contextmanager
def exiting_when_stopped() -> Iterator[None]:
    """A block of training that Ctrl-C ends with exit code 130; prints `stopped` unless the error says where."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if not str(stop):
            say("stopped")
        raise typer.Exit(130) from None


def exit_on_signals() -> None:
    """Make SIGTERM and SIGHUP raise SystemExit from now on, so that unfinished work is cleaned up as on Ctrl-C.

    Those that follow within seconds of the first of them, or of Ctrl-C, are ignored: terminals, make and npm send several,
    and none may cut the cleaning up short. A signal that is ignored stays ignored, as nohup wants for SIGHUP.
    """
    first = -math.inf

    def stop(number: int, _: object) -> None:
        nonlocal first
        if time.monotonic() - first < _ONE_STOP_S:
            return
        first = time.monotonic()
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)
