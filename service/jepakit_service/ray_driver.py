"""The service on a Ray of its own: starts it, watches it, and ends it without losing a request.

Our own process is the entry point, never `ray start`. Ray's internal ports listen on all interfaces, so we guard them
with our own token, and run neither dashboard nor usage statistics.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from jepakit._machine import end_with_parent
from jepakit._ray import OWN, init, memory_folder, own_folder
from jepakit.errors import MissingExtraError, ServeError
from jepakit_service.listeners import announce_when_ready
from jepakit_service.ray_app import DEPLOYMENT, application
from jepakit_service.ray_environment import FALLBACK_PORT, REPLICAS, environment
from jepakit_service.settings import ServeSettings
from jepakit_service.stopping import on_stop
from jepakit_service.telemetry import logs

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_APPLICATION = "jepakit"
_LOGGING = {"enable_access_log": False, "log_level": "ERROR"}
"""How Ray Serve logs to its own files. Its access log would only repeat the gate's."""
_IDLE_HELPERS = ("ray/_private/log_monitor.py", "ray/dashboard/dashboard.py", "ray/autoscaler/_private/monitor.py")
_CORE = ("gcs_server", "raylet")
"""Ray's control store and node: without either nothing runs, and Ray restarts neither."""
_LINGER_S = 1.0
"""Pause before Ray, and its proxy, are ended: on a busy machine the last answers may still be on their way through it."""


class _Stop:
    """Whether a signal to stop has come. A plain flag: the signal may interrupt code that holds an Event's lock."""

    def __init__(self) -> None:
        self.requested = False

    def watch(self) -> None:
        on_stop(self._request)

    def _request(self, *_: object) -> None:
        self.requested = True


def run(settings: ServeSettings) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP, then answer what is in flight. Raises ServeError when Ray or a model does not start.

    Ray and its driver, a fork of this process, run in a session of their own: a signal to our process group, as sent by a
    terminal, `timeout` or a supervisor, would end Ray's processes at once, and the requests in flight with them. This process
    passes it on to the driver alone. Either removes Ray's files and ends what Ray leaves running, if the other is killed.
    """
    # Ray's Python proxy passes bodies on as objects of Ray's, which writes those that do not fit into its store to files.
    overflow = memory_folder() if settings.proxy == "python" else contextlib.nullcontext()
    with own_folder() as folder, overflow as spilling:
        parent, driver = os.getpid(), os.fork()
        _adopt_orphans()
        if driver == 0:
            os.setsid()
            _end_with(parent)
            _drive(settings, folder, spilling)
        else:
            raise SystemExit(_accompany(driver))


def _accompany(driver: int) -> int:
    """Pass stop signals on to the driver, and wait for its end; if it was killed, end what it leaves running. Returns its exit code."""

    def pass_on(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(driver, number)

    on_stop(pass_on)
    _, status = os.waitpid(driver, 0)
    on_stop(signal.SIG_IGN)  # the pid may be another process's now
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return code
    _end(psutil.Process().children(recursive=True))
    return 128 - code


def _end_with(parent: int) -> None:
    """Send this process SIGTERM once its parent is gone, however it ended."""
    end_with_parent(signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def _adopt_orphans() -> None:
    """Make orphaned descendants children of this process, so that they are ended with its other children."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _drive(settings: ServeSettings, folder: Path, spilling: Path | None) -> None:
    """Start Ray with its files in `folder` and spilled objects in `spilling`, and serve until told to stop."""
    os.environ.update(environment(settings, folder))  # Ray reads it at import
    try:
        importlib.import_module("ray.serve")
    except ImportError as error:
        raise MissingExtraError(f"Ray Serve cannot be imported ({error}): pip install 'jepakit[serve]'") from error
    # Set after the import: these are meant for the replicas, as this process has no event loop that Ray could share.
    os.environ.update(REPLICAS)
    stop = _Stop()
    stop.watch()
    logs.announce("starting Ray Serve …")
    with contextlib.closing(logs.Collector(folder / "logs.sock")) as collector:
        places = {"_temp_dir": str(folder / "ray"), "object_spilling_directory": str(spilling) if spilling else None}
        _serve(settings, places, collector.path, stop)


