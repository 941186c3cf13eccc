"""Where the service listens: whether the port is free, when it is ready, and what other machines could reach."""

from __future__ import annotations

import errno
import os
import resource
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import psutil

from jepakit._loopback import is_loopback
from jepakit.errors import ConfigError
from jepakit_service.settings import SERVICE, ServeSettings
from jepakit_service.telemetry.logs import announce

_LONG_START_S = 300.0
_HAPROXY_FILES = 10_270
_RAYS = ("ray::", "raylet", "gcs_server")
"""Prefixes of the names of Ray's processes. All of them require its token, and so do Ray's ports in this process."""
_POLL_S, _LONGEST_PAUSE_S = 0.1, 10.0
_WHY_NOT = {
    errno.EADDRINUSE: "another program has it; choose another --port",
    errno.EADDRNOTAVAIL: "this machine has no such address; --host 0.0.0.0 means all of its own",
    errno.EACCES: "it takes a privilege; choose a --port of 1024 or more",
}


class Listener(NamedTuple):
    """A TCP port on which the process tree listens beyond loopback."""

    address: str
    port: int
    process: str


def check_port_is_free(settings: ServeSettings) -> None:
    """Raise ConfigError, with the reason, unless the service can listen on all of the host's local addresses."""
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError):
        raise ConfigError(
            f"cannot listen on {settings.host!r}: it is neither an address nor a name that this machine knows"
        ) from None
    errors = [_error_at(family, address) for family, _, _, _, address in found]
    refused = [number for number in errors if number not in (0, errno.EADDRNOTAVAIL)]
    if refused or 0 not in errors:
        number = refused[0] if refused else errno.EADDRNOTAVAIL
        why = _WHY_NOT.get(number, os.strerror(number))
        raise ConfigError(f"cannot listen on {settings.host}, port {settings.port}: {why}")


def check_open_files(settings: ServeSettings) -> None:
    """Raise ConfigError if HAProxy could not open the files that it claims at its start: Ray would wait for it in vain."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if settings.ray and settings.proxy == "haproxy" and most != resource.RLIM_INFINITY and most < _HAPROXY_FILES:
        raise ConfigError(
            f"at most {most:,} files may be open, and HAProxy takes {_HAPROXY_FILES:,}: raise the limit (`ulimit -Hn`, LimitNOFILE= in a "
            "unit of systemd, ulimits: in a compose file), or choose --proxy python or --no-ray"
        )


def _error_at(family: int, address: Any) -> int:
    """The errno of listening at an address; 0 if that works."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(address)
    except OSError as error:
        return error.errno or errno.EADDRNOTAVAIL
    return 0


def announce_when_ready(settings: ServeSettings, stopping: Callable[[], bool], *, fallback: int | None = None) -> None:
    """Wait until the service is ready, golden check included, then print the ports that others could reach, and its URL.

    A start that takes long is reported. So is another service's answer at that URL, which does not count: that service
    would get this one's requests and keys.

    fallback  the port of HAProxy's fallback, which answers the same requests; None or 0: there is none
    """
    import httpx

    url, reported, reported_long = own_url(settings), False, False
    start, pause_s = time.monotonic(), _POLL_S
    while not stopping():
        try:
            answer = httpx.get(f"{url}/readyz", timeout=5, trust_env=False)
            if answer.status_code == 200 and answer.headers.get(SERVICE) == settings.service:
                _print_listeners(settings, fallback)
                announce(f"ready: {url} (its routes: {url}/docs)")
                return
            if answer.status_code == 200 and not reported:
                announce(f"another service answers at {url}: stop it, or choose another --port", sys.stderr)
                reported = True
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)  # that answer is an error in the log
        except httpx.TransportError:
            pass
        if time.monotonic() > start + _LONG_START_S and not reported_long:
            announce(f"not ready after {_LONG_START_S:.0f} s, still waiting: {url}/readyz says for what", sys.stderr)
            reported_long = True
        until = time.monotonic() + pause_s
        while time.monotonic() < until and not stopping():
            time.sleep(_POLL_S)


def own_url(settings: ServeSettings) -> str:
    """The URL at which this machine itself reaches the service."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    return f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"


def open_listeners() -> list[Listener]:
    """Every TCP listener of this process and its children whose address is not loopback, by port."""
    own = psutil.Process()
    found = set()
    for process in [own, *own.children(recursive=True)]:
        try:
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN and not is_loopback(connection.laddr.ip):
                    family = "[%s]" if connection.family == socket.AF_INET6 else "%s"
                    found.add(Listener(family % connection.laddr.ip, connection.laddr.port, _name(process)))
        except psutil.Error:  # gone since, or not ours to look at
            continue
    return sorted(found, key=lambda listener: (listener.port, listener.process))


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nothing listens on now; another program may take it before it is used."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def _print_listeners(settings: ServeSettings, fallback: int | None) -> None:
    """Print the ports that other machines could reach."""
    listeners = open_listeners()
    if not listeners:
        return
    announce("ports that other machines could reach:")
    for listener in listeners:
        announce(f"  {listener.address}:{listener.port}  {listener.process}: {_guard(listener, settings, fallback)}")


def _guard(listener: Listener, settings: ServeSettings, fallback: int | None) -> str:
    keys = "API keys" if settings.api_key_file else "nothing guards it but this host's firewall"
    if listener.port == settings.port:
        return keys
    if listener.port == fallback:
        return f"{keys}: what answers while no replica is up"
    if listener.process == "haproxy":
        return "HAProxy's statistics and metrics, open: publish no port but the service's"
    if listener.process.startswith("ray::ServeReplica"):
        return f"Ray's token for its own calls, {keys} for requests past the proxy"
    if settings.ray and (listener.process.startswith(_RAYS) or listener.process == psutil.Process().name()):
        return "Ray's token of this run"
    return "unknown: close it with this host's firewall"


def _name(process: psutil.Process) -> str:
    """The process title for Ray's workers, which states their role; otherwise the program's name."""
    title: str = process.cmdline()[0] if process.cmdline() else process.name()
    return title.split()[0] if title.startswith("ray::") else process.name()
