"""What an encoded picture declares, checked so that no decoder fills the memory or takes minutes: its size and its scans."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

from jepakit.errors import ImageError

# Markers without a length: fill bytes, TEM, restart and start of image.
_BARE = frozenset({0xFF, 0x01, 0xD8, *range(0xD0, 0xD8)})
# Start of frame: baseline to differential, without the tables C4, C8 and CC; F7 is JPEG-LS.
_FRAME = frozenset({*range(0xC0, 0xD0), 0xF7}) - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL, _SCAN, _END = (0xC0, 0xC1), 0xDA, 0xD9
_SEGMENT = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")
"""The end, or a marker with a length. Decoders pass over all others, and over what stands between segments."""
_MOST_SCANS = 100
"""Most scans of a JPEG, as in libtiff: encoders write about 10."""
_MOST_SEGMENTS = 65_535
"""Most of its segments, which Python goes through one by one."""


def claimed_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG, JPEG-LS or JPEG 2000 stream; None for any other, or one cut short."""
    try:
        if data[:2] == b"\xff\xd8":
            return _jpeg(data)
        if data[:4] == b"\xff\x4f\xff\x51":
            return _jpeg2000(data)
        if data[4:8] == b"jP  ":
            return _jp2(data)
    except struct.error:
        pass
    return None


def refuse_scans(data: bytes, name: str) -> None:
    """Refuse a JPEG of many scans: decoders go through the whole image for each, however few bytes it takes."""
    if data[:2] != b"\xff\xd8":
        return
    scans, bands = 0, b""
    for segments, (marker, at) in enumerate(_segments(data)):
        if marker in _SEQUENTIAL:
            bands = data[at + 7 : at + 8]
        elif marker == _SCAN and not scans and data[at + 2 : at + 3] == bands:
            return  # it holds all there is, and decoders read no further
        scans += marker == _SCAN
        if scans > _MOST_SCANS:
            raise _too_many(name, f"{_MOST_SCANS} scans, where about 10")
        if segments > _MOST_SEGMENTS:
            raise _too_many(name, f"{_MOST_SEGMENTS:,} segments, where dozens")


def _too_many(name: str, seen: str) -> ImageError:
    return ImageError(f"{name}: a JPEG of over {seen} are usual: save it again", code="too_large")


def _segments(jpeg: bytes) -> Iterator[tuple[int, int]]:
    """The marker of each segment up to the end marker, and where its length stands."""
    at = 2
    while (found := _SEGMENT.search(jpeg, at)) and (marker := jpeg[found.end() - 1]) != _END:
        yield marker, found.end()
        at = found.end() + max(2, int.from_bytes(jpeg[found.end() : found.end() + 2]))


def _jpeg(data: bytes) -> tuple[int, int] | None:
    at = 2
    while True:
        fill, marker = struct.unpack_from(">BB", data, at)
        if fill != 0xFF:
            return None
        if marker in _BARE:
            at += 1 if marker == 0xFF else 2
            continue
        if marker in _FRAME:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return width, height
        if marker in (0xD9, 0xDA):
            return None
        at += 2 + struct.unpack_from(">H", data, at + 2)[0]


def _jp2(data: bytes) -> tuple[int, int] | None:
    """Follow the boxes to the stream, as decoders do: a plain byte search could be misled."""
    at = 0
    while True:
        length, kind = struct.unpack_from(">I4s", data, at)
        start = at + 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, start)
            start += 8
        if kind == b"jp2c":
            return _jpeg2000(data[start : start + 64]) if data.startswith(b"\xff\x4f\xff\x51", start) else None
        if at + length < start:  # 0 means a box up to the end of the file; other values are invalid
            return None
        at += length


def _jpeg2000(data: bytes) -> tuple[int, int]:
    right, bottom, left, top = struct.unpack_from(">IIII", data, 8)
    return right - left, bottom - top
