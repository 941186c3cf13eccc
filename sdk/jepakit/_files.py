"""Paths given by users, and atomic writes: a crash leaves the old file or folder or the new one, never half of it."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from jepakit.errors import ConfigError, WriteError

# Some network file systems (Lustre without `-o flock`, old NFS) have none.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def as_path(value: object, name: str) -> Path:
    """A path given by a user, with a leading `~` expanded; ConfigError names the argument for anything else."""
    if isinstance(value, str | os.PathLike) and os.fspath(value):
        return Path(with_home(value))
    raise ConfigError(f"{name} = {value!r}: give a path")


def with_home(path: str | os.PathLike[str]) -> str:
    """The text of a path with a leading `~` expanded as in a shell; that of an unknown user is kept."""
    return os.path.expanduser(path)  # noqa: PTH111 (Path's raises where there is no such home)


def prepare_place(path: Path) -> None:
    """Create the parent folder of `path` before the work; ConfigError if nothing can be written there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _beside(path)
        temporary.mkdir()
        temporary.rmdir()
    except (OSError, ValueError) as error:  # ValueError: a null byte
        raise ConfigError(f"{path} cannot be written ({reason_of(error)}): name another place") from None


def lock_file(descriptor: int, *, wait: bool = False) -> bool:
    """Lock an open file until it is closed; False where there are no locks: on some file systems, and on Windows.

    Raises BlockingIOError if another holds the lock and it is not waited for.
    """
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


@contextmanager
def holding(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Lock a folder, alone or with others that share it. No effect on file systems that cannot lock folders, as over a network.

    Raises BlockingIOError if somebody else holds the lock and it is not to be shared: waiting for it in the kernel would
    keep a process from ending.
    """
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


@contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """`replacing` for a file named by a user, creating its folder if missing; WriteError if it cannot be written."""
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
    """Write to the yielded file; it replaces `path` when the block ends without an error."""
    # Not named by process id: containers sharing a folder can have the same ones.
    temporary = path.with_name(f".tmp-{secrets.token_hex(4)}-{path.name}")
    try:
        with temporary.open("xb") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def making_folder(path: Path) -> Iterator[Path]:
    """Fill the yielded folder with files; when the block ends without an error, it is flushed and renamed to `path`.

    OSError when something cannot be written, or `path` already exists and is not an empty folder.
    """
    temporary = _beside(path)
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


def _beside(path: Path) -> Path:
    """A new hidden name, longer than that of `path`, in the same folder."""
    return path.with_name(f".tmp-{path.name}-{secrets.token_hex(4)}")


def reason_of(error: Exception) -> str:
    """The reason for an error: the operating system's words if it gave any, else the message."""
    return getattr(error, "strerror", None) or str(error)


def sha256(data: bytes) -> str:
    """The SHA-256 of some bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex, without holding them in memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Flush a file or a folder's entries to disk; Windows opens no folders, and flushes only files open for writing."""
    windows = os.name == "nt"
    if windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
