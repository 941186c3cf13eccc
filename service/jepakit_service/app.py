"""`jepakit serve`: what has to be right before anything starts, then Ray Serve or this one process."""

from __future__ import annotations

import errno
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from jepakit.errors import ConfigError
from jepakit.runtime import check_provider
from jepakit_service import keys, tracing
from jepakit_service.logs import say
from jepakit_service.models import find_bundles
from jepakit_service.settings import ServeSettings

_START_TIMEOUT_S = 300.0
_WHY_NOT = {
    errno.EADDRINUSE: "another program has it; choose another --port",
    errno.EADDRNOTAVAIL: "this machine has no such address; --host 0.0.0.0 means all of its own",
    errno.EACCES: "it takes a privilege; choose a --port of 1024 or more",
}


def run(settings: ServeSettings) -> None:
    """Serve until SIGINT or SIGTERM; requests in flight are answered first. Raises what makes starting impossible."""
    check_provider(settings.provider, settings.arithmetic)
    bundles = find_bundles(settings)
    for bundle in bundles:
        bundle.verify()
    if settings.api_key_file is not None:
        keys.check(Path(settings.api_key_file))
    tracing.wanted()
    check_port_is_free(settings)
    for bundle in bundles:
        say(f"{bundle.manifest.name}  model_id {bundle.manifest.model_id}  digest {bundle.digest}")
    if settings.api_key_file is None:
        say("no API key file: any user of this machine can embed")
    if settings.ray:
        from jepakit_service import ray_app

        ray_app.run(settings)
    else:
        from jepakit_service import single

        single.run(settings)


def announce_when_ready(settings: ServeSettings, stopping: Callable[[], bool]) -> bool:
    """Wait for our own readiness, which is true only after the golden check, then say where the service is."""
    import httpx

    url = own_url(settings)
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and not stopping():
        try:
            if httpx.get(f"{url}/readyz", timeout=5, trust_env=False).status_code == 200:
                say(f"ready: {url}")
                return True
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    if not stopping():
        say(f"not ready after {_START_TIMEOUT_S:.0f} s", sys.stderr)
    return False


def own_url(settings: ServeSettings) -> str:
    """Where this machine itself reaches the service."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    return f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"


def check_port_is_free(settings: ServeSettings) -> None:
    """Raise ConfigError, which says why, where the service could not listen."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((settings.host, settings.port))
    except (socket.gaierror, UnicodeError):
        raise ConfigError(
            f"cannot listen on {settings.host!r}: it is no address, nor a name that this machine knows"
        ) from None
    except OSError as error:
        why = _WHY_NOT.get(error.errno or 0, error.strerror)
        raise ConfigError(f"cannot listen on {settings.host}, port {settings.port}: {why}") from None
