"""The application on Ray Serve: the only module of the service that knows about Ray.

Our own process is the entry point, never `ray start`. Ray's internal ports listen on all interfaces, so we guard them
with our own token, and run neither dashboard nor usage statistics. `build` gives the same application to a Serve config
file, on clusters that others run.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers, MutableHeaders

from jepakit._messages import parse
from jepakit._ray import OWN, SILENT, init, own_folder
from jepakit.errors import MissingExtraError, ServeError
from jepakit_service import logs
from jepakit_service.listeners import announce_when_ready, free_port
from jepakit_service.settings import ServeSettings
from jepakit_service.tasks import is_cancelled

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from jepakit_service.gate import Gate
    from jepakit_service.replica import Report

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_APPLICATION, _DEPLOYMENT = "jepakit", "embeddings"
_REPORT_TIMEOUT_S = 3.5
"""Together with a heartbeat's patience, less than the 5 s that probes wait."""
# The gate refuses requests with a reason and keeps answering probes; Ray's own limit only has to be higher.
_ONGOING = 100_000
_LOGGING = {"enable_access_log": False, "log_level": "ERROR"}
"""For Ray's own files. The gate logs requests; Ray's access log would only repeat it."""
_IDLE_HELPERS = ("ray/_private/log_monitor.py", "ray/dashboard/dashboard.py", "ray/autoscaler/_private/monitor.py")
_CORE = ("gcs_server", "raylet")
"""Ray's control store and node: without either nothing runs, and Ray restarts neither."""
_FALLBACK_PORT = "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"
_LINGER_S = 1.0
"""The proxy ends with us, and on a busy machine the last answers may still be on their way through it."""


class _Stop:
    """Whether SIGINT or SIGTERM has come. A plain flag: the signal may interrupt code that holds an Event's lock."""

    def __init__(self) -> None:
        self.requested = False

    def watch(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request)

    def _request(self, *_: object) -> None:
        self.requested = True


