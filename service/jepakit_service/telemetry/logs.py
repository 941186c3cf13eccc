"""The service's log lines: text or JSON, on standard error of the process that was started.

Under Ray the replicas are separate processes, whose standard error goes to Ray's files. They send their lines to the
driver through a Unix datagram socket, so that an operator sees one stream.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import select
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TextIO

from jepakit_service.settings import AccessLog, ServeSettings

LOGGER = "jepakit"
_LOGGERS = (LOGGER, "uvicorn")
_LONGEST_LINE = 1 << 16
_MOST_WAITING, _LAST_LINES_S = 4096, 1.0


def configure(settings: ServeSettings, send_to: str | None = None) -> None:
    """Log to standard error, or to the driver's socket `send_to`."""
    handler = _Queued(_to_standard_error if send_to is None else partial(_to_driver, send_to))
    handler.setFormatter(_Json() if settings.log_format == "json" else _Text())
    silence()
    for logger in map(logging.getLogger, _LOGGERS):
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    # It warns of every damaged form, which any client can send as often as it likes.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)


def silence() -> None:
    """Remove and close all handlers of the service's loggers."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for handler in {handler for logger in loggers for handler in logger.handlers}:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()


def announce(text: str, stream: TextIO | None = None) -> None:
    """Print a line to standard output, or to `stream`; it is lost if that is full, closed, or no longer read.

    Whoever started the service may be gone by the time it stops, and requests in flight must not wait for a reader.
    """
    stream = sys.stdout if stream is None else stream
    with contextlib.suppress(OSError):
        if stream is not None and select.select([], [stream], [], 0)[1]:
            _write(stream, text.encode("utf-8", "replace"))


def _write(stream: TextIO | None, line: bytes) -> None:
    """Write a line past Python's own buffer, which would keep what a full disk did not take and fail again at exit."""
    if stream is not None:  # None if closed before the program began
        with contextlib.suppress(OSError):
            os.write(stream.fileno(), line + b"\n")


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{name}={value}" for name, value in _fields(record).items())
        return f"{_time(record)} {record.levelname.lower()} {record.getMessage()} {fields}".rstrip()


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {"time": _time(record), "level": record.levelname.lower(), "message": record.getMessage()}
        return json.dumps({**line, **_fields(record)}, default=str)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _fields(record: logging.LogRecord) -> dict[str, object]:
    """The fields logged with the message; of an exception only the type, since its text may contain what was sent."""
    fields: dict[str, object] = getattr(record, "fields", {})
    kind = record.exc_info[0] if record.exc_info else None
    return fields if kind is None else {**fields, "exception": kind.__name__}


class _Queued(logging.Handler):
    """Hands lines to `send` on a thread of its own, so that logging never waits for a reader.

    A burst is queued here; lines beyond `_MOST_WAITING` are lost.
    """

    def __init__(self, send: Callable[[Iterator[bytes]], None]) -> None:
        super().__init__()
        self._lines: queue.Queue[bytes | None] = queue.Queue(_MOST_WAITING)
        self._ended = False
        self._thread = threading.Thread(target=send, args=(iter(self._lines.get, None),), name="logs", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        # Whatever the error: logging itself would print a traceback on standard error, with the line's contents.
        with contextlib.suppress(Exception):
            self._lines.put_nowait(self.format(record).encode()[:_LONGEST_LINE])

    def close(self) -> None:
        """Send the queued lines, taking two seconds at most; `logging` calls this once more at exit."""
        if not self._ended:
            self._ended = True
            with contextlib.suppress(queue.Full):
                self._lines.put(None, timeout=_LAST_LINES_S)
                self._thread.join(_LAST_LINES_S)
        super().close()


def _to_standard_error(lines: Iterator[bytes]) -> None:
    for line in lines:
        _write(sys.stderr, line)


def _to_driver(path: str, lines: Iterator[bytes]) -> None:
    """Send lines to a Unix datagram socket, which may hold only ten; lines for a driver that is gone are lost."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as driver:
        for line in lines:
            with contextlib.suppress(OSError):
                driver.sendto(line, path)


class Collector:
    """The driver's end: prints what replicas send until closed."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        threading.Thread(target=self._print, name="logs", daemon=True).start()

    def _print(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                line = self._socket.recv(_LONGEST_LINE)
                _write(sys.stderr, line)

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()


def access(level: AccessLog, *, status: int, fields: dict[str, object]) -> None:
    """Log one line for an answered request, if `level` includes it."""
    if level == "none" or (level == "errors" and status < 400):
        return
    urgency = logging.ERROR if status >= 500 else logging.INFO
    logging.getLogger(f"{LOGGER}.access").log(urgency, "request", extra={"fields": fields})
