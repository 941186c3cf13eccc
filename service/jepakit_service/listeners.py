"""What of this service other machines could reach, and what guards it."""

from __future__ import annotations

import socket
from typing import NamedTuple

import psutil

from jepakit_service.logs import say
from jepakit_service.settings import ServeSettings, is_loopback


class Listener(NamedTuple):
    """A TCP port of the process tree that listens beyond loopback."""

    address: str
    port: int
    process: str


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


def print_listeners(settings: ServeSettings) -> None:
    """Say at start what other machines could reach."""
    listeners = open_listeners()
    if not listeners:
        return
    say("ports that other machines could reach:")
    for listener in listeners:
        say(f"  {listener.address}:{listener.port}  {listener.process}: {_guard(listener, settings)}")


def _guard(listener: Listener, settings: ServeSettings) -> str:
    keys = "API keys" if settings.api_key_file else "nothing guards it but this host's firewall"
    if listener.port == settings.port:
        return keys
    if listener.process == "haproxy":
        return "HAProxy's statistics and metrics, open: publish no port but the service's"
    if listener.process.startswith("ray::ServeReplica"):
        return f"Ray's token for its own calls, {keys} for requests past the proxy"
    return "Ray's token of this run"


def _name(process: psutil.Process) -> str:
    """Ray's workers tell their part in their title; everything else by its program."""
    title: str = process.cmdline()[0] if process.cmdline() else process.name()
    return title.split()[0] if title.startswith("ray::") else process.name()