def run(settings: ServeSettings) -> None:
    """Serve until SIGINT or SIGTERM, then answer what is in flight. Raises ServeError when Ray or a model does not start.

    Ray and its driver run in a session of their own. A signal to our process group, as sent by a terminal, `timeout` or
    a supervisor, would end Ray's processes at once, and the requests in flight with them. So only the driver gets it.
    """
    parent, driver = os.getpid(), os.fork()
    if driver == 0:
        os.setsid()
        _end_with(parent)
        _adopt_orphans()
        _drive(settings)
        return

    def pass_on(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(driver, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    _, status = os.waitpid(driver, 0)
    for number in (signal.SIGINT, signal.SIGTERM):  # the pid may be another process's now
        signal.signal(number, signal.SIG_IGN)
    code = os.waitstatus_to_exitcode(status)
    raise SystemExit(code if code >= 0 else 128 - code)


def _end_with(parent: int) -> None:
    """Send this process SIGTERM once its parent is gone, however it ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)


def _adopt_orphans() -> None:
    """Adopt what Ray's processes leave behind when they die, so that it is ended with the other children."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _drive(settings: ServeSettings) -> None:
    with own_folder() as folder:
        os.environ.update(_environment(settings, folder))  # Ray reads it at import
        try:
            importlib.import_module("ray.serve")
        except ImportError as error:
            raise MissingExtraError(f"Ray Serve cannot be imported ({error}): pip install 'jepakit[serve]'") from error
        # For the processes that Ray starts: this one has no event loop that Ray could share.
        os.environ.update(_REPLICAS)
        stop = _Stop()
        stop.watch()
        logs.say("starting Ray Serve …")
        with contextlib.closing(logs.Collector(folder / "logs.sock")) as collector:
            _serve(settings, folder / "ray", collector.path, stop)


def _serve(settings: ServeSettings, folder: Path, log_socket: str, stop: _Stop) -> None:
    """Start Ray with its files in `folder`, serve until told to stop, and end all of Ray."""
    import psutil
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions

    try:
        init(
            **OWN,
            namespace="jepakit",
            _temp_dir=str(folder),
            num_gpus=_gpus(settings),
            num_cpus=max(settings.threads, settings.max_replicas or settings.replicas),
        )
        stop.watch()  # ray.init installed its own handlers
        _end_idle_helpers()
        core = {name: child for child in psutil.Process().children() if (name := child.name()) in _CORE}
        options = HTTPOptions(host=settings.host, port=settings.port)
        for name in ("ray", "ray.serve"):
            logging.getLogger(name).setLevel(logging.ERROR)
        serve.start(http_options=options, logging_config=_LOGGING)
        application = _application(settings, log_socket)
        handle = serve.run(application, name=_APPLICATION, route_prefix="/", logging_config=_LOGGING)
        announce_when_ready(settings, lambda: stop.requested, fallback=int(os.environ.get(_FALLBACK_PORT, 0)))
        while not stop.requested:
            _check_core(core)
            time.sleep(0.2)
        _drain(handle, settings)
    except ServeError:
        raise
    except Exception as error:  # Ray wraps what a replica raised in classes of its own
        if not stop.requested:
            raise ServeError(f"the service did not start: {_reason(error)}") from error
    finally:
        # All of Ray is ours: ending it ends Serve, which has nothing left to do.
        children = psutil.Process().children(recursive=True)
        ray.shutdown()
        _end(children)


def _check_core(core: Mapping[str, Any]) -> None:
    """Raise ServeError once one of Ray's own processes, given by their names, has ended."""
    import psutil

    for name, process in core.items():
        try:
            ended = process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            ended = True
        if ended:
            raise ServeError(f"Ray's {name} has ended, and with it the service: start it again")


def _drain(handle: Any, settings: ServeSettings) -> None:
    """Let the requests in flight be answered. Raises ServeError if a replica cannot confirm that they were."""
    logs.say("stopping: answering the requests in flight …")
    answers: list[Any]
    try:
        answers = handle.broadcast("drain").results(timeout_s=settings.drain_s + 5, return_exceptions=True)
    except Exception as error:  # as above
        answers = [error]
    time.sleep(_LINGER_S)  # even if one replica has died, for the others
    for answer in answers:
        if isinstance(answer, BaseException):
            raise ServeError(f"requests in flight may be lost: {_innermost(answer)}") from answer


def build(args: dict[str, Any]) -> Any:
    """The application for a Serve config file: `import_path: jepakit_service.ray_app:build`.

    args  fields of `ServeSettings`. Where the cluster listens is set by its own `http_options`, unknown here: keys are
          required unless `host` in `args` says that it is loopback. Raises ConfigError.
    """
    return _application(parse(ServeSettings, {"host": "0.0.0.0", **args}), None)


_CLUSTER = {
    **SILENT,
    "RAY_memory_monitor_refresh_ms": "0",  # it would kill our processes when others use the memory
    "RAY_worker_niceness": "0",  # the default, 15, puts the service behind everything else on the machine
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "2",
    # The default, 5 s, would kill the proxy while it starts on a busy machine.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    # Ray's processes log to files in a folder that may be in memory: two small files each.
    "RAY_ROTATION_MAX_BYTES": str(1 << 20),
    "RAY_ROTATION_BACKUP_COUNT": "1",
    "RAY_event_stats": "0",  # of its event loops, printed to those files every minute
}
_REPLICAS = {
    # Our code never blocks its event loop: sharing Ray's saves each request four hops between threads.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
NODE_ENVIRONMENT = {**_CLUSTER, **_REPLICAS}
"""Variables that every node of a cluster needs, ours or the user's own (docs/deploy/kuberay.yaml)."""


def _environment(settings: ServeSettings, folder: Path) -> dict[str, str]:
    return {
        **_CLUSTER,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_raylet_start_wait_time_s": "120",  # 30 s are not enough on a busy machine
        # Nobody reads Ray's own metrics here, and ten control loops a second took 6 % of a core from the inferences.
        "RAY_enable_metrics_collection": "0",
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.4",
        "RAY_COLOR_PREFIX": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        **(_haproxy(folder, settings) if settings.proxy == "haproxy" else {}),
    }


def _haproxy(folder: Path, settings: ServeSettings) -> dict[str, str]:
    """Keep HAProxy's files in our folder rather than in /tmp for all to read, and give each service its own ports.

    While no replica is up, HAProxy sends requests to the fallback; if services shared its port, one would answer the
    other's requests. By default Ray has it log every request, with client and query, to port 514 of this machine; here
    the log goes to a socket that nobody opens.
    """
    return {
        _FALLBACK_PORT: str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(free_port()),
        # For a client that sends nothing; by default an hour. Longer than any wait for a body, or for an answer.
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(int(max(settings.body_timeout_s, settings.request_timeout_s)) + 15),
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",
        "RAY_SERVE_HAPROXY_NBTHREAD": "2",
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "haproxy.sock"),
        "RAY_SERVE_HAPROXY_LOG_TARGET": str(folder / "no-log.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "haproxy-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
    }


def _application(settings: ServeSettings, log_socket: str | None) -> Any:
    """The one deployment: every replica is one process that holds all models."""
    from ray import serve
    from ray.serve.config import AutoscalingConfig, BackpressureConfig

    scaling: dict[str, Any] = {"num_replicas": settings.replicas}
    if settings.max_replicas is not None:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=settings.replicas,
                max_replicas=settings.max_replicas,
                target_ongoing_requests=settings.target_ongoing_requests,
            )
        }

    @serve.deployment(
        name=_DEPLOYMENT,
        max_ongoing_requests=_ONGOING,
        max_queued_requests=_ONGOING,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        health_check_period_s=2,
        health_check_timeout_s=20,
        graceful_shutdown_timeout_s=settings.drain_s,
        max_constructor_retry_count=1,
        ray_actor_options={"num_cpus": 1, "num_gpus": settings.num_gpus},
        **scaling,
    )
    @serve.ingress()
    class Embeddings:
        def __init__(self) -> None:
            from jepakit_service.api import build_app

            logs.configure(settings, log_socket)
            self._gate = build_app(settings, _ask_all)

        def __serve_build_asgi_app__(self) -> ASGIApp:
            return _named_once(self._gate)

        async def report(self) -> Report:
            return await self._gate.replica.report()

        async def check_health(self) -> None:
            self._gate.replica.watch()
            await self._gate.replica.check()

        async def drain(self) -> None:
            self._gate.drain()
            deadline = time.monotonic() + settings.drain_s
            while self._gate.in_flight and time.monotonic() < deadline:
                await asyncio.sleep(0.05)
            await self._gate.flush()

    return Embeddings.bind()  # type: ignore[attr-defined]  # serve.deployment's decorator is untyped here


def _named_once(gate: Gate) -> ASGIApp:
    """Leave out the gate's request id if it came with the request: Ray adds that id, or its own, to every answer."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope).get("x-request-id") if scope["type"] == "http" else None

        async def send_once(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if headers.get("x-request-id") == given:
                    del headers["x-request-id"]
            await send(message)

        await gate(scope, receive, send_once)

    return app


async def _ask_all() -> Sequence[Report | None]:
    """The reports of the deployment's replicas, asked from within one of them; None for one that has ended.

    If one does not answer, or Ray knows of none at the moment, there are no reports at all: a single None.
    """
    from ray import serve

    context = serve.get_replica_context()
    handle = serve.get_deployment_handle(context.deployment, context.app_name)
    try:
        answers = await handle.broadcast("report").results_async(timeout_s=_REPORT_TIMEOUT_S, return_exceptions=True)
    except asyncio.CancelledError:  # Ray also raises this for a call that ended in another replica
        if is_cancelled():
            raise
        return [None]
    except Exception:  # Ray's own, of many kinds
        return [None]
    return [None if isinstance(answer, BaseException) else answer for answer in answers]


def _gpus(settings: ServeSettings) -> int | None:
    """None, so that Ray counts the GPUs itself, if replicas ask for any; else 0."""
    return None if settings.num_gpus else 0


def _end_idle_helpers() -> None:
    """End Ray's helpers for what is off here: sending logs to the driver, the dashboard, growing the cluster.

    The three take 200 MB and wake up all the time, which delays a lone image, computed by all cores together. They are
    killed, because one of them reports being asked to end as a failure.
    """
    import psutil

    ended = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(argument.endswith(_IDLE_HELPERS) for argument in process.cmdline()):
                process.kill()
                ended.append(process)
    psutil.wait_procs(ended, timeout=3)


def _end(processes: list[Any]) -> None:
    """End what Ray left running: some of its agents outlive it by half a minute."""
    import psutil

    for end in (psutil.Process.terminate, psutil.Process.kill):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                end(process)
        _, processes = psutil.wait_procs(processes, timeout=3)


def _reason(error: BaseException) -> str:
    """Why the application did not start. Only Ray's status says what a replica raised."""
    import ray
    from ray import serve

    if ray.is_initialized():  # otherwise asking would start another Ray
        with contextlib.suppress(Exception):
            status = serve.status().applications[_APPLICATION].deployments[_DEPLOYMENT]
            if status.message:
                return _innermost(status.message)
    return _innermost(error)


def _innermost(error: object) -> str:
    """The last line that says something: our own message inside Ray's."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].removeprefix("jepakit.errors.") if lines else type(error).__name__
