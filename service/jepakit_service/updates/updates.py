"""Brings in new versions of models while the old ones serve: load beside, check, switch together, drain; or roll back.

A replica looks at the bundles' folders every `watch_s` seconds. A new version is loaded beside the one in service; once
every replica has it, each switches; once every replica has switched, each releases the old one. Until then any replica
answers for both as NAME@MODEL_ID. If a version fails on one replica, all give it up, and the old one stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from jepakit._files import holding
from jepakit.bundles.bundle import MANIFEST, Bundle, is_bundle, open_bundle
from jepakit.errors import DataError, InputError, JepakitError
from jepakit.inference.runtime import Provider
from jepakit_service import memory
from jepakit_service.bundles import bundle_folders, check_expected
from jepakit_service.models.model import LoadedModel
from jepakit_service.models.registry import Incomplete, Registry, Stamp, Update, Versions, VersionsState
from jepakit_service.models.tuning import most_sessions
from jepakit_service.settings import ServeSettings
from jepakit_service.telemetry.metrics import Metrics

_log = logging.getLogger("jepakit.service")
_ABSENT_LOOKS = 5
_AGAIN_S = 60.0
"""Seconds after which files that failed are verified again even if unchanged: a mount can fail for a moment."""
_TURN_POLL_S = 0.2
_LEAVING_LOOKS = 10
"""How many looks a retired version may take to release its memory, here and in the machine's other replicas."""

Peers = Callable[[], Awaitable[Sequence[dict[str, VersionsState] | None]]]
"""Gives the states of all replicas, this one's included; None for one that does not answer."""


