"""Shared by the readers' tests: real files, where available, and the shape of a refusal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jepakit.errors import ImageError
from jepakit.readers import open_raster

SHARED = Path(__file__).parents[3] / ".." / "shared" / "data" / "multichannel"


@pytest.fixture
def shared() -> Path:
    """The folder of real 16-bit, multi-band and DICOM files."""
    if not SHARED.is_dir():
        pytest.skip("shared data is not at hand")
    return SHARED.resolve()


@pytest.fixture
def refused() -> Callable[..., str]:
    """`refused(source, code, **options)`: the message of the ImageError raised by opening and reading it."""

    def check(source: Any, code: str, **options: Any) -> str:
        with pytest.raises(ImageError) as caught, open_raster(source, **options) as raster:
            raster.read()
        assert caught.value.code == code, caught.value
        message = str(caught.value)
        assert "\n" not in message
        assert ": " in message
        return message

    return check
