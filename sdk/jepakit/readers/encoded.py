"""An encoded image: a file on disk or bytes in memory, with its first bytes already read."""

from __future__ import annotations

import io
import math
import stat
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from jepakit._files import reason_of
from jepakit.errors import ImageError

HEAD = 4096
_MOST_READS, _BYTES_A_READ = 1 << 16, 512
"""Most reads of any file, and one more for every so many bytes. A chunk or segment takes up to four; writers make them 8 KB or more."""
_CUT_SHORT = "the file ends before its pixels do"
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

    def stored(self, offset: int, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Stored:
        """The array at `offset`, not read yet; ValueError if the file ends before it does."""
        if offset < 0 or offset + math.prod(shape) * dtype.itemsize > self.size:
            raise ValueError(_CUT_SHORT)
        return Stored(self, offset, shape, dtype)


@dataclass(frozen=True)
class Stored:
    """An uncompressed array in a file, in C order. It is read, never mapped: a process that touches a mapped page of a
    file that was cut short meanwhile is killed."""

    encoded: Encoded
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]

    def read(self, part: tuple[slice, ...]) -> NDArray[np.generic]:
        """A part, a slice with both ends for each axis; may be read-only. ValueError if the file ends before it does."""
        if self.encoded.data is not None:
            count = math.prod(self.shape)
            return np.frombuffer(self.encoded.data, self.dtype, count, self.offset).reshape(self.shape)[part]
        shape = tuple(each.stop - each.start for each in part)
        # The last axis that is not read from end to end: each run of it is in one piece.
        last = max((axis for axis, wanted in enumerate(shape) if wanted != self.shape[axis]), default=0)
        run = math.prod(shape[last:])
        steps = [math.prod(self.shape[axis + 1 :]) for axis in range(len(shape))]
        first = sum(each.start * step for each, step in zip(part, steps, strict=True))
        if last == 0:
            return self._read_run(first, run).reshape(shape)
        ahead = np.indices(shape[:last]).reshape(last, -1).T @ steps[:last]
        data = b"".join(self._read(first + start, run) for start in ahead.tolist())
        return np.frombuffer(data, self.dtype).reshape(shape)

    def _read_run(self, first: int, count: int) -> NDArray[np.generic]:
        """`count` values from the value `first` on."""
        self.encoded.file.seek(self.offset + first * self.dtype.itemsize)
        values = np.fromfile(self.encoded.file, self.dtype, count)
        if len(values) < count:
            raise ValueError(_CUT_SHORT)
        return values

    def _read(self, first: int, count: int) -> bytes:
        """As `_read_run`, but the bytes: quicker for few values."""
        self.encoded.file.seek(self.offset + first * self.dtype.itemsize)
        data = self.encoded.file.read(count * self.dtype.itemsize)
        if len(data) < count * self.dtype.itemsize:
            raise ValueError(_CUT_SHORT)
        return data


class Counted:
    """A file for a library that goes through its pieces one by one; raises `refusal` at the first read of too many."""

    def __init__(self, file: Any, most: int, refusal: ImageError) -> None:
        self._read, self.seek, self.tell = file.read, file.seek, file.tell
        self.left, self.refusal = most, refusal

    def read(self, size: int = -1) -> bytes:
        """Read and count."""
        self.left -= 1
        if self.left < 0:
            raise self.refusal
        data: bytes = self._read(size)
        return data


def of_few_pieces(encoded: Encoded) -> Counted:
    """The file, its reads counted: Pillow reads each chunk of a PNG or segment of a JPEG by itself. ImageError at too many."""
    refusal = ImageError(
        f"{encoded.name}: it consists of tens of thousands of tiny pieces: save it again", code="too_large"
    )
    return Counted(encoded.file, _MOST_READS + encoded.size // _BYTES_A_READ, refusal)


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
        if not stat.S_ISREG(mode := path.stat().st_mode) and not stat.S_ISDIR(mode):
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
