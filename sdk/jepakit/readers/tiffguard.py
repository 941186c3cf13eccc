"""What is checked of a TIFF's structure before tifffile follows it: it is lenient, and damage must not be."""

from __future__ import annotations

import math
import re
import struct
from typing import Any

from jepakit.errors import ImageError

_BIGTIFF = 43

_MOST_PAGES = 65_535
"""What libtiff could count for decades: stacks of tens of thousands of planes are real, and open in seconds."""
_MOST_TAGS = 256
"""Of one page: about as many as are defined at all; real pages have 10 to 80."""
_MOST_MIXED = 1024
"""Pages and images below them in a file of several kinds, which tifffile compares each with each: seconds for so many."""


def check_structure(tif: Any, name: str) -> None:
    """Refuse broken or circular chains of pages, tags cut short, OME descriptions that lie, and more pages than any has.

    Raises ImageError for circles, for pages without tags or with too many, and for too many pages; ValueError and
    struct.error, which mean damage, for the rest. Pages of several kinds are counted once `tif.series` is asked for.
    """
    pages = _count_pages(tif, name)
    _check_tags(tif)
    _check_ome(tif, pages)
    _bound_mixed_pages(tif, name)


def _count_pages(tif: Any, name: str) -> int:
    """How many pages the file has; a chain that comes back to where it was is refused, tifffile follows it for ever."""
    kind, file = tif.tiff, tif.filehandle
    seen: set[int] = set()

    def number(at: int, format: str, size: int) -> int:
        file.seek(at)
        return int(struct.unpack(format, file.read(size))[0])

    offset = number(8 if kind.version == _BIGTIFF else 4, kind.offsetformat, kind.offsetsize)
    while offset:
        if offset in seen:
            raise ImageError(f"{name}: damaged: its pages run in a circle", code="unreadable")
        if len(seen) == _MOST_PAGES:
            raise ImageError(
                f"{name}: a TIFF of over {_MOST_PAGES:,} pages: save it as several files", code="too_large"
            )
        seen.add(offset)
        tags = number(offset, kind.tagnoformat, kind.tagnosize)
        if not 1 <= tags <= _MOST_TAGS:
            raise ImageError(
                f"{name}: damaged: a page of {tags} tags, where 1 to {_MOST_TAGS} can be", code="unreadable"
            )
        offset = number(offset + kind.tagnosize + tags * kind.tagsize, kind.offsetformat, kind.offsetsize)
    return len(seen)


def _bound_mixed_pages(tif: Any, name: str) -> None:
    """Have tifffile's search for series among pages of several kinds refuse too many, by an ImageError, before it begins."""
    search = tif._series_generic

    def bounded() -> Any:
        tif.pages.useframes = False
        images = len(tif.pages)
        if images <= _MOST_MIXED:
            images += sum(len(page.subifds or ()) for page in tif.pages)
        if images > _MOST_MIXED:
            raise ImageError(
                f"{name}: a TIFF of {images:,} pages of several kinds, the limit for such is {_MOST_MIXED:,}: save those of "
                "one size, type and compression as a file of their own",
                code="too_large",
            )
        return search()

    tif._series_generic = bounded


def _check_tags(tif: Any) -> None:
    """Refuse a first page with a tag beyond the file's end: tifffile leaves it out, and with it what axes mean."""
    import tifffile

    kind, file = tif.tiff, tif.filehandle
    if kind.offsetsize == 8 and kind.version != _BIGTIFF:
        # NDPI's own mixture keeps the upper halves of its offsets elsewhere.
        return
    file.seek(tif.pages.first.offset)
    (tags,) = struct.unpack(kind.tagnoformat, file.read(kind.tagnosize))
    count_format = "Q" if kind.offsetsize == 8 else "I"
    for _ in range(tags):
        _, dtype, count, value = struct.unpack(
            f"{kind.byteorder}HH{count_format}{kind.offsetsize}s", file.read(kind.tagsize)
        )
        size = count * struct.calcsize(tifffile.TIFF.DATA_FORMATS.get(dtype, "1B"))
        if size > kind.offsetsize and struct.unpack(kind.offsetformat, value)[0] + size > file.size:
            raise ValueError("a tag is cut short")


def _check_ome(tif: Any, pages: int) -> None:
    """Refuse an OME description of far more pixels than there are: tifffile makes a list as long as it says."""
    if not tif.is_ome:
        return
    page = tif.pages.first
    held = pages * page.imagelength * page.imagewidth * page.samplesperpixel
    if "<!DOCTYPE" in page.description:
        # Entities could say anything; OME files declare none.
        raise ValueError("an OME description with declarations")
    for element in re.findall(r"<(?:\w+:)?Pixels\b[^>]*>", page.description):
        sizes = re.findall(r"\bSize[XYZCT]\s*=\s*[\"']([^\"']*)", element)
        if not all(re.fullmatch("[0-9]{1,18}", size) for size in sizes):
            raise ValueError("an OME description with sizes that are no numbers")
        # Images of one file may be of several sizes: only gross lies are meant.
        if math.prod(map(int, sizes)) > 64 * held:
            raise ValueError("an OME description does not fit its file")