class Updates:
    """Keeps the registry in line with the folders. `step` looks once; `run` looks forever."""

    def __init__(self, settings: ServeSettings, registry: Registry, metrics: Metrics, peers: Peers) -> None:
        self._settings, self._registry, self._metrics, self._peers = settings, registry, metrics, peers
        self._opened: _Opened = {}
        self._logged: set[str] = set()
        self._retired: list[LoadedModel] = []
        self._leaving = 0
        """For how many more looks a retired version may still hold memory."""

    def whole(self) -> list[Bundle]:
        """The bundles on disk that pass verification. The others are marked as expected; `step` tries them again, and logs what is wrong."""
        wanted = self._wanted(self._look())
        passing = [bundle for bundle in wanted.values() if self._passes(bundle)]
        for name in wanted.keys() - {bundle.name for bundle in passing}:
            self._registry.versions(name).expected = True
        return passing

    def _passes(self, bundle: Bundle) -> bool:
        try:
            check_expected(bundle, self._settings)
            bundle.verify()
        except (JepakitError, OSError):
            return False
        return True

    async def run(self) -> None:
        """Look every `watch_s` seconds until cancelled."""
        while True:
            await asyncio.sleep(self._settings.watch_s)
            try:
                await self.step()
            except Exception as error:  # a failed look must not be the last one
                _log.error("looking for new bundles failed: %s: %s", type(error).__name__, error)

    async def step(self) -> None:
        """Look once: load what is new, switch and retire what all replicas agree on."""
        for model in self._retired:  # unreachable since the last look
            model.close()
        self._retired, self._leaving = [], max(0, self._leaving - 1)
        found = await asyncio.to_thread(self._look)
        wanted = self._wanted(found)
        for name, bundle in wanted.items():
            await self._prepare(name, bundle)
        gone = self._gone(wanted, {folder for _, rejected in found for folder in rejected})
        for name in gone:  # a refused version that is put back should be tried again
            versions = self._registry.versions(name)
            versions.update, versions.failed = None, {}
        if all(bundles for bundles, _ in found):  # otherwise a mount is lost, and nobody knows what it held
            self._withdraw(gone)
        if any(versions.next or versions.previous for versions in map(self._registry.versions, self._registry.names())):
            states = await self._peers()
            answered = [state for state in states if state is not None]
            if len(answered) == len(states):  # a replica that says nothing agrees to nothing
                self._agree(answered)

    def _look(self) -> list[_Found]:
        found = [_look(Path(given), self._opened) for given in self._settings.bundles]
        there = {bundle.path for bundles, _ in found for bundle in bundles}
        self._opened = {folder: opened for folder, opened in self._opened.items() if folder in there}
        return found

    def _wanted(self, found: Sequence[_Found]) -> dict[str, Bundle]:
        """The bundles on disk by name. What is skipped is logged once, until that changes."""
        wanted: dict[str, Bundle] = {}
        messages = {f"{reason}: it is passed over" for _, rejected in found for reason in rejected.values()}
        for bundle in (bundle for bundles, _ in found for bundle in bundles):
            other = wanted.setdefault(bundle.name, bundle)
            if other is not bundle:
                messages.add(f"{bundle.path} has the name of another bundle, {other.path}: it is passed over")
        for message in messages - self._logged:
            _log.error("%s", message)
        self._logged = messages
        return wanted

    async def _prepare(self, name: str, bundle: Bundle) -> None:
        """Load a version that is not loaded yet, unless it was refused before or its files do not pass yet."""
        versions = self._registry.versions(name)
        versions.folder = bundle.path
        if versions.incomplete is not None and versions.incomplete.update.digest != bundle.digest:
            versions.incomplete = None
        if versions.next is not None and versions.next.digest != bundle.digest:
            self._give_up(versions)
        if versions.next is None and versions.previous is not None and versions.previous.digest == bundle.digest:
            # Rolled back when only some replicas had switched: it goes back through the same agreement.
            versions.next, versions.previous = versions.previous, None
        if bundle.digest in {model.digest for model in versions.loaded()}:
            if versions.current is not None and versions.current.digest == bundle.digest:
                versions.update, versions.failed = None, {}
            return
        if bundle.digest not in versions.failed and await self._is_whole(bundle, versions):
            await self._load(bundle, versions)

    async def _load(self, bundle: Bundle, versions: Versions) -> None:
        """Load the next version beside those in service, or refuse it. Without enough memory, try again while a retired one may
        still hold some."""
        versions.update = Update(bundle.digest, "loading")
        try:
            check_expected(bundle, self._settings)
            provider = self._settings.provider if versions.current is None else versions.current.provider
            async with _turn(bundle.path):
                versions.next = await asyncio.to_thread(self._load_if_it_fits, bundle, provider)
        except JepakitError as error:
            if isinstance(error, _NoRoomError) and self._leaving:
                versions.update = Update(bundle.digest, "loading", str(error))
            else:
                self._refuse(versions, bundle.digest, str(error))
            return
        except Exception as error:  # the runtime's own, or no memory: the next look would fail too
            reason = f"{bundle.path} cannot be loaded ({type(error).__name__}: {error})"
            self._refuse(versions, bundle.digest, reason)
            return
        versions.update = Update(bundle.digest, "waiting")

    def _load_if_it_fits(self, bundle: Bundle, provider: Provider) -> LoadedModel:
        """Load a version, or raise _NoRoomError."""
        _check_memory(bundle, most_sessions(provider, self._settings.threads), self._settings.max_memory_mb)
        return LoadedModel(bundle, self._settings, self._metrics)

    async def _is_whole(self, bundle: Bundle, versions: Versions) -> bool:
        """Whether every file passes; verified again when a file has changed, and after `_AGAIN_S`."""
        stamp = await asyncio.to_thread(_stamp, bundle.path)
        seen = versions.incomplete
        if seen is None or seen.stamp != stamp or time.monotonic() - seen.since >= _AGAIN_S:
            try:
                await asyncio.to_thread(bundle.verify)
            except (JepakitError, OSError) as error:
                if seen is None:
                    _log.warning("a new version is incomplete, waiting for the rest: %s", error)
                versions.incomplete = Incomplete(
                    Update(bundle.digest, "incomplete", str(error)), stamp, time.monotonic()
                )
            else:
                versions.incomplete = None
        if versions.incomplete is None:
            return True
        versions.update = versions.incomplete.update
        return False

    def _agree(self, states: Sequence[dict[str, VersionsState]]) -> None:
        for name in self._registry.names():
            versions = self._registry.versions(name)
            of_all = [state.get(name) for state in states]
            if versions.next is not None:
                digest = versions.next.digest
                reasons = [state.failed[digest] for state in of_all if state is not None and digest in state.failed]
                if reasons:
                    self._refuse(versions, digest, reasons[0])
                elif all(state is not None and digest in state.loaded for state in of_all):
                    self._switch(name, versions)
            elif (
                versions.previous is not None
                and versions.current is not None
                and all(state is not None and state.current == versions.current.digest for state in of_all)
            ):
                self._retire(versions.previous)
                versions.previous = None

    def _switch(self, name: str, versions: Versions) -> None:
        assert versions.next is not None
        if versions.previous is not None:
            self._retire(versions.previous)
        self._leaving = _LEAVING_LOOKS  # the old version goes once all have switched
        versions.current, versions.previous, versions.next = versions.next, versions.current, None
        versions.update, versions.failed = None, {}
        _log.info("%s is now %s (digest %s)", name, versions.current.model_id, versions.current.digest)

    def _refuse(self, versions: Versions, digest: str, reason: str) -> None:
        self._give_up(versions)
        versions.failed[digest] = reason
        versions.update = Update(digest, "failed", reason)
        stays = "" if versions.current is None else ", the old one stays"
        _log.error("a new version was refused%s: %s", stays, reason)

    def _give_up(self, versions: Versions) -> None:
        if versions.next is not None:
            self._retire(versions.next)
            versions.next = None

    def _retire(self, *models: LoadedModel) -> None:
        """Close the models in the next look."""
        self._retired += models
        self._leaving = _LEAVING_LOOKS

    def _gone(self, there: Collection[str], closed: Collection[Path]) -> list[str]:
        """Names whose bundle is no longer there. A folder whose manifest does not pass does not count as gone."""
        names = self._registry.names()
        return [name for name in names if name not in there and self._registry.versions(name).folder not in closed]

    def _withdraw(self, gone: Collection[str]) -> None:
        """Take names out of service whose bundle has been gone for several looks: swapping folders takes fewer."""
        for name in self._registry.names():
            versions = self._registry.versions(name)
            versions.absent = versions.absent + 1 if name in gone else 0
            if versions.absent >= _ABSENT_LOOKS:
                self._retire(*self._registry.forget(name).loaded())
                self._metrics.forget(name)
                _log.info("%s is no longer served: its bundle is gone", name)


