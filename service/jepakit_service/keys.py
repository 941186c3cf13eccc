"""API keys: only their SHA-256 is stored, compared in constant time, reread when the file changes."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from pathlib import Path

from jepakit.errors import ConfigError

_LINE = re.compile(r"^([A-Za-z0-9._-]+):([0-9a-f]{64})$")


def new_key(name: str) -> tuple[str, str]:
    """A fresh random key, and the line `name:sha256` for the key file."""
    key = f"jk_{secrets.token_urlsafe(32)}"
    line = f"{name}:{hashlib.sha256(key.encode()).hexdigest()}"
    if not _LINE.match(line):
        raise ConfigError(f"{name!r} is no name for a key: use letters, digits, '.', '_' and '-'")
    return key, line


class KeyFile:
    """The keys of one file. Raises ConfigError for a file that is not one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp, self._keys = self._read()

    def name_of(self, key: str) -> str | None:
        """The name of a key of the file, None for any other; in a time that does not depend on which or how nearly."""
        self._reread_if_changed()
        digest = hashlib.sha256(key.encode()).hexdigest()
        # Every line is compared, so that time tells nothing.
        names = [name for name, known in self._keys if hmac.compare_digest(digest, known)]
        return names[0] if names else None

    def _reread_if_changed(self) -> None:
        try:
            if self._now() != self._stamp:
                self._stamp, self._keys = self._read()
        except (OSError, ConfigError):
            return  # a file half-written or gone: the keys last read stay in force

    def _now(self) -> tuple[int, int]:
        status = self._path.stat()
        return status.st_mtime_ns, status.st_size

    def _read(self) -> tuple[tuple[int, int], list[tuple[str, str]]]:
        stamp = self._now()
        keys = []
        for number, line in enumerate(self._path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            match = _LINE.match(line.strip())
            if match is None:
                raise ConfigError(
                    f"{self._path} line {number} is not `name:sha256`: make lines with `jepakit serve --new-key NAME`"
                )
            keys.append((match[1], match[2]))
        if not keys:
            raise ConfigError(f"{self._path} holds no key: add a line made with `jepakit serve --new-key NAME`")
        return stamp, keys
