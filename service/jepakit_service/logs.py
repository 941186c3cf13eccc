"""The service's log lines: text or JSON, on standard error of the process that was started.

Under Ray the replicas are processes of their own, whose standard error goes to Ray's files: they send their lines to
the driver through a Unix datagram socket, so that an operator sees one stream.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import socket
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from jepakit_service.settings import ServeSettings

LOGGER = "jepakit"
_LOGGERS = (LOGGER, "uvicorn")
_LONGEST_LINE = 1 << 16


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


class _ToDriver(logging.handlers.DatagramHandler):
    """Lines, not pickles, to the driver's socket; a driver that has gone loses them."""

    def __init__(self, path: str) -> None:
        super().__init__(path, None)

    def makePickle(self, record: logging.LogRecord) -> bytes:  # noqa: N802 (the base class's name)
        return self.format(record).encode()[:_LONGEST_LINE]

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        pass


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


Level = Literal["all", "errors", "none"]


def access(level: Level, *, status: int, fields: dict[str, object]) -> None:
    """One line for an answered request, where the setting wants it."""
    if level == "none" or (level == "errors" and status < 400):
        return
    logging.getLogger(f"{LOGGER}.access").info("request", extra={"fields": fields})
