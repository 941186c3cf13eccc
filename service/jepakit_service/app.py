"""`jepakit serve`: what has to be right before anything starts, then Ray Serve or this one process."""

from __future__ import annotations

import socket
import sys
import threading
import time
from pathlib import Path

from jepakit.bundle import GRAPH
from jepakit.errors import ConfigError
from jepakit_service import keys, logs, tracing
from jepakit_service.models import find_bundles
from jepakit_service.settings import ServeSettings, is_loopback

_START_TIMEOUT_S = 300.0


def run(settings: ServeSettings) -> None:
    """Serve until SIGINT or SIGTERM; requests in flight are answered first. Raises what makes starting impossible."""
    bundles = find_bundles(settings)
    for bundle in bundles:
        bundle.read(GRAPH)
    if settings.api_key_file is not None:
        keys.check(Path(settings.api_key_file))
    tracing.wanted()
    _check_port_is_free(settings)
    logs.configure(settings)
    for bundle in bundles:
        print(f"{bundle.manifest.name}  model_id {bundle.manifest.model_id}  digest {bundle.digest}", flush=True)
    if settings.api_key_file is None:
        print("no API key file: any user of this machine can embed", flush=True)
    if settings.ray:
        from jepakit_service import ray_app

        ray_app.run(settings)
    else:
        from jepakit_service import single

        single.run(settings)


def announce_when_ready(settings: ServeSettings, stopping: threading.Event) -> bool:
    """Wait for our own readiness, which is true only after the golden check, then say where the service is."""
    import httpx

    host = settings.host if is_loopback(settings.host) else "127.0.0.1"
    url = f"http://{host}:{settings.port}"
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and not stopping.is_set():
        try:
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                print(f"ready: {url}", flush=True)
                return True
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    if not stopping.is_set():
        print(f"not ready after {_START_TIMEOUT_S:.0f} s", file=sys.stderr, flush=True)
    return False


def _check_port_is_free(settings: ServeSettings) -> None:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {settings.host}:{settings.port} ({error.strerror}): another program has it; choose another --port"
            ) from None
