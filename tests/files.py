"""Hand-made files, for tests of their readers."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """A PNG chunk with the correct checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    """An image as a file written by Pillow."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def with_scans(jpeg: bytes, count: int) -> bytes:
    """A progressive JPEG with its last scan repeated, up to `count` scans in all."""
    last = jpeg.rindex(b"\xff\xda")
    return jpeg[:-2] + jpeg[last:-2] * (count - jpeg.count(b"\xff\xda")) + jpeg[-2:]


def tiff(array: NDArray[Any], *, writer: dict[str, Any] | None = None, **options: Any) -> bytes:
    """An array as a TIFF, with arguments for `tifffile.TiffWriter` and for its `write`."""
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer, **(writer or {})) as file:
        file.write(array, **options)
    return buffer.getvalue()


def npy(array: NDArray[Any], **options: Any) -> bytes:
    """An array as a file written by `numpy.save`."""
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def touch(root: Path, *names: str, content: str | None = None) -> Path:
    """Make files of a few bytes, by default each containing its own name: listing never opens them."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes((name if content is None else content).encode())
    return root
