"""Checks of a TIFF's structure before tifffile follows it: tifffile tolerates damage, jepakit must not."""

from __future__ import annotations

import itertools
import math
import re
import struct
from collections.abc import Callable, Iterator
from functools import cache, wraps
from threading import Lock
from typing import Any, NamedTuple, Never

from jepakit.errors import ImageError
from jepakit.readers.forks import in_each_child

_BIGTIFF = 43
_DESCRIPTION, _SUBIFDS = 270, 330
_OFFSETS = {4: "I", 13: "I", 16: "Q", 18: "Q"}
"""The tag types of file offsets: LONG, IFD, and the two of BigTIFF."""

_MOST_PAGES = 65_535
"""Most pages: all that libtiff could count for decades. Real stacks have tens of thousands, and open in seconds."""
_MOST_TAGS = 256
"""Most tags of one page: about as many as are defined at all; real pages have 10 to 80."""
_MOST_MIXED = 1024
"""Most pages and subimages in a file of several kinds: tifffile compares each pair, which takes seconds for so many."""
_REFUSES = "_jepakit_refuses"
_one_at_a_time = Lock()
_MOST_SHARED = 1 << 24
"""Bytes that pages may share, such as a palette: they are read again for each page."""


def check_structure(tif: Any, name: str) -> None:
    """Refuse broken or circular chains of pages, truncated tags, false OME descriptions, and too many pages.

    Raises ImageError for cycles, for pages with no tags or too many, for too many pages, and for pages that share
    values larger than the file; KeyError, ValueError and struct.error, which mean damage, for the rest. Too many pages
    of several kinds are refused once `tif.series` is accessed.
    """
    pages = images = described = held = 0
    for tags in _pages(tif, name):
        if pages == 0:
            _check_tags(tif, tags)
        pages += 1
        described += any(tag.code == _DESCRIPTION for tag in tags)
        below = (_tags(tif, offset, name) for offset in _images_below(tif, tags))
        for each in itertools.chain([tags], below):
            images += 1
            held += _held(tif, each)
            _refuse_many(images, held - tif.filehandle.size, name)
    _check_ome(tif, pages)
    _bound_search(tif, "generic", images, "pages of several kinds", name)
    _bound_search(tif, "shaped", described, "pages saved one by one", name)


class _Tag(NamedTuple):
    code: int
    type: int
    number: int
    value: bytes
    """The values or, if they do not fit here, their offset in the file."""


def _pages(tif: Any, name: str) -> Iterator[list[_Tag]]:
    """The tags of each page in turn; a cyclic chain is refused, as tifffile would follow it forever."""
    kind = tif.tiff
    seen: set[int] = set()
    offset = _number(tif, 8 if kind.version == _BIGTIFF else 4, kind.offsetformat, kind.offsetsize)
    while offset:
        if offset in seen:
            raise ImageError(f"{name}: damaged: its pages form a loop", code="unreadable")
        seen.add(offset)
        tags = _tags(tif, offset, name)
        yield tags
        end = offset + kind.tagnosize + len(tags) * kind.tagsize
        offset = _number(tif, end, kind.offsetformat, kind.offsetsize)


def _tags(tif: Any, offset: int, name: str) -> list[_Tag]:
    """The tags of a page, or of an image below one."""
    kind = tif.tiff
    number = _number(tif, offset, kind.tagnoformat, kind.tagnosize)
    if not 1 <= number <= _MOST_TAGS:
        raise ImageError(
            f"{name}: damaged: a page has {number} tags (1 to {_MOST_TAGS} are allowed)", code="unreadable"
        )
    half = (kind.tagsize - 4) // 2
    format = f"{kind.byteorder}HH{'Q' if half == 8 else 'I'}{half}s"
    return [_Tag(*tag) for tag in struct.iter_unpack(format, tif.filehandle.read(number * kind.tagsize))]


def _size(tag: _Tag) -> int:
    """Bytes of a tag's values."""
    import tifffile

    return tag.number * struct.calcsize(tifffile.TIFF.DATA_FORMATS.get(tag.type, "1B"))


def _images_below(tif: Any, tags: list[_Tag]) -> Iterator[int]:
    """The offsets of a page's SubIFDs."""
    kind, file = tif.tiff, tif.filehandle
    for tag in tags:
        if tag.code == _SUBIFDS:
            format = kind.byteorder + _OFFSETS[tag.type]
            size = struct.calcsize(format)
            data = tag.value
            if size * tag.number > len(data):
                file.seek(*struct.unpack(kind.offsetformat, data))
                data = file.read(size * min(tag.number, _MOST_PAGES))  # with their page, enough to refuse
            yield from (offset for (offset,) in struct.iter_unpack(format, data[: size * tag.number]) if offset >= 8)


