"""Images inside archives: where each member lies, and the store that reads one without unpacking the others."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jepakit.errors import ImageError
from jepakit.readers import DEFAULT_LIMITS, ImageSource
from jepakit.readers.checks import check_encoded, check_ratio
from jepakit.sources.store import SAMPLE_BYTES, stamp_of

TAR, STORED, DEFLATED = range(3)
_MEMBER = np.dtype("i4, i8, i8, i8, i1, u4")
"""The number of the archive, then the fields of a `Member` without its name."""
_ZIP_HEADER = struct.Struct("<4s22xHH")


class Member(NamedTuple):
    """One image in an archive, as the archive's directory describes it."""

    name: str
    offset: int
    """Offset of the data in a tar, of the local header in a ZIP."""
    stored: int
    """Bytes in the archive."""
    size: int
    """Declared size in bytes, once inflated."""
    kind: int
    """TAR, STORED or DEFLATED."""
    crc: int
    """The ZIP's CRC; 0 for a tar, which has none."""


@dataclass(frozen=True)
class Archives:
    """Members of archives. Every read reopens its archive: this costs microseconds, and leaves no open file for threads
    to share, pickling to lose, or forked workers to mix up."""

    paths: Sequence[str]
    names: Sequence[str]
    members: NDArray[np.void]
    """[N], of `_MEMBER`: for a million members, tuples would take most of the memory."""
    in_memory: ClassVar[bool] = False
    most_threads: ClassVar[None] = None

    @classmethod
    def of(cls, paths: Sequence[str], names: Sequence[str], members: Sequence[Sequence[Member]]) -> Archives:
        """Build from one list of members per path; `names` are those of the members, in that order."""
        rows = ((number, *member[1:]) for number, each in enumerate(members) for member in each)
        return cls(tuple(paths), tuple(names), np.fromiter(rows, _MEMBER))

    def __len__(self) -> int:
        return len(self.names)

    def image(self, index: int) -> ImageSource:
        _, (name, _, stored, size, kind, crc) = self._member(index)
        check_encoded(name, size, DEFAULT_LIMITS)
        check_ratio(name, size, stored, DEFAULT_LIMITS)
        try:
            data = self._read(index, stored)
            if kind == DEFLATED:
                # zlib takes 0 for "no limit".
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, max(1, size))
        except (OSError, zlib.error) as error:
            raise ImageError(f"{name}: cannot be read ({error})", code="unreadable") from None
        if len(data) != size or (kind != TAR and zlib.crc32(data) != crc):
            raise ImageError(
                f"{name}: damaged, or its archive changed after it was listed (its bytes are not those declared)",
                code="unreadable",
            )
        return data

    def stamp(self, index: int) -> str | None:
        path, member = self._member(index)
        return stamp_of(path, member.offset, member.size)

    def fingerprint(self, index: int) -> bytes:
        _, member = self._member(index)
        try:
            return b"%d\0" % member.size + self._read(index, min(SAMPLE_BYTES, member.stored))
        except OSError:
            return b"unreadable"

    def _member(self, index: int) -> tuple[str, Member]:
        """A member, and the path of the archive that holds it."""
        archive, *rest = self.members[index].item()
        return self.paths[archive], Member(self.names[index], *rest)

    def _read(self, index: int, count: int) -> bytes:
        """The first `count` bytes of a member, as stored."""
        path, member = self._member(index)
        with Path(path).open("rb") as file:
            file.seek(member.offset)
            if member.kind != TAR:
                # The local header repeats the name, and its extra fields may differ from the directory's.
                header = file.read(_ZIP_HEADER.size)
                if len(header) < _ZIP_HEADER.size or not header.startswith(b"PK\3\4"):
                    raise OSError("the ZIP's directory points elsewhere")
                _, name_bytes, extra_bytes = _ZIP_HEADER.unpack(header)
                file.seek(member.offset + _ZIP_HEADER.size + name_bytes + extra_bytes)
            return file.read(count)


def names_in_shards(paths: Sequence[str], members: Sequence[Sequence[Member]]) -> tuple[str, ...]:
    """`shard.tar/name`, with the whole path of the shard if two shards have the same name."""
    bases = [Path(path).name for path in paths]
    shards = bases if len(set(bases)) == len(bases) else [Path(path).as_posix() for path in paths]
    return tuple(f"{shard}/{member.name}" for shard, each in zip(shards, members, strict=True) for member in each)
