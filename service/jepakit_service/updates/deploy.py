"""`jepakit deploy`: put a new version into the folder that a service watches, and take it out again if it is refused.

The service is told nothing over HTTP: it notices the change, checks the bundle, and reports the result in `/v1/models`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jepakit._files import fsync, holding, reason_of
from jepakit._say import say
from jepakit._signals import handled
from jepakit.bundles.bundle import GRAPH, MANIFEST, Bundle, bundles_inside, is_bundle, open_bundle
from jepakit.client import Client, ModelInfo
from jepakit.errors import BundleError, DataError, InputError, NotFoundError, ServeError, WriteError

_POLL_S, _LONGEST_SILENCE_S = 0.5, 30.0
_PREFIX, _OLD = ".deploy-", ".old"


class Deployed(NamedTuple):
    """The service's description of the model once every replica serves it, and that of the version it replaced."""

    model: ModelInfo
    replaced: ModelInfo | None
    beside: tuple[str, ...]
    """Names of the other models in service."""


def deploy(source: Path, folder: Path, url: str, *, timeout_s: float) -> Deployed:
    """Copy, swap, wait, then keep or undo; returns what is in service afterwards.

    Raises BundleError for a bundle that is incomplete or not exported, DataError if `folder` is not a folder of bundles
    or not the watched one, WriteError if it cannot be written to, ConnectionFailedError if there is no service, and
    ServeError if another deploy is running, or the service refuses the version or takes too long. The folder is then as
    it was, or a message says where the old version lies if it could not be put back.
    """
    bundle = open_bundle(source)
    bundle.require(GRAPH)
    bundle.verify()
    if not folder.is_dir() or is_bundle(folder):
        raise DataError(f"{folder} is not a folder of bundles: name the one that `jepakit serve` watches")
    with Client(url, deadline_s=_LONGEST_SILENCE_S) as client:
        before = client.models()
        try:
            with _alone(folder):
                _recover(folder, bundle.name)
                target = _place(bundle, folder)
                _check_watched(before, bundle, target)
                _wait_until_forgotten(client, bundle, target)
                with _swapped(bundle, target):
                    model = _wait_for_switch(client, bundle, timeout_s)
                _sweep(folder, bundle.name)
                served = {old.name: old for old in before}
                return Deployed(model, served.pop(model.name, None), tuple(sorted(served)))
        except OSError as error:
            raise WriteError(
                f"nothing was changed, {folder} cannot be written to ({reason_of(error)}): "
                "make room there, or deploy as a user who may write there"
            ) from None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lock the folder against other deploys: two would undo each other's work. ServeError if one is at work."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(holding(folder))
        except BlockingIOError:
            raise ServeError(f"another deploy is running in {folder}: wait for it, or stop it") from None
        yield


def _recover(folder: Path, name: str) -> None:
    """After deploys that were killed: put back an old version of `name` that nothing has replaced, and remove unfinished
    copies."""
    for left in sorted(folder.glob(f"{_PREFIX}*"), key=lambda path: path.lstat().st_ctime, reverse=True):
        if left.suffix != _OLD:
            _remove(left)
            continue
        with contextlib.suppress(InputError):  # damaged, or something else is in its place
            old = open_bundle(left)
            if old.name == name and not (target := _place(old, folder)).exists():
                left.rename(target)
                say(f"{target} is put back: a deploy that was ended early had moved it aside")


def _sweep(folder: Path, name: str) -> None:
    """Remove old versions that killed deploys have left, now that another one is in service."""
    for old in folder.glob(f"{_PREFIX}*{_OLD}"):
        if not is_bundle(old) or _name_of(old) == name:
            _remove(old)


def _remove(folder: Path) -> None:
    """Remove a folder, or a link to one, if it is there; warn of what this user may not remove."""
    if folder.is_symlink():
        folder.unlink()
        return
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        say(f"warning: {folder} could not be removed: remove it as the user who made it")


def _name_of(path: Path) -> str | None:
    """The bundle's name; None for a damaged one."""
    try:
        return open_bundle(path).name
    except InputError:
        return None


def _place(bundle: Bundle, folder: Path) -> Path:
    """The folder that holds the bundle of this name now, else a new folder of that name."""
    for inside in bundles_inside(folder).bundles:
        if _name_of(inside) == bundle.name:
            return inside
    target = folder / bundle.name
    if target.exists():
        raise BundleError(f"{target} exists and is not {bundle.name}'s bundle: remove it first")
    return target


