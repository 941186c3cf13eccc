"""A run's folder: its lock, what it was started with, and whether a command may resume there. Needs no torch, so that a
folder is refused at once."""

from __future__ import annotations

import json
import os
import platform
import socket
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import tomli_w

from jepakit._extras import versions_of
from jepakit._files import lock_file, reason_of, replacing
from jepakit._messages import counted
from jepakit._run_files import BUNDLE, CONFIG, ENVIRONMENT, PLAN, SKIPPED, SPLIT, START
from jepakit._say import say
from jepakit.config import START_WORDS, AdaptConfig, flattened
from jepakit.errors import ConfigError, DataError, WriteError
from jepakit.run import is_run, read_record
from jepakit.sources import ImageList
from jepakit.sources.table import RULES
from jepakit_training import ranks

# These may differ between a run and its resumption: they do not change the result, or only its rounding. The images are
# compared by digest; where they are stored does not matter.
FREE_SETTINGS = frozenset({
    "images", "out", "workers", "save_every_s", "augment_on", "cache_gb", "most_skipped", "processes", "launcher", "trackers",
    "micro_batch", "activation_checkpointing", "compile",
})  # fmt: skip
LOCK = ".lock"
# Holds the output of Ray's processes while they train; not a leftover, unlike the .tmp-* of a killed process.
RAY_FOLDER = ".ray-"
_PACKAGES = (
    "jepakit", "torch", "torchvision", "timm", "peft", "accelerate", "numpy", "pillow", "tifffile", "imagecodecs", "pydicom",
    "python-gdcm",
)  # fmt: skip
_held: set[int] = set()


@contextmanager
def locked(out: Path, *, main: bool = True) -> Iterator[None]:
    """Lock the run's folder, creating it if missing, so that no other trainer can write to it.

    main  whether this process is the one that holds the lock for all

    The system releases it when the process ends, however it ends. Raises ConfigError when another process holds the
    lock, or when nothing can be written there.
    """
    if not main:
        yield
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(out / LOCK)
    except BlockingIOError:
        raise ConfigError(
            f"{out} is in use by {_holder(out)}, which trains there: wait for it or stop it, or name another folder for the run"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{out} cannot be written to ({reason_of(error)}): name another folder for the run"
        ) from error
    _held.add(descriptor)
    try:
        yield
    finally:
        (out / LOCK).unlink(missing_ok=True)
        _held.discard(descriptor)
        os.close(descriptor)


def _holder(out: Path) -> str:
    """Who holds the lock on the run's folder, in words."""
    words = ""
    with suppress(FileNotFoundError):  # it has been released since
        words = (out / LOCK).read_text(encoding="utf-8").strip()
    return words or "another process"


def _lock(path: Path) -> int:
    """An open, locked descriptor of the file at `path`, which says who holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            is_locked = lock_file(descriptor)
        except OSError:
            os.close(descriptor)
            raise
        if not is_locked:
            say(f"warning: {path.parent} lies where files cannot be locked: start no second run on it")
        # The last holder may have removed the file between our two calls: then we hold a lock on a deleted file.
        if os.fstat(descriptor).st_nlink:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            return descriptor
        os.close(descriptor)


def _close_locks() -> None:
    """In a forked child: loader processes outlive a killed trainer by seconds, and would keep the folder locked."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_close_locks)


def check_folder(out: Path, config: AdaptConfig) -> None:
    """Check that `out` can hold this run: a new one, or one that was started with the same settings.

    Raises ConfigError naming what is in the way or differs.
    """
    if has_begun(out):
        # The tensors of an unfinished run's weights are compared before it goes on (`bundles.check_start`).
        unfinished = not (out / BUNDLE).exists()
        if changed := _changed_settings(out, config, weights_may_move=unfinished):
            other = _other_version(out)
            by = f" by jepakit {other}, and this is {versions()['jepakit']}" if other else ""
            raise ConfigError(f"{out} was started with other settings ({'; '.join(changed)}){by}; {_go_on(out)}")
        return
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file, and a run is a folder: name another folder for the run")
    # Until the start has been measured, nothing is worth keeping: a corrected command may start over.
    strangers = _strangers(out) if out.is_dir() else []
    if strangers:
        raise ConfigError(
            f"{out} is not empty and is not a run (it holds {strangers[0]}): name another folder for the run"
        )


def open_folder(out: Path, config: AdaptConfig, images: ImageList) -> None:
    """Start the run's folder, or check that an existing one was started with the same settings and data.

    Raises ConfigError or DataError naming what differs, WriteError if nothing can be written there.
    """
    check_folder(out, config)
    if has_begun(out):
        _check_same(out, images)
        if not (out / BUNDLE).exists():
            _tell_other_versions(out)
        return
    environment = {
        "versions": versions(),
        "platform": platform.platform(),
        "data": images.digest(),
        "images": len(images),
        "processes": ranks.world_size(),
    }
    with must_write(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / SKIPPED).unlink(missing_ok=True)
        # In this order: a folder with settings alone counts as the user's own.
        write_atomically(out / ENVIRONMENT, json.dumps(environment, indent=1))
        write_atomically(out / CONFIG, _as_toml(config))


def _tell_other_versions(out: Path) -> None:
    """Warn of packages whose versions differ from those that the run in `out` was started with."""
    then, now = _environment(out).get("versions", {}), versions()
    changed = [
        f"{name} {then.get(name, 'none')}, now {now.get(name, 'none')}"
        for name in _PACKAGES
        if then.get(name) != now.get(name)
    ]
    if changed:
        say(
            f"warning: {out} was started with other packages ({'; '.join(changed)}): the result may differ from an unbroken run's"
        )