def _number(tif: Any, at: int, format: str, size: int) -> int:
    tif.filehandle.seek(at)
    return int(struct.unpack(format, tif.filehandle.read(size))[0])


def _held(tif: Any, tags: list[_Tag]) -> int:
    """Bytes of a page's tags, and of their values stored elsewhere in the file."""
    sizes = (_size(tag) for tag in tags)
    elsewhere = (size for size in sizes if tif.tiff.tagoffsetthreshold < size <= tif.filehandle.size)
    return len(tags) * int(tif.tiff.tagsize) + sum(elsewhere)


def _refuse_many(images: int, shared: int, name: str) -> None:
    if shared > _MOST_SHARED:
        raise ImageError(f"{name}: damaged: its pages share {shared:,} bytes of tags and values", code="too_large")
    if images > _MOST_PAGES:
        raise ImageError(
            f"{name}: a TIFF of over {_MOST_PAGES:,} pages and subimages: save it as several files",
            code="too_large",
        )


def _bound_search(tif: Any, kind: str, seen: int, what: str, name: str) -> None:
    """Make one of tifffile's searches for series raise ImageError for too many pages before it begins."""

    def refuse() -> Never:
        raise ImageError(
            f"{name}: a TIFF of {seen:,} {what}, the limit for these is {_MOST_MIXED:,}: save those of one size, type and "
            "compression together, as a file of their own",
            code="too_large",
        )

    if seen <= _MOST_MIXED:
        return
    if hasattr(tif, f"_series_{kind}"):  # until tifffile 2026.3, the last for Python 3.11
        setattr(tif, f"_series_{kind}", refuse)
    elif _they_ask_first():
        setattr(tif, f"{_REFUSES}_{kind}", refuse)
    else:
        refuse()  # better to refuse a valid stack than to search for minutes


def _they_ask_first() -> bool:
    with _one_at_a_time:
        return _searches_ask_first()


def _renew() -> None:
    global _one_at_a_time
    _one_at_a_time = Lock()


in_each_child(_renew)


@cache
def _searches_ask_first() -> bool:
    """Patch tifffile's searches, in newer versions functions of its module, to first call the refusal that `_bound_search` set on
    the file; returns whether that worked."""
    from tifffile import tifffile

    found = getattr(tifffile.TIFF, "SERIES", {})
    for kind in ("generic", "shaped"):
        search = getattr(tifffile, f"series_{kind}", None)
        if not callable(search) or found.get(kind) is not search:
            return False
        found[kind] = _asking_first(kind, search)
        setattr(tifffile, f"series_{kind}", found[kind])
    return True


def _asking_first(kind: str, search: Any) -> Callable[[Any], Any]:
    @wraps(search)
    def asking(tif: Any) -> Any:
        getattr(tif, f"{_REFUSES}_{kind}", bool)()
        return search(tif)

    return asking


def _check_tags(tif: Any, tags: list[_Tag]) -> None:
    """Refuse a first page with a tag beyond the file's end: tifffile drops it, and with it the meaning of axes."""
    kind = tif.tiff
    if kind.offsetsize == 8 and kind.version != _BIGTIFF:
        # NDPI's own variant keeps the upper halves of its offsets elsewhere.
        return
    for tag in tags:
        size = _size(tag)
        if size > kind.offsetsize and struct.unpack(kind.offsetformat, tag.value)[0] + size > tif.filehandle.size:
            raise ValueError("a tag is cut short")


def _check_ome(tif: Any, pages: int) -> None:
    """Refuse an OME description of far more pixels than there are: tifffile makes a list of the declared length."""
    if not tif.is_ome:
        return
    page = tif.pages.first
    held = pages * page.imagelength * page.imagewidth * page.samplesperpixel
    if "<!DOCTYPE" in page.description:
        # Entities could expand to anything; OME files declare none.
        raise ValueError("an OME description with declarations")
    for element in re.findall(r"<(?:\w+:)?Pixels\b[^>]*>", page.description):
        sizes = re.findall(r"\bSize[XYZCT]\s*=\s*[\"']([^\"']*)", element)
        if not all(re.fullmatch("[0-9]{1,18}", size) for size in sizes):
            raise ValueError("an OME description with sizes that are no numbers")
        # Images in one file may have several sizes, so only gross excess is refused.
        if math.prod(map(int, sizes)) > 64 * held:
            raise ValueError("an OME description does not fit its file")
