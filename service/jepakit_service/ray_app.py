"""The application on Ray Serve. `build` gives it to a Serve config file, on clusters that others run."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers, MutableHeaders

from jepakit._explain import parse
from jepakit_service.settings import ServeSettings
from jepakit_service.tasks import is_cancelled
from jepakit_service.telemetry import logs

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from jepakit_service.http.gate import Gate
    from jepakit_service.replica import Report

DEPLOYMENT = "embeddings"
_REPORT_TIMEOUT_S = 3.5
"""Together with a heartbeat's patience, less than the 5 s that probes wait."""
# The gate refuses requests with a reason and keeps answering probes; Ray's own limit only has to be higher.
_ONGOING = 100_000


def build(args: dict[str, Any]) -> Any:
    """The application for a Serve config file: `import_path: jepakit_service.ray_app:build`.

    args  fields of `ServeSettings`. The cluster's own `http_options` and proxy are unknown here: so an API key file is
          required, unless `host` in `args` says that the cluster listens on loopback. Raises ConfigError.
    """
    return application(parse(ServeSettings, {"host": "0.0.0.0", "proxy": "python", **args}), None)


def application(settings: ServeSettings, log_socket: str | None) -> Any:
    """The one deployment: every replica is one process that holds all models.

    log_socket  where replicas send their log lines; None: to standard error
    """
    from ray import serve
    from ray.serve.config import AutoscalingConfig, BackpressureConfig

    scaling: dict[str, Any] = {"num_replicas": settings.replicas}
    if settings.max_replicas is not None:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=settings.replicas,
                max_replicas=settings.max_replicas,
                target_ongoing_requests=settings.target_ongoing_requests,
                upscale_delay_s=settings.upscale_delay_s,
                downscale_delay_s=settings.downscale_delay_s,
            )
        }

    @serve.deployment(
        name=DEPLOYMENT,
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
            from jepakit_service.http.api import build_app

            logs.configure(settings, log_socket)
            self._gate = build_app(settings, _ask_all)
            logging.getLogger("jepakit.service").info("replica %s has started", self._gate.replica.id)

        def __serve_build_asgi_app__(self) -> ASGIApp:
            return _named_once(self._gate)

        async def report(self, with_metrics: bool) -> Report:
            return await self._gate.replica.report(with_metrics)

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
    """Drop the gate's X-Request-Id header if the client sent that id: Ray adds it to the answer as well."""

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


async def _ask_all(with_metrics: bool) -> Sequence[Report | None]:
    """The reports of the deployment's replicas, asked from within one of them; see `AskAll`.

    There are also none if Ray knows of no replica at the moment.
    """
    from ray import serve

    context = serve.get_replica_context()
    handle = serve.get_deployment_handle(context.deployment, context.app_name)
    try:
        asked = handle.broadcast("report", with_metrics)
        answers = await asked.results_async(timeout_s=_REPORT_TIMEOUT_S, return_exceptions=True)
    except asyncio.CancelledError:  # Ray also raises this for a call that ended in another replica
        if is_cancelled():
            raise
        return [None]
    except Exception:  # Ray's own, of many kinds
        return [None]
    return [None if isinstance(answer, BaseException) else answer for answer in answers]
