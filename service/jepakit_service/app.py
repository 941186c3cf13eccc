"""`jepakit serve`: check everything before anything starts, then run Ray Serve or this single process."""

from __future__ import annotations

from pathlib import Path

from jepakit.bundles.bundle import GRAPH
from jepakit.inference.runtime import check_provider
from jepakit_service.bundles import find_bundles
from jepakit_service.http import keys
from jepakit_service.listeners import check_open_files, check_port_is_free
from jepakit_service.settings import ServeSettings
from jepakit_service.telemetry import tracing
from jepakit_service.telemetry.logs import announce


def run(settings: ServeSettings) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP; requests in flight are answered first. Raises if the service cannot start."""
    check_provider(settings.provider, settings.arithmetic)
    bundles = find_bundles(settings)
    for bundle in bundles:
        bundle.require(GRAPH)
        bundle.verify()
    if settings.api_key_file is not None:
        keys.check(Path(settings.api_key_file))
    tracing.check()
    check_port_is_free(settings)
    check_open_files(settings)
    for bundle in bundles:
        announce(f"{bundle.name}  model_id {bundle.model_id}  digest {bundle.digest}")
    if settings.api_key_file is None:
        announce("no API key file: any user of this machine can embed")
    if settings.ray:
        from jepakit_service import ray_driver

        ray_driver.run(settings)
    else:
        from jepakit_service import single

        single.run(settings)
