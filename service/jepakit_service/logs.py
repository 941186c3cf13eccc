"""The service's log lines: text or JSON, on standard error of the process that was started.

Under Ray the replicas are processes of their own, whose standard error goes to Ray's files: they send their lines to
the driver through a Unix datagram socket, so that an operator sees one stream.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import socket
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

from jepakit_service.settings import AccessLog, ServeSettings

LOGGER = "jepakit"
_LOGGERS = (LOGGER, "uvicorn")
_LONGEST_LINE = 1 << 16
_MOST_WAITING, _LAST_LINES_S = 4096, 1.0


def configure(settings: ServeSettings, send_to: str | None = None) -> None:
    """Log to standard error, or to the driver's socket `send_to`."""
    handler: logging.Handler = logging.StreamHandler(sys.stderr) if send_to is None else _ToDriver(send_to)
    handler.setFormatter(_Json() if settings.log_format == "json" else _Text())
    silence()
    for logger in map(logging.getLogger, _LOGGERS):
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    # It warns of every damaged form, which any client can send as often as it likes.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)


def silence() -> None:
    """Log nowhere any more."""
    for logger in map(logging.getLogger, _LOGGERS):
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()


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
    """What was logged beside the message; of an exception its kind alone, since its text may hold what was sent."""
    fields: dict[str, object] = getattr(record, "fields", {})
    kind = record.exc_info[0] if record.exc_info else None
    return fields if kind is None else {**fields, "exception": kind.__name__}


class _ToDriver(logging.Handler):
    """Lines to the driver's socket, sent by a thread of its own: whoever logs never waits for who reads.

    A Unix datagram socket holds as few as ten lines. A burst waits here; what waits beyond `_MOST_WAITING` lines is
    lost, and so is what a driver that has gone should have read.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path
        self._lines: queue.Queue[bytes | None] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._send, name="logs", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        # Of whatever kind the error is: logging's own way is a traceback on standard error, with the line's contents.
        with contextlib.suppress(Exception):
            self._lines.put_nowait(self.format(record).encode()[:_LONGEST_LINE])

    def close(self) -> None:
        """Let the lines that wait be sent, for two seconds at most."""
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=_LAST_LINES_S)
            self._thread.join(_LAST_LINES_S)
        super().close()

    def _send(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as to:
            while (line := self._lines.get()) is not None:
                with contextlib.suppress(OSError):
                    to.sendto(line, self._path)


class Collector:
    """The driver's end: prints what replicas send until closed."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        threading.Thread(target=self._print, name="logs", daemon=True).start()

    def _print(self) -> None:
        while True:
            try:
                line = self._socket.recv(_LONGEST_LINE)
            except OSError:
                return
            print(line.decode("utf-8", "replace"), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()


def access(level: AccessLog, *, status: int, fields: dict[str, object]) -> None:
    """One line for an answered request, where the setting wants it."""
    if level == "none" or (level == "errors" and status < 400):
        return
    logging.getLogger(f"{LOGGER}.access").info("request", extra={"fields": fields})
