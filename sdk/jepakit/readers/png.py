"""What Pillow lacks for PNG: 16-bit colour, and finding out whether anything is stored after the pixels."""

from __future__ import annotations

import struct
from typing import Any

from numpy.typing import NDArray

from jepakit.errors import MissingExtraError
from jepakit.readers.encoded import Encoded, of_few_pieces

_SAYS_ORIENTATION = frozenset({b"eXIf", b"tEXt", b"zTXt", b"iTXt"})


def has_late_chunks(encoded: Encoded) -> bool:
    """Whether chunks that may hold an orientation come after the pixels, where only decoding finds them."""
    at, pixels_seen, file = 8, False, of_few_pieces(encoded)
    while at + 8 <= encoded.size:
        file.seek(at)
        length, kind = struct.unpack(">I4s", file.read(8))
        pixels_seen = pixels_seen or kind == b"IDAT"
        if pixels_seen and kind in _SAYS_ORIENTATION:
            return True
        at += 12 + length
    return False


def decode_deep(encoded: Encoded) -> NDArray[Any]:
    """The pixels of a 16-bit PNG as stored, uint16 [H, W, bands]."""
    try:
        from imagecodecs import png_decode
    except ImportError:
        raise MissingExtraError(
            f"{encoded.name}: 16-bit colour in PNG needs imagecodecs: pip install 'jepakit[codecs]'"
        ) from None
    encoded.file.seek(0)
    return png_decode(encoded.file.read())
