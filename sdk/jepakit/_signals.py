"""Temporary signal handlers."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def handled(
    numbers: Iterable[signal.Signals], handler: Callable[[int, Any], object] | signal.Handlers
) -> Iterator[None]:
    """While the block runs, `handler` handles these signals; what handled them before does so again afterwards.

    Only the main thread can handle signals, so elsewhere this does nothing. A handler that is not Python's, as of an
    application that embeds it, could not be put back, and stays.
    """
    ours = numbers if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, handler) for number in ours if signal.getsignal(number) is not None}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)
