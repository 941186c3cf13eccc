"""Puts the application on Ray Serve, or on plain uvicorn: the only module that knows either.

Our own process is the entry point, never `ray start`: Ray's internal ports listen on all interfaces, so
they are guarded by a token of our making, without a dashboard and without usage statistics.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jepakit.bundle import GRAPH
from jepakit.errors import ConfigError, ServeError
from jepakit_service.engine import find_bundles
from jepakit_service.keys import KeyFile
from jepakit_service.settings import ServeSettings, is_loopback

if TYPE_CHECKING:
    from jepakit_service.gate import Gate

_OBJECT_STORE_BYTES = 100 << 20
_START_TIMEOUT_S = 300.0


def run(settings: ServeSettings) -> None:
    """Serve until SIGINT or SIGTERM; requests in flight are answered first. Raises what makes starting impossible."""
    bundles = find_bundles(settings)
    for bundle in bundles:
        bundle.read(GRAPH)
    if settings.api_key_file is not None:
        KeyFile(Path(settings.api_key_file))
    _check_port_is_free(settings)
    for bundle in bundles:
        print(f"{bundle.manifest.name}  model_id {bundle.manifest.model_id}  digest {bundle.digest}", flush=True)
    if settings.api_key_file is None:
        print("no API key file: any user of this machine can embed", flush=True)
    if settings.ray:
        _run_on_ray(settings)
    else:
        _run_on_uvicorn(settings)


def _run_on_uvicorn(settings: ServeSettings) -> None:
    import uvicorn

    from jepakit_service.api import build_app

    class _Server(uvicorn.Server):
        def capture_signals(self) -> Any:
            """Leave the signals to us: uvicorn raises them again after its shutdown, so a clean stop would look like a kill."""
            return contextlib.nullcontext()

    gate = build_app(settings)
    config = uvicorn.Config(
        gate, host=settings.host, port=settings.port, log_level="warning", access_log=False, lifespan="off",
        timeout_graceful_shutdown=int(settings.drain_s), server_header=False,
    )  # fmt: skip
    server = _Server(config)

    def stop(*_: object) -> None:
        gate.drain()
        server.should_exit = True  # uvicorn then waits for the requests in flight

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    threading.Thread(target=_announce_when_ready, args=(settings,), daemon=True).start()
    server.run()


def _run_on_ray(settings: ServeSettings) -> None:
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "2",
        "RAY_COLOR_PREFIX": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    os.environ.update(environment)  # Ray reads them at import
    import psutil
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions

    stop = threading.Event()
    _on_stop_signals(stop)
    print("starting Ray Serve …", flush=True)
    folder = tempfile.mkdtemp(prefix="jepakit-ray-")
    try:
        ray.init(
            include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES, log_to_driver=False,
            logging_level=logging.ERROR, namespace="jepakit", _temp_dir=folder,
            num_cpus=max(settings.threads, settings.replicas),
        )  # fmt: skip
        _on_stop_signals(stop)  # ray.init put its own in place
        options = HTTPOptions(host=settings.host, port=settings.port)
        for name in ("ray", "ray.serve"):
            logging.getLogger(name).setLevel(logging.ERROR)
        serve.start(http_options=options, logging_config={"enable_access_log": False, "log_level": "ERROR"})
        handle = serve.run(_deployment(settings), name="jepakit", route_prefix="/")
        _announce_when_ready(settings)
        while not stop.wait(1.0):
            pass
        _drain(handle, settings)
    except Exception as error:  # Ray wraps what a replica raised in classes of its own
        if stop.is_set():
            return
        raise ServeError(f"the service did not start: {_innermost(error)}") from error
    finally:
        children = psutil.Process().children(recursive=True)
        serve.shutdown()
        ray.shutdown()
        _end(children)
        shutil.rmtree(folder, ignore_errors=True)


def _on_stop_signals(stop: threading.Event) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())


def _end(processes: list[Any]) -> None:
    """End what Ray left running: some of its agents outlive it by half a minute."""
    import psutil

    for end in (psutil.Process.terminate, psutil.Process.kill):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                end(process)
        _, processes = psutil.wait_procs(processes, timeout=3)


def _deployment(settings: ServeSettings) -> Any:
    """The one deployment: every replica is one process that holds all models."""
    from ray import serve
    from ray.serve.config import BackpressureConfig

    @serve.deployment(
        name="embeddings",
        num_replicas=settings.replicas,
        max_ongoing_requests=settings.max_waiting,
        max_queued_requests=settings.max_waiting,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=settings.drain_s,
        max_constructor_retry_count=1,
        ray_actor_options={"num_cpus": 1},
    )
    @serve.ingress()
    class Embeddings:
        def __init__(self) -> None:
            from jepakit_service.api import build_app

            self._gate = build_app(settings)

        def __serve_build_asgi_app__(self) -> Gate:
            return self._gate

        async def drain(self) -> None:
            self._gate.drain()
            deadline = time.monotonic() + settings.drain_s
            while self._gate.in_flight and time.monotonic() < deadline:
                await asyncio.sleep(0.05)

    return Embeddings.bind()  # type: ignore[attr-defined]  # serve.deployment's decorator is untyped here


def _drain(handle: Any, settings: ServeSettings) -> None:
    print("stopping: answering the requests in flight …", flush=True)
    handle.broadcast("drain").results(timeout_s=settings.drain_s + 5)


def _announce_when_ready(settings: ServeSettings) -> None:
    """Wait for our own readiness, which is true only after the golden check, then say where the service is."""
    import httpx

    host = settings.host if is_loopback(settings.host) else "127.0.0.1"
    url = f"http://{host}:{settings.port}"
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                print(f"ready: {url}", flush=True)
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    print(f"not ready after {_START_TIMEOUT_S:.0f} s", file=sys.stderr, flush=True)


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


def _innermost(error: BaseException) -> str:
    """The last line that says something: our own message inside Ray's."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
