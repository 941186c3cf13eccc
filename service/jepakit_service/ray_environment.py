"""What Ray's processes read from their environment: ours and, for clusters that others run, `NODE_ENVIRONMENT`."""

from __future__ import annotations

import secrets
from pathlib import Path

from jepakit._ray import SILENT
from jepakit_service.listeners import free_port
from jepakit_service.settings import ServeSettings

FALLBACK_PORT = "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"
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
    "RAY_event_stats": "0",  # statistics of its event loops, written to those files every minute
}
REPLICAS = {
    # Our code never blocks its event loop: sharing Ray's saves each request four hops between threads.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
NODE_ENVIRONMENT = {
    **_CLUSTER,
    **REPLICAS,
    "RAY_LOG_TO_STDERR": "1",  # where whatever started the node collects the replicas' lines; else into files of Ray's
}
"""Variables that every node of a user's own cluster needs (docs/deploy/kuberay.yaml)."""


def environment(settings: ServeSettings, folder: Path) -> dict[str, str]:
    """The variables of a Ray of our own with its files in `folder`, to be set before Ray is imported; those of `REPLICAS` after."""
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
    the log goes to a socket that nobody opens. The other socket's name is short, because Ray puts it into a subfolder
    named by 56 digits, and a path may have 97 bytes (`_ray.own_folder`).
    """
    return {
        FALLBACK_PORT: str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(free_port()),
        # After which an idle client is disconnected; an hour by default. It must exceed any wait for a body or an answer.
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(int(max(settings.body_timeout_s, settings.request_timeout_s)) + 15),
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",
        "RAY_SERVE_HAPROXY_NBTHREAD": "2",
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "s"),
        "RAY_SERVE_HAPROXY_LOG_TARGET": str(folder / "no-log.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "haproxy-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
    }
