"""Zeros in a JPEG's compressed pixels, as a bad disk or a broken copy leaves them: decoders make up what was there."""

from __future__ import annotations

import re
from collections.abc import Iterator

_RUN = bytes(512)
_FRAMES, _TABLES, _SCAN = (0xC0, 0xC1), 0xC4, 0xDA
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""Any marker but those that restart the decoder within a scan."""


def zeros_in_pixels(jpeg: bytes) -> int | None:
    """Where the compressed pixels hold 512 zero bytes in a row that no picture is encoded as; None if nowhere.

    A Huffman code of zero bits only either sets a coefficient of the block, or says that none follows. If it says so in all
    AC tables of the scan, a run of zeros is a valid flat area. Progressive files, and those with a scan for each band, are
    not checked. All these give None.
    """
    if _RUN not in jpeg:
        return None
    bands = b""
    flat: dict[int, bool] = {}
    for marker, start, end in _segments(jpeg):
        segment = jpeg[start:end]
        if marker in _FRAMES:
            bands = segment[5:6]
        elif marker == _TABLES:
            flat |= dict(_zero_codes(segment))
        elif marker == _SCAN and bands and segment[:1] == bands:
            place, tables = jpeg.find(_RUN, end), segment[2 : 1 + 2 * bands[0] : 2]
            if (
                place < 0
                or _END_OF_SCAN.search(jpeg, end, place)
                or all(flat.get(table & 0x0F, True) for table in tables)
            ):
                return None
            return place
    return None


def _segments(jpeg: bytes) -> Iterator[tuple[int, int, int]]:
    """The marker, start and end of each segment up to the first scan's header; none where they are not in order."""
    at, marker = 2, 0
    while marker != _SCAN and jpeg[at : at + 1] == b"\xff":
        marker, length = jpeg[at + 1], int.from_bytes(jpeg[at + 2 : at + 4])
        if length < 2 or at + 2 + length > len(jpeg):
            return
        yield marker, at + 4, at + 2 + length
        at += 2 + length


def _zero_codes(tables: bytes) -> Iterator[tuple[int, bool]]:
    """The number of each table of AC coefficients, and whether its code of nothing but zeros sets no coefficient."""
    at = 0
    while at + 17 < len(tables):
        if tables[at] >> 4:
            yield tables[at] & 0x0F, tables[at + 17] & 0x0F == 0
        at += 17 + sum(tables[at + 1 : at + 17])
