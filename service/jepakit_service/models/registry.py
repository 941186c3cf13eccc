"""The models of one replica by name, in up to three versions: the one in service, the next and the previous one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jepakit_service.faults import ApiError, unavailable
from jepakit_service.models.model import LoadedModel

Stamp = tuple[tuple[str, int, int], ...]
"""A folder's files: names, sizes, times of their last change."""
UpdateState = Literal["incomplete", "loading", "waiting", "failed"]


@dataclass
class Versions:
    """The versions that a replica has of one name. `failed` holds, by digest, why a version was refused."""

    current: LoadedModel | None = None
    next: LoadedModel | None = None
    previous: LoadedModel | None = None
    failed: dict[str, str] = field(default_factory=dict)
    update: Update | None = None
    folder: Path | None = None
    """Where a bundle of this name was seen last."""
    absent: int = 0
    """How many looks in a row found no such bundle."""
    incomplete: Incomplete | None = None
    expected: bool = False
    """Whether the bundle was here but incomplete when the replica started: others may have it in service."""

    def loaded(self) -> list[LoadedModel]:
        """All versions that can answer."""
        return [model for model in (self.current, self.next, self.previous) if model is not None]


@dataclass(frozen=True)
class Update:
    """Another version than the one in service, and how far it is."""

    digest: str
    state: UpdateState
    """`incomplete` on disk, `loading`, `waiting` for the other replicas, or `failed`."""
    reason: str | None = None


@dataclass(frozen=True)
class Incomplete:
    """A version on disk whose files, in the state `stamp`, failed verification at `since` (`time.monotonic`)."""

    update: Update
    stamp: Stamp
    since: float


@dataclass(frozen=True)
class VersionsState:
    """What replicas tell each other about one name: digests only."""

    current: str | None
    loaded: tuple[str, ...]
    failed: dict[str, str]
    update: Update | None


NO_MODEL = "no model is in service: the service's log says what became of the bundles"


class Registry:
    """Looks up models by name; names never become paths."""

    def __init__(self) -> None:
        self._by_name: dict[str, Versions] = {}

    def __iter__(self) -> Iterator[LoadedModel]:
        """The models in service, by name."""
        for _, versions in sorted(self._by_name.items()):
            if versions.current is not None:
                yield versions.current

    def versions(self, name: str) -> Versions:
        """The versions of a name, created if it is new."""
        return self._by_name.setdefault(name, Versions())

    def names(self) -> list[str]:
        """All names, in service or not yet."""
        return sorted(self._by_name)

    def forget(self, name: str) -> Versions:
        """Take a name out of service; returns its versions, for closing."""
        return self._by_name.pop(name)

    def find(self, asked: str | None) -> LoadedModel:
        """The model NAME or NAME@MODEL_ID; without a name, the only one in service. Raises ApiError 400, 404 or 503."""
        if not asked:
            serving = list(self)
            if len(serving) == 1:
                return serving[0]
            if not serving:
                raise unavailable("not_ready", NO_MODEL)
            raise ApiError(
                400, "model_missing", f"several models are loaded, name one of them: {self._known()}", param="model"
            )
        name, at, pinned = asked.partition("@")
        if at and not pinned:
            raise ApiError(
                400,
                "invalid_request",
                f"{asked[:100]!r} pins no MODEL_ID: give one after the @, or leave the @ out",
                param="model",
            )
        versions = self._by_name.get(name, Versions())
        if pinned:
            for model in versions.loaded():
                if model.model_id == pinned:
                    return model
        elif versions.current is not None:
            return versions.current
        if versions.current is not None:
            raise ApiError(
                404,
                "model_not_found",
                f"{name} is {versions.current.model_id} here, not {pinned[:32]!r}",
                param="model",
            )
        if versions.expected:
            raise unavailable("not_ready", f"{name} is not in service here yet: its bundle on disk does not pass")
        if versions.update is not None:
            raise _not_in_service(name, versions.update)
        raise ApiError(
            404, "model_not_found", f"no model {name[:100]!r} is loaded here (loaded: {self._known()})", param="model"
        )

    def _known(self) -> str:
        return ", ".join(model.name for model in self) or "none"

    def state(self) -> dict[str, VersionsState]:
        """What the other replicas need to know."""
        return {
            name: VersionsState(
                versions.current.digest if versions.current else None,
                tuple(model.digest for model in versions.loaded()),
                dict(versions.failed),
                versions.update,
            )
            for name, versions in self._by_name.items()
        }


def _not_in_service(name: str, update: Update) -> ApiError:
    """404 for a name whose first version is not in service yet, or was refused (code `model_refused`)."""
    code = "model_refused" if update.state == "failed" else "model_not_found"
    reason = "" if update.reason is None else f": {update.reason}"
    return ApiError(
        404, code, f"{name} is not in service: its version {update.digest} is {update.state}{reason}", param="model"
    )
