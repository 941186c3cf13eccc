"""`jepakit deploy`: a new version into the folder that a service watches, and back out when the service refuses it.

Nothing is told to the service over HTTP: it sees the folder, checks what is in it, and says in `/v1/models` what came of it.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from pathlib import Path

from jepakit.bundle import GRAPH, Bundle, open_bundle
from jepakit.client import Client, ModelInfo
from jepakit.errors import BundleError, DataError, InputError, NotFoundError, ServeError
from jepakit_service.models import bundles_inside

_POLL_S, _LONGEST_SILENCE_S = 0.5, 30.0


def deploy(source: Path, folder: Path, url: str, *, timeout_s: float) -> ModelInfo:
    """Copy, swap, wait, and keep or undo; returns what the service then says of the model.

    Raises BundleError for a bundle that is not whole or not exported, DataError for a folder that is none,
    ConnectionFailedError when there is no service, ServeError when it refuses the version or takes too long: the folder is
    then as it was.
    """
    bundle = open_bundle(source)
    bundle.check(GRAPH)
    bundle.verify()
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: name the one that `jepakit serve` watches")
    with Client(url, deadline_s=_LONGEST_SILENCE_S) as client:
        client.models()
        target = _place(bundle, folder)
        aside = Path(tempfile.mkdtemp(prefix=".deploy-", dir=folder))
        try:
            shutil.copytree(source, aside / "new")
            open_bundle(aside / "new").verify()
            _swap(aside / "new", target, aside / "old")
            try:
                return _switched(client, bundle, timeout_s)
            except BaseException:  # Ctrl-C too: what is not in service must not be what the next start finds
                _undo(target, aside / "old", aside / "refused")
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _place(bundle: Bundle, folder: Path) -> Path:
    """The folder that holds this name now, else a new one of the name."""
    for inside in bundles_inside(folder):
        with contextlib.suppress(InputError):
            if open_bundle(inside).manifest.name == bundle.manifest.name:
                return inside
    target = folder / bundle.manifest.name
    if target.exists():
        raise BundleError(f"{target} exists and is not {bundle.manifest.name}'s bundle: remove it first")
    return target


def _swap(new: Path, target: Path, old: Path) -> None:
    if target.exists():
        target.rename(old)
    new.rename(target)


def _undo(target: Path, old: Path, refused: Path) -> None:
    target.rename(refused)
    if old.exists():
        old.rename(target)


def _switched(client: Client, bundle: Bundle, timeout_s: float) -> ModelInfo:
    """Wait until every replica serves the bundle; ServeError when one refuses it."""
    name, digest = bundle.manifest.name, bundle.digest
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            found = client.model(name)
        except NotFoundError:  # a new name is not there before every replica has it
            time.sleep(_POLL_S)
            continue
        update = found.raw.get("update") or {}
        if update.get("digest") == digest and update.get("state") == "failed":
            raise ServeError(f"{name}: the service refused the new version, and the old one stays: {update['reason']}")
        if found.raw.get("serving") == [digest]:
            return found
        time.sleep(_POLL_S)
    raise ServeError(
        f"{name}: not every replica had switched within {timeout_s:g} s, and the old version was put back: "
        "does this service watch this folder? (`jepakit serve FOLDER`)"
    )
