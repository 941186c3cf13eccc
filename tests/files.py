"""Files made by hand, for tests of what reads them."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG with its right checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    """The file that Pillow makes of an image."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def npy(array: NDArray[Any], **options: Any) -> bytes:
    """The file that `numpy.save` makes of an array."""
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def touch(root: Path, *names: str, content: str | None = None) -> Path:
    """Files of a few bytes, each its own name where no content is given: listing never opens them."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes((name if content is None else content).encode())
    return root
