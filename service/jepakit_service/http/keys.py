"""API keys: stored only as SHA-256, compared in constant time, reread when the file changes."""

from __future__ import annotations

import errno
import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from jepakit._files import reason_of
from jepakit._messages import first_few
from jepakit.errors import ConfigError

_log = logging.getLogger("jepakit.service")
_MAKE = "make lines with `jepakit serve --new-key NAME`"
_NUMBERS_SHOWN = 10
_NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE)
_LINE = re.compile(r"^([A-Za-z0-9._-]+):([0-9a-f]{64})$")


def new_key(name: str) -> tuple[str, str]:
    """A fresh random key, and the line `name:sha256` for the key file."""
    key = f"jk_{secrets.token_urlsafe(32)}"
    line = f"{name}:{hashlib.sha256(key.encode()).hexdigest()}"
    if not _LINE.match(line):
        raise ConfigError(f"{name!r} cannot be the name of a key: use letters, digits, '.', '_' and '-'")
    return key, line


def append(line: str, path: Path) -> int:
    """Add a line to the key file, creating it if missing; returns how many other keys of that name it holds.

    Raises ConfigError, and leaves the file as it was, if it cannot be written.
    """
    try:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "r+b", buffering=0) as file:
            written = file.read()
            between = "" if not written or written.endswith(b"\n") else "\n"
            _write_whole(file, f"{between}{line}\n".encode(), len(written))
    except OSError as error:
        raise ConfigError(
            f"the API key file {path} cannot be written ({reason_of(error)}): name a file in a folder that exists and that you may write to"
        ) from None
    before, _ = _parse(written.decode("utf-8", "replace"))
    return [key.name for key in before].count(line.partition(":")[0])


def _write_whole(file: FileIO, data: bytes, length: int) -> None:
    """Write to the end of a file of this length; if not all of it can be written, the file keeps its length."""
    try:
        while data:
            data = data[file.write(data) :]
    except OSError:
        file.truncate(length)
        raise


def check(path: Path) -> None:
    """Raise ConfigError for a key file that cannot be read, holds no key, or has an invalid line."""
    try:
        fault = _read(path).fault
    except OSError as error:
        fault = _unreadable(path, error)
    if fault:
        raise ConfigError(fault)


class KeyFile:
    """The keys of one file, reread when it changes. While the file cannot be read, no key is valid.

    If only file descriptors have run out, which says nothing about the file, the keys read last stay valid.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._state: object = None
        self._keys: list[_Key] = []
        self._reread_if_changed()

    def name_of(self, key: str) -> str | None:
        """The name of a key in the file, None for any other. Timing does not reveal which matched, or how nearly."""
        self._reread_if_changed()
        digest = hashlib.sha256(key.encode()).hexdigest()
        # Every line is compared, so that timing reveals nothing.
        names = [known.name for known in self._keys if hmac.compare_digest(digest, known.digest)]
        return names[0] if names else None

    def _reread_if_changed(self) -> None:
        """Reread a changed file and log what is wrong with it, once per change. Retry an unreadable file each time."""
        state: object
        try:
            state = _stamp(self._path)
            if state == self._state:
                return
            self._keys, fault = _read(self._path)
            if self._path.stat().st_mode & stat.S_IWOTH:  # only warned of: some mounts show every file so
                _log.warning("%s", f"anyone here may write to the API key file {self._path}: chmod o-w {self._path}")
        except OSError as error:
            if error.errno in _NO_DESCRIPTOR:
                return
            self._keys, fault = [], _unreadable(self._path, error)
            state = fault
        if fault and state != self._state:
            _log.error("%s", fault)
        self._state = state


class _Key(NamedTuple):
    name: str
    digest: str


class _Found(NamedTuple):
    """The keys of a file's good lines, and what is wrong with it."""

    keys: list[_Key]
    fault: str | None


def _stamp(path: Path) -> tuple[int, int, int]:
    """Changes with the file's content and its permissions."""
    status = path.stat()
    return status.st_ino, status.st_ctime_ns, status.st_size


def _read(path: Path) -> _Found:
    keys, bad = _parse(path.read_text(encoding="utf-8", errors="replace"))
    if bad:
        numbers = first_few(bad, _NUMBERS_SHOWN)
        return _Found(keys, f"the API key file {path} has lines that are not `name:sha256` ({numbers}): {_MAKE}")
    return _Found(keys, None if keys else f"the API key file {path} holds no key: {_MAKE}")


def _parse(text: str) -> tuple[list[_Key], list[str]]:
    """The keys of the good lines, and the numbers of the bad ones."""
    keys, bad = [], []
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        if match := _LINE.match(stripped):
            keys.append(_Key(match[1], match[2]))
        else:
            bad.append(str(number))
    return keys, bad


def _unreadable(path: Path, error: OSError) -> str:
    return f"the API key file {path} cannot be read ({reason_of(error)}): no key counts until this user can read it"
