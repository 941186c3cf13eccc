"""Slide scanners' pyramids: the first level, read by windows."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from jepakit.readers import Limits, Window, open_raster

Refused = Callable[..., str]


def make_slide(height: int = 300, width: int = 400) -> tuple[bytes, NDArray[Any]]:
    """Make a slide as Aperio's scanners do: level 0, thumbnail, level 1, label. Returns what level 0 decodes to."""
    seed = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(seed).resize((width, height))
    about = "Aperio Image Library v12.0.15\r\n{w}x{h} [0,0 {w}x{h}] (64x64) JPEG/RGB Q=70|AppMag = 20|MPP = 0.5"
    tiles: dict[str, Any] = {"tile": (64, 64), "compression": "jpeg", "photometric": "rgb", "metadata": None}
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as file:
        file.write(np.asarray(image), description=about.format(w=width, h=height), **tiles)
        small = np.asarray(image.resize((100, 75)))
        file.write(small, photometric="rgb", description="Aperio Image Library\r\nthumbnail", metadata=None)
        half = np.asarray(image.resize((width // 2, height // 2)))
        file.write(half, description="Aperio Image Library\r\nlevel", **tiles)
        file.write(
            small, photometric="rgb", subfiletype=1, description="Aperio Image Library\r\nlabel 1x1", metadata=None
        )
    with tifffile.TiffFile(io.BytesIO(buffer.getvalue())) as file:
        assert file.is_svs
        return buffer.getvalue(), file.pages.first.asarray()


def test_a_slide_is_its_first_level_by_windows(tmp_path: Any) -> None:
    data, level = make_slide()
    file = tmp_path / "a.svs"
    file.write_bytes(data)
    for source in (data, file):
        with open_raster(source) as raster:
            header = raster.header
            assert (header.format, header.height, header.width, header.bands) == ("SLIDE", 300, 400, 3)
            assert (header.dtype, header.frames, header.windowed) == ("uint8", 1, True)
            np.testing.assert_array_equal(raster.read(Window(100, 50, 200, 130)), level[50:180, 100:300])
            np.testing.assert_array_equal(raster.read(), level)


def test_a_slide_over_the_limit_is_read_in_tiles_only(refused: Refused) -> None:
    data, level = make_slide()
    small = Limits(max_pixels=20_000)
    assert "tile=512" in refused(data, "too_large", limits=small)
    with open_raster(data, limits=small) as raster:
        np.testing.assert_array_equal(raster.read(Window(300, 200, 100, 100)), level[200:, 300:])


@pytest.mark.parametrize("place", [0, 7, 20])
def test_a_spoilt_tile_spoils_only_windows_that_need_it(place: int) -> None:
    data, level = make_slide()
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        offset, count = file.pages.first.dataoffsets[place], file.pages.first.databytecounts[place]
    spoilt = data[:offset] + bytes(count) + data[offset + count :]
    with open_raster(spoilt) as raster:
        x, y = 64 * ((place + 1) % 7), 64 * ((place + 1) // 7)
        np.testing.assert_array_equal(raster.read(Window(x, y, 16, 16)), level[y : y + 16, x : x + 16])


def test_slides_that_need_stitching_are_refused_by_name(refused: Refused) -> None:
    buffer = io.BytesIO()
    xmp = b"<iScan></iScan>"
    tifffile.imwrite(
        buffer, np.zeros((64, 64, 3), np.uint8), photometric="rgb", tile=(32, 32), metadata=None,
        software="ScanOutputManager 1.1", extratags=[(700, 1, len(xmp), xmp, True)],
    )  # fmt: skip
    assert "BIF" in refused(buffer.getvalue(), "unsupported_format")