def _check_watched(models: list[ModelInfo], bundle: Bundle, target: Path) -> None:
    """Raise DataError if the service serves this bundle already, but not from here: waiting would prove nothing."""
    served = next((model.raw for model in models if model.name == bundle.name), {})
    if served.get("serving") != [bundle.digest]:
        return
    refused = (served.get("update") or {}).get("digest")  # put there by hand and refused: may be replaced
    if not target.exists() or open_bundle(target).digest not in (bundle.digest, refused):
        raise DataError(
            f"the service serves this very bundle already, and {target.parent} does not hold it: name the folder that "
            "`jepakit serve` watches, or copy the bundle there yourself"
        )


def _wait_until_forgotten(client: Client, bundle: Bundle, target: Path) -> None:
    """If the service has refused this version before, wait until it no longer reports that: only then does it try again."""
    if target.exists() and open_bundle(target).digest == bundle.digest:
        return
    deadline = time.monotonic() + _LONGEST_SILENCE_S
    while time.monotonic() < deadline:
        try:
            _ask(client, bundle)
            return
        except ServeError:
            time.sleep(_POLL_S)


@contextlib.contextmanager
def _swapped(bundle: Bundle, target: Path) -> Iterator[None]:
    """Put a copy of the bundle in the target's place, flushed to disk; undone if the block fails, also by Ctrl-C."""
    new = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=target.parent))
    old = new.with_suffix(_OLD)
    try:
        _copy(bundle, new)
        if os.path.lexists(target):
            target.rename(old)
        new.rename(target)
        fsync(target.parent)
        yield
    except BaseException:  # the next start must not find a version that is not in service
        with handled((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), signal.SIG_IGN):
            _undo(bundle, target, new, old)
        raise
    _remove(old)


def _copy(bundle: Bundle, new: Path) -> None:
    for name in (*bundle.manifest.files, MANIFEST):
        shutil.copy(bundle.path / name, new / name)
        fsync(new / name)
    shutil.copymode(bundle.path, new)
    fsync(new)
    open_bundle(new).verify()


def _undo(bundle: Bundle, target: Path, new: Path, old: Path) -> None:
    """Restore the target, wherever the swap stopped. ServeError if that fails: `old` is then kept."""
    try:
        with contextlib.suppress(BundleError):  # removed since, or somebody else's
            if not new.exists() and open_bundle(target).digest == bundle.digest:
                target.rename(new)
        if os.path.lexists(old):
            old.rename(target)
    except OSError as error:
        raise ServeError(
            f"{target} could not be restored ({reason_of(error)}): put the old version back yourself, it is in {old}"
        ) from None
    _remove(new)


def _wait_for_switch(client: Client, bundle: Bundle, timeout_s: float) -> ModelInfo:
    """Wait until every replica serves the bundle; ServeError if one refuses it or time runs out."""
    last = "does this service watch this folder? (`jepakit serve FOLDER`)"
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found, told = _ask(client, bundle)
        if found is not None:
            return found
        last = told or last
        time.sleep(_POLL_S)
    raise ServeError(
        f"{bundle.name}: not every replica had switched within {timeout_s:g} s, and the folder was restored: {last}"
    )


def _ask(client: Client, bundle: Bundle) -> tuple[ModelInfo | None, str]:
    """The model if every replica serves the bundle, else None and what the service says about the bundle.

    Raises ServeError if the service refused it.
    """
    name, digest = bundle.name, bundle.digest
    try:
        found = client.model(name)
    except NotFoundError as error:  # a new name only appears once every replica has it
        if digest not in str(error):
            return None, ""
        if error.code == "model_refused":
            raise ServeError(f"the service refused the new version, and it was taken out again: {error}") from None
        return None, str(error)
    update = found.raw.get("update") or {}
    if update.get("digest") != digest:
        if not found.raw.get("all_heard", True):
            return None, "a replica does not answer"
        return (found if found.raw.get("serving") == [digest] else None), ""
    if update["state"] == "failed":
        raise ServeError(f"{name}: the service refused the new version, and the old one stays: {update['reason']}")
    return None, f"it is {update['state']}" + (f": {update['reason']}" if update["reason"] else "")
