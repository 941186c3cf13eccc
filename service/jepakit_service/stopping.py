"""The signals that stop the service."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

_STOP = (signal.SIGINT, signal.SIGTERM)


def on_stop(handler: Callable[[int, Any], object] | signal.Handlers) -> None:
    """Let `handler` handle SIGINT, SIGTERM and SIGHUP from now on. An ignored SIGHUP stays ignored, as nohup needs."""
    hangs_up = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    for number in (*_STOP, signal.SIGHUP) if hangs_up else _STOP:
        signal.signal(number, handler)
