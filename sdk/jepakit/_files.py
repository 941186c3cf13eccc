"""Paths that users name, and files and folders written so that a crash leaves the old one or the new one, never half of it."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from jepakit.errors import ConfigError, WriteError


def as_path(value: object, name: str) -> Path:
    """A user's path, `~` in front read as the home folder; ConfigError names the argument for anything else."""
    if isinstance(value, str | os.PathLike) and os.fspath(value):
        return Path(with_home(value))
    raise ConfigError(f"{name} = {value!r}: give a path")


def with_home(path: str | os.PathLike[str]) -> str:
    """A path's text with the home folder in place of a leading `~`, as a shell does it; an unknown user's stays."""
    return os.path.expanduser(path)  # noqa: PTH111 (Path's raises where there is no such home)


def prepare_place(path: Path) -> None:
    """Make the folder that `path` is to lie in, before the work; ConfigError where nothing can be written there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({reason_of(error)}): name another --out") from None


@contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """`replacing` for a file that a user named, its folder made where it is missing; WriteError where that cannot be."""
    if not path.name:  # "." and "/"
        raise WriteError(f"{path} cannot be written (it is a folder): name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            yield file
    except OSError as error:
        raise WriteError(f"{path} cannot be written ({reason_of(error)}): make room, or name another place") from None


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write to the yielded file; it takes the place of `path` when the block ends well."""
    # Two containers on one shared folder have the same process ids.
    temporary = path.with_name(f".tmp-{secrets.token_hex(4)}-{path.name}")
    try:
        with temporary.open("xb") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def making_folder(path: Path) -> Iterator[Path]:
    """Fill the yielded folder with files; flushed to the disk, it is renamed to `path` when the block ends well.

    OSError where anything cannot be written, or `path` is there already and not an empty folder.
    """
    temporary = path.with_name(f".tmp-{path.name}-{secrets.token_hex(4)}")
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            fsync(file)
        fsync(temporary)
        temporary.rename(path)
        fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def reason_of(error: Exception) -> str:
    """Why it failed, in the system's words where the system gave some."""
    return getattr(error, "strerror", None) or str(error)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex, without holding them in memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk; Windows opens no folders, and flushes only what may be written."""
    windows = os.name == "nt"
    if windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