@contextlib.asynccontextmanager
async def _turn(folder: Path) -> AsyncIterator[None]:
    """Hold the folder's lock: replicas of a machine load in turns, so each sees the memory left. May be cancelled."""
    with contextlib.ExitStack() as held:
        waits = False
        while True:
            try:
                await asyncio.to_thread(held.enter_context, holding(folder))
                break
            except BlockingIOError:
                if not waits:
                    _log.info("%s waits to be loaded: another process, most likely a replica, has locked it", folder)
                waits = True
                await asyncio.sleep(_TURN_POLL_S)
        yield


class _NoRoomError(DataError):
    """There is not enough memory to load a version beside the others."""


class _Found(NamedTuple):
    """What is at one path of the settings: nothing if it is empty or lost."""

    bundles: list[Bundle]
    rejected: dict[Path, str]
    """Folders whose manifest does not pass or cannot be read, and why."""


_Opened = dict[Path, tuple[tuple[int, int, int], Bundle]]
"""Bundles by folder, each with its manifest's stamp: parsing all of them at every look takes a share of a core."""


def _look(given: Path, opened: _Opened) -> _Found:
    try:
        folders, closed = bundle_folders(given)
    except OSError:
        return _Found([], {})
    found = _Found([], dict(closed))
    for folder in folders:
        try:
            found.bundles.append(_open(folder, opened))
        except (InputError, OSError) as error:
            if not _is_gone(folder):
                found.rejected[folder] = str(error)
    return found


def _open(folder: Path, opened: _Opened) -> Bundle:
    """The bundle as it was opened before, or opened now if its manifest has changed. Raises BundleError, OSError."""
    stamp, (known, bundle) = _stamp_of_manifest(folder), opened.pop(folder, (None, None))
    if bundle is None or stamp is None or stamp != known:
        bundle = open_bundle(folder)
    if stamp is not None:
        opened[folder] = stamp, bundle
    return bundle


def _stamp_of_manifest(folder: Path) -> tuple[int, int, int] | None:
    """Inode, size and time of the last change; None if it cannot be read."""
    try:
        # Network file systems remember what `stat` says, but ask their server when a file is opened.
        descriptor = os.open(folder / MANIFEST, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        status = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    return status.st_ino, status.st_size, status.st_ctime_ns


def _is_gone(folder: Path) -> bool:
    """Whether the bundle is no longer there; one that cannot be inspected still is."""
    try:
        return not is_bundle(folder)
    except OSError:
        return False


def _check_memory(bundle: Bundle, sessions: int, limit: int | None) -> None:
    needed, available, of = memory.needed_mb(bundle, sessions), memory.available_mb(), "free"
    if limit is not None and limit - memory.used_mb() < available:
        available, of = limit - memory.used_mb(), f"left of max_memory_mb = {limit}"
    if needed > available:
        raise _NoRoomError(
            f"{bundle.path} needs about {needed:.0f} MB beside the version in service, but only {max(available, 0):.0f} MB are "
            f"{of}: give the service more memory, or stop it and start it with the new version"
        )


def _stamp(folder: Path) -> Stamp:
    """The folder's files as they are now."""
    try:
        found = [(file.name, file.stat()) for file in sorted(folder.iterdir())]
    except OSError:
        return ()
    # ctime, as a chmod may be what mends the bundle.
    return tuple((name, status.st_size, status.st_ctime_ns) for name, status in found)