def _serve(settings: ServeSettings, places: dict[str, str | None], log_socket: str, stop: _Stop) -> None:
    """Start Ray with its files in `places`, serve until told to stop, and end all of Ray."""
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions

    try:
        init(
            **OWN,
            namespace="jepakit",
            **places,
            num_gpus=None if settings.num_gpus else 0,  # None: Ray counts them itself
            # One for each replica, and one for the successor of a replica that hangs. Ray starts as many processes ahead.
            num_cpus=(settings.max_replicas or settings.replicas) + 1,
        )
        stop.watch()  # ray.init installed its own handlers
        _check_gpus(settings, ray.cluster_resources().get("GPU", 0))
        _end_idle_helpers()
        core = {name: child for child in psutil.Process().children() if (name := child.name()) in _CORE}
        options = HTTPOptions(host=settings.host, port=settings.port)
        for name in ("ray", "ray.serve"):
            logging.getLogger(name).setLevel(logging.ERROR)
        serve.start(http_options=options, logging_config=_LOGGING)
        target = serve.RunTarget(
            application(settings, log_socket), name=_APPLICATION, route_prefix="/", logging_config=_LOGGING
        )
        (handle,) = serve.run_many([target], wait_for_applications_running=False)
        if _watch(core, stop, until=_is_running):
            announce_when_ready(settings, lambda: _is_over(core, stop), fallback=int(os.environ.get(FALLBACK_PORT, 0)))
            _watch(core, stop)
            _drain(handle, settings)
    except SystemExit:
        pass  # a signal to stop, by Ray's own handler, while Ray started
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


def _watch(core: Mapping[str, Any], stop: _Stop, until: Callable[[], bool] = lambda: False) -> bool:
    """Wait for `until`, and return True, or for a signal to stop, and return False. Raises ServeError as `_is_over` does."""
    while not _is_over(core, stop):
        if until():
            return True
        time.sleep(0.2)
    return False


def _is_running() -> bool:
    """Whether all replicas are up. Raises RuntimeError once Ray has given up starting them."""
    from ray import serve

    found = serve.status().applications[_APPLICATION]
    if found.status == "DEPLOY_FAILED":
        raise RuntimeError(found.message)
    return bool(found.status == "RUNNING")


def _is_over(core: Mapping[str, Any], stop: _Stop) -> bool:
    """Whether a signal to stop has come. Raises ServeError once one of Ray's own processes, given by their names, has ended."""
    if stop.requested:
        return True
    for name, process in core.items():
        try:
            ended = process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            ended = True
        if ended:
            raise ServeError(f"Ray's {name} has ended, and with it the service: start it again")
    return False


def _drain(handle: Any, settings: ServeSettings) -> None:
    """Let the requests in flight be answered. Raises ServeError if a replica cannot confirm that they were."""
    logs.announce("stopping: answering the requests in flight …")
    answers: list[Any]
    try:
        answers = handle.broadcast("drain").results(timeout_s=settings.drain_s + 5, return_exceptions=True)
    except Exception as error:  # as above
        answers = [error]
    time.sleep(_LINGER_S)  # even if one replica has died, for the others
    for answer in answers:
        if isinstance(answer, BaseException):
            raise ServeError(f"requests in flight may be lost: {_innermost(answer)}") from answer


def _check_gpus(settings: ServeSettings, found: float) -> None:
    """ServeError if the replicas ask for more GPUs than Ray has, for which it would wait forever."""
    each = settings.num_gpus
    # A fraction of a GPU must come from a single one.
    room = math.inf if not each else int(found) * int(1 / each) if each < 1 else found // each
    if settings.replicas > room:
        raise ServeError(
            f"replicas = {settings.replicas} with num_gpus = {each:g} each, but on the {found:g} GPUs that Ray finds there is room for "
            f"{room:g}: ask for fewer, or check nvidia-smi"
        )


def _end_idle_helpers() -> None:
    """End Ray's helpers for what is off here: sending logs to the driver, the dashboard, growing the cluster.

    The three take 200 MB and wake up all the time, which delays a lone image, computed by all cores together. They are
    killed, because one of them reports being asked to end as a failure.
    """
    ended = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(argument.endswith(_IDLE_HELPERS) for argument in process.cmdline()):
                process.kill()
                ended.append(process)
    psutil.wait_procs(ended, timeout=3)


def _end(processes: list[Any]) -> None:
    """End what Ray left running: some of its agents outlive it by half a minute."""
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
            status = serve.status().applications[_APPLICATION].deployments[DEPLOYMENT]
            if status.message:
                return _innermost(status.message)
    return _innermost(error)


def _innermost(error: object) -> str:
    """The line of an error that says why: the first alert of HAProxy, whose last one only says that there were errors; else
    the last line, where Ray quotes the replica's own error."""
    if "node timed out during startup" in str(error):
        return "Ray's own processes did not come up, most likely because this machine is too busy: start again"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    alerts = [line for line in lines if "[ALERT]" in line]
    return (alerts[0] if alerts else lines[-1].removeprefix("jepakit.errors.")) if lines else type(error).__name__
