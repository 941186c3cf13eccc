"""One process of the service: its models, engine and counters, and its reports about itself and the others."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from prometheus_client import Metric

from jepakit.errors import ServeError
from jepakit_service import memory
from jepakit_service.bundles import find_bundles
from jepakit_service.models.engine import Engine
from jepakit_service.models.model import LoadedModel
from jepakit_service.models.registry import NO_MODEL, Registry, VersionsState
from jepakit_service.models.sharing import Shared
from jepakit_service.settings import ServeSettings
from jepakit_service.telemetry.metrics import Metrics
from jepakit_service.updates.updates import Updates

_log = logging.getLogger("jepakit.service")


@dataclass(frozen=True)
class Report:
    """What one replica says about itself; can be pickled. `faults` is empty when it answers correctly.

    families  its metrics; empty unless they were asked for
    """

    replica: str
    faults: tuple[str, ...]
    models: dict[str, VersionsState]
    families: list[Metric]

    @property
    def in_service(self) -> set[str]:
        """Names of the models that it answers for."""
        return {name for name, state in self.models.items() if state.current}


AskAll = Callable[[bool], Awaitable[Sequence[Report | None]]]
"""Gives the reports of all replicas; the argument says whether with metrics, which take milliseconds per model to collect.

None stands for a replica that has ended; a single None is the whole result if one of them does not answer.
"""


class Round(NamedTuple):
    """What the replicas of the deployment answered when all were asked, and whether all did."""

    reports: Sequence[Report]
    is_whole: bool


class Replica:
    """Loads every model at construction, and raises BundleError if any of them fails a check.

    ask_all  gives the reports of the deployment. The replica may join it while bundles are being copied, and loads
             those once they are complete. None: this is the only replica
    """

    def __init__(self, settings: ServeSettings, ask_all: AskAll | None = None) -> None:
        self.settings = settings
        self.id = secrets.token_hex(4)
        self.draining, self._is_faulty = False, False
        self.metrics = Metrics()
        self.registry = Registry()
        self.engine = Engine(settings)
        self._ask_all = ask_all or self._ask_alone
        self._reports = {with_metrics: Shared(partial(self._answering, with_metrics)) for with_metrics in (False, True)}
        self._updates = Updates(settings, self.registry, self.metrics, self._states)
        for bundle in find_bundles(settings) if ask_all is None else self._updates.whole():
            versions = self.registry.versions(bundle.name)
            versions.current, versions.folder = LoadedModel(bundle, settings, self.metrics), bundle.path
        self._watching: asyncio.Task[None] | None = None

    def watch(self) -> None:
        """Start looking for new bundles, as a task on the running event loop; does nothing if that task runs already."""
        if self._watching is None or self._watching.done():  # a CancelledError from what it awaits ends it
            self._watching = asyncio.get_running_loop().create_task(self._updates.run())

    async def faults(self) -> tuple[str, ...]:
        """What is wrong with this replica, after a heartbeat of every model; empty when it is ready."""
        beats = await asyncio.gather(*(model.heartbeat() for model in self.registry))
        faults = [fault for fault in beats if fault is not None] if beats else [NO_MODEL]
        limit = self.settings.max_memory_mb
        if limit is not None and (used := memory.used_mb()) > limit:
            faults.append(f"uses {used:.0f} MB of memory, more than max_memory_mb = {limit}")
        self.metrics.ready.set(not faults and not self.draining)
        self._tell([fault for fault in faults if fault != NO_MODEL])
        return tuple(faults)

    def _tell(self, faults: list[str]) -> None:
        """Log that this replica has become faulty, or well again: one that is replaced cannot be asked any more."""
        if faults and not self._is_faulty:
            _log.error("replica %s does not answer correctly: %s", self.id, "; ".join(faults))
        elif self._is_faulty and not faults:
            _log.info("replica %s answers correctly again", self.id)
        self._is_faulty = bool(faults)

    async def report(self, with_metrics: bool = False) -> Report:
        """This replica's own state, with its metrics if they are asked for."""
        faults = await self.faults()
        return Report(self.id, faults, self.registry.state(), self._families() if with_metrics else [])

    def _families(self) -> list[Metric]:
        """All metrics with their current values."""
        self.metrics.model_info.clear()
        for model in self.registry:
            manifest = model.manifest
            self.metrics.model_info.labels(
                manifest.name, manifest.model_id, manifest.digest, model.precision, model.provider
            ).set(1)
        self.metrics.update.clear()
        for name in self.registry.names():
            if (update := self.registry.versions(name).update) is not None:
                self.metrics.update.labels(name, update.state).set(1)
        return self.metrics.families()

    async def reports(self, *, with_metrics: bool = False) -> Round:
        """The reports of all replicas that answer, this one's included. One round at a time, as strangers may ask."""
        return await self._reports[with_metrics]()

    async def check(self) -> None:
        """Raise ServeError if this replica should be replaced. Not if it has no models: then its successor would have none either."""
        if (faults := await self.faults()) and NO_MODEL not in faults:
            raise ServeError("; ".join(faults))

    async def _answering(self, with_metrics: bool) -> Round:
        asked = await self._ask_all(with_metrics)
        answered = [report for report in asked if report is not None]
        is_whole = 0 < len(answered) == len(asked)
        return Round(answered or await self._ask_alone(with_metrics), is_whole)  # alone if another replica hangs

    async def _ask_alone(self, with_metrics: bool) -> Sequence[Report]:
        return [await self.report(with_metrics)]

    async def _states(self) -> list[dict[str, VersionsState] | None]:
        reports = await self._ask_all(False)
        if not any(report is not None and report.replica == self.id for report in reports):
            return [None]  # a replica that does not hear itself cannot be hearing all the others
        return [None if report is None else report.models for report in reports]
