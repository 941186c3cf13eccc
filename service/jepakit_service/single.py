"""The application in this process alone, on uvicorn: `jepakit serve --no-ray`."""

from __future__ import annotations

import contextlib
import math
import threading
from typing import Any

import uvicorn

from jepakit.errors import ServeError
from jepakit_service.connection import Connection
from jepakit_service.http.api import build_app
from jepakit_service.http.gate import Gate
from jepakit_service.listeners import announce_when_ready
from jepakit_service.settings import ServeSettings
from jepakit_service.stopping import on_stop
from jepakit_service.telemetry import logs

_KEEP_ALIVE_S = 90
"""As in Ray Serve, and longer than nginx keeps a connection idle: closing one that nginx is using costs a request."""


class _Server(uvicorn.Server):
    def capture_signals(self) -> Any:
        """Leave the signals to us: uvicorn raises them again after its shutdown, so a clean stop would look like a kill."""
        return contextlib.nullcontext()


def config(gate: Gate, settings: ServeSettings) -> uvicorn.Config:
    """uvicorn's settings. Its errors go to our log; its warnings, which any client can cause, are not logged."""
    return uvicorn.Config(
        gate,
        host=settings.host,
        port=settings.port,
        http=Connection,
        ws="none",
        log_config=None,
        log_level="error",
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=math.ceil(settings.drain_s),
        timeout_keep_alive=_KEEP_ALIVE_S,
        server_header=False,
        proxy_headers=False,
    )


def run(settings: ServeSettings) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP, then answer what is in flight. Raises ServeError if the port is no longer free."""
    logs.configure(settings)
    gate = build_app(settings)
    server = _Server(config(gate, settings))

    def stop(*_: object) -> None:
        gate.drain()
        server.should_exit = True  # uvicorn then waits for the requests in flight

    def announce() -> None:
        announce_when_ready(settings, lambda: server.should_exit)

    on_stop(stop)
    threading.Thread(target=announce, daemon=True).start()
    try:
        server.run()
    except SystemExit:  # from uvicorn, if it cannot listen: the port was free before the models were loaded
        raise ServeError(
            f"cannot listen on {settings.host}, port {settings.port}: another program has taken it while the models were loaded"
        ) from None
