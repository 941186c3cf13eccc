"""An encoded image: a file on disk or bytes in memory, with its first bytes already read."""

from __future__ import annotations

import io
import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from jepakit._files import reason_of
from jepakit.errors import ImageError

HEAD = 4096
EncodedSource = str | Path | bytes | bytearray | memoryview
"""A file, or the bytes of one."""


@dataclass(frozen=True)
class Encoded:
    """`file` is open for reading and seekable; `data` is None for a file on disk."""

    name: str
    file: BinaryIO
    size: int
    head: bytes
    data: bytes | None = None

    def array(self, offset: int, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
        """The values at `offset`, memory-mapped, not read; ValueError if the file ends before them."""
        count = math.prod(shape)
        if offset < 0 or offset + count * dtype.itemsize > self.size:
            raise ValueError("the file ends before its pixels do")
        if self.data is None:
            return np.memmap(self.file, dtype, "r", offset, shape)
        return np.frombuffer(self.data, dtype, count, offset).reshape(shape)


def open_encoded(source: EncodedSource, name: str | None) -> Encoded:
    """Open a path or bytes; ImageError if the file does not exist or is not a regular file."""
    if isinstance(source, str | Path):
        return _open_path(Path(source), name or str(source))
    data = bytes(source)
    return Encoded(name or "image", io.BytesIO(data), len(data), data[:HEAD], data)


def _open_path(path: Path, name: str) -> Encoded:
    if "\0" in str(path):
        raise ImageError(f"{name!r}: cannot be read (not a path)", code="unreadable")
    try:
        # A pipe would block forever, a device would never end.
        if path.exists() and not path.is_dir() and not path.is_file():
            raise ImageError(f"{name}: cannot be read (not a regular file)", code="unreadable")
        with ExitStack() as if_it_fails:
            file = if_it_fails.enter_context(path.open("rb"))
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            encoded = Encoded(name, file, size, file.read(HEAD))
            if_it_fails.pop_all()
    except OSError as error:
        raise ImageError(f"{name}: cannot be read ({reason_of(error)})", code="unreadable") from None
    return encoded