def keep_settings(out: Path, config: AdaptConfig) -> None:
    """Record a resumed run's settings anew if weights or tables have moved: `find_begun` finds the run by them.

    Raises WriteError if nothing can be written there.
    """
    text = _as_toml(config)
    if (out / CONFIG).read_text(encoding="utf-8") != text:
        with must_write(out):
            write_atomically(out / CONFIG, text)


@contextmanager
def must_write(out: Path) -> Iterator[None]:
    """A block that writes to the run's folder; WriteError if that fails."""
    try:
        yield
    except OSError as error:
        raise WriteError(
            f"{out} cannot be written to ({reason_of(error)}): make room there, then run the same command again, or name "
            "another folder for the run"
        ) from error


def has_begun(out: Path) -> bool:
    """Whether there is a run whose start was measured."""
    return is_run(out) and (out / START).exists()


def find_begun(folders: Iterable[Path], config: AdaptConfig, images: ImageList) -> Path | None:
    """The first of `folders` that holds a run of the same settings and images, finished or not."""
    return next((out for out in folders if _is_same_run(out, config, images)), None)


def _is_same_run(out: Path, config: AdaptConfig, images: ImageList) -> bool:
    try:
        return (
            not _changed_settings(out, config, weights_may_move=False)
            and _environment(out).get("data") == images.digest()
        )
    except DataError:
        return False


def _strangers(out: Path) -> list[str]:
    """Names in `out` that no trainer left there. Without our environment.json, settings are the user's own."""
    try:
        ours = {LOCK, ENVIRONMENT, CONFIG, PLAN, SPLIT, SKIPPED} if "data" in _environment(out) else {LOCK}
    except DataError:
        ours = {LOCK}
    names = (path.name for path in out.iterdir())
    return [name for name in names if name not in ours and not name.startswith((".tmp-", RAY_FOLDER))]


def _check_same(out: Path, images: ImageList) -> None:
    go_on, environment = _go_on(out), _environment(out)
    if (processes := environment.get("processes", ranks.world_size())) != ranks.world_size():
        again = f"have the launcher start {processes}" if ranks.has_launcher() else f"say processes={processes}"
        raise ConfigError(
            f"{out} was started by {counted(processes, 'process')}, now there are {ranks.world_size()}: {again}, or {go_on}"
        )
    if environment.get("data") != images.digest():
        raise DataError(
            f"the images are not those {out} was started with (files, labels or groups were added, removed or changed); {go_on}"
        )


def _go_on(out: Path) -> str:
    """What to do if a run cannot be resumed."""
    more = f"; to go on from it: weights={out / BUNDLE}, out=NEW" if (out / BUNDLE).exists() else ""
    return f"name another folder for the run{more}"


def _as_toml(config: AdaptConfig) -> str:
    """The settings as config.toml holds them; TOML is UTF-8, and a path need not be."""
    settings = config.resolved().model_dump(mode="json", exclude_none=True)
    return tomli_w.dumps(settings).encode("utf-8", "replace").decode()


def _defaults(config: AdaptConfig) -> dict[str, Any]:
    """The default settings of this domain, as `_compared` gives them."""
    plain = AdaptConfig(images=config.images, domain=config.domain)
    return _compared(tomllib.loads(_as_toml(plain)), weights_may_move=False)


def _other_version(out: Path) -> str:
    """The version of jepakit that started the run in `out`; empty if it is this one."""
    then = _environment(out).get("versions", {}).get("jepakit")
    return "" if then == versions()["jepakit"] else str(then)


def _changed_settings(out: Path, config: AdaptConfig, *, weights_may_move: bool) -> list[str]:
    """How the settings differ from those that the run in `out` was started with, in words.

    weights_may_move  whether another path of the weights does not count as a difference

    Raises DataError if its config.toml is missing or damaged.
    """
    both = _read(out / CONFIG, tomllib.loads), tomllib.loads(_as_toml(config))
    before, now = (_compared(each, weights_may_move=weights_may_move) for each in both)
    if (out / BUNDLE).exists():  # it is only reported: it need not have settings that its version did not know
        before = {**_defaults(config), **before}
    return [
        f"{key} was {before.get(key)!r}, now {now.get(key)!r}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]


def _compared(settings: dict[str, Any], *, weights_may_move: bool) -> dict[str, Any]:
    """The settings of a config.toml that must stay the same for a resumed run."""
    flat = flattened(settings)
    # The place of the cache does not matter, but its presence does: it holds images already downscaled.
    flat["cache"] = "cache" in settings
    # Nor does the place of the tables: the images' digest covers their content.
    movable = {"labels": RULES, "group": RULES, **({"weights": START_WORDS} if weights_may_move else {})}
    flat |= {name: "a file" for name, words in movable.items() if flat.get(name) not in words}
    return {name: value for name, value in flat.items() if name not in FREE_SETTINGS}


def _environment(out: Path) -> dict[str, Any]:
    return _read(out / ENVIRONMENT, json.loads)


def _read(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    return read_record(path, parse, f"put it back, or {_go_on(path.parent)}")


def versions() -> dict[str, str]:
    """Versions of the packages that can affect a result, decoders included."""
    return versions_of(_PACKAGES)


def write_atomically(path: Path, text: str) -> None:
    """Write the file completely or not at all."""
    with replacing(path) as file:
        file.write(text.encode("utf-8", "surrogateescape"))
