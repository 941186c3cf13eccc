"""Decoded images on disk, already downscaled to what the views need: a second pass over the data decodes nothing.

One .npy file per image, read through a memory map, so that a crop reads only its own pages. Any number of
worker processes share a folder; other files in it are left alone. A full cache stores nothing more: in passes over all
the data, making room for one image would always evict one that is needed sooner.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from jepakit._files import lock_file, reason_of, replacing
from jepakit._say import say
from jepakit.bundles.manifest import Preprocess
from jepakit.config import AdaptConfig
from jepakit.errors import ConfigError
from jepakit.sources.aside import CACHED
from jepakit_training.data.views import resize
from jepakit_training.memory import GB

_FORMAT = 2
"""Increase it when the same file would give other pixels."""
_HEADER_BYTES = 128
_LEDGER = ".used_bytes"
_STALE_S = 30 * 24 * 3600
_NEARLY_FULL = 0.9


class ImageCache:
    """Pixels by key, in `folder`, at most `limit_bytes` in all.

    least_side  images are stored with their shorter side at most this long, in pixels
    decoding    everything else that decides which pixels a file gives, e.g. a DICOM window; part of every key

    Opening a folder over the limit removes the least recently used images; above 90 % of the limit, also those not used for
    30 days, oldest first, until it is below. Raises ConfigError when the folder cannot be used.
    """

    def __init__(self, folder: Path, limit_bytes: int, least_side: int, decoding: str) -> None:
        self._folder, self._limit, self._least_side, self._decoding = folder, limit_bytes, least_side, decoding
        self._full = False
        try:
            # The pixels may be a patient's. An existing folder keeps its mode.
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._ledger() as (ledger, is_locked):
                used = _read_ledger(ledger)
                # Counting takes one look at every file: minutes for a million of them, hours on a network.
                if used is None or used > _NEARLY_FULL * limit_bytes:
                    used = self._tidied()
                    _write_ledger(ledger, used)
        except OSError as error:
            raise ConfigError(
                f"{folder} cannot hold the image cache ({reason_of(error)}): name another folder"
            ) from None
        if not is_locked:
            say(
                f"warning: {folder} lies where files cannot be locked: with several processes, the image cache may "
                "exceed its limit"
            )
        if used > _NEARLY_FULL * limit_bytes:
            say(
                f"warning: {folder} is {used / limit_bytes:.0%} full, with images of this run or of others: any that is not in it and does "
                f"not fit is decoded again and again. Raise cache_gb (now {limit_bytes / GB:g}), or remove the folder if no other run needs it"
            )

    def key(self, stamp: str) -> str:
        """The key of an item's pixels, from its `ImageList.stamp`, without reading the item."""
        made_of = [_FORMAT, stamp, self._least_side, self._decoding]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()

    def get(self, key: str) -> NDArray[Any] | None:
        """Read-only pixels [H, W, C], or None if they are not stored or incomplete."""
        try:
            pixels = np.load(self._file(key), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        whole = isinstance(pixels, np.ndarray) and pixels.ndim == 3 and pixels.dtype in (np.uint8, np.float32)
        return np.asarray(pixels) if whole else None

    def put(self, key: str, pixels_HWC: NDArray[Any]) -> None:
        """Store uint8 or float32 pixels, unless the limit is reached or the disk is full."""
        if self._full:
            return
        try:
            if not self._reserve(pixels_HWC.nbytes + _HEADER_BYTES):
                self._full = True
                return
            with replacing(self._file(key)) as file:
                np.save(file, pixels_HWC, allow_pickle=False)
        except OSError:
            self._full = True

    def _file(self, key: str) -> Path:
        return self._folder / f"{key}{CACHED}"

    @contextmanager
    def _ledger(self) -> Iterator[tuple[BinaryIO, bool]]:
        """The file that records how many bytes are used, and whether it is locked against all other processes."""
        with (self._folder / _LEDGER).open("a+b") as ledger:
            yield ledger, lock_file(ledger.fileno(), wait=True)

    def _reserve(self, size: int) -> bool:
        """Reserve `size` more bytes; returns whether there was room."""
        with self._ledger() as (ledger, _):
            used = _read_ledger(ledger)
            if used is None:
                used = sum(size for _, size, _ in self._stored())
            if used + size > self._limit:
                return False
            _write_ledger(ledger, used + size)
            return True

    def _stored(self) -> list[tuple[float, int, Path]]:
        """Time of last use, size and path of every file, including those that a crash left half written."""
        found = []
        for path in self._folder.iterdir():
            with suppress(FileNotFoundError):  # another process has just renamed its temporary file
                stat = path.stat()
                found.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
        return [file for file in found if file[2].name.endswith(CACHED)]

    def _tidied(self) -> int:
        """The bytes in use, after removing what must go."""
        files = sorted(self._stored())
        used, stale_before = sum(size for _, size, _ in files), time.time() - _STALE_S
        for last_used, size, path in files:
            if used <= self._limit and (used <= _NEARLY_FULL * self._limit or last_used >= stale_before):
                break
            path.unlink(missing_ok=True)
            used -= size
        return used


def open_cache(config: AdaptConfig, least_side: int, spec: Preprocess) -> ImageCache | None:
    """The cache that the settings ask for; None if they ask for none."""
    if config.cache is None:
        return None
    # Two specs can make different pixels from one file: by its window, or by what fills "no data".
    return ImageCache(Path(config.cache), int(config.cache_gb * GB), least_side, spec.model_dump_json())


def downscale(pixels_HWC: NDArray[Any], least_side: int) -> NDArray[Any]:
    """uint8 or float32 pixels, downscaled (antialiased) so that the shorter side is at most `least_side`."""
    height, width, _ = pixels_HWC.shape
    short = min(height, width)
    if short <= least_side:
        return pixels_HWC
    shrunk = resize(pixels_HWC, round(height * least_side / short), round(width * least_side / short))
    return shrunk.permute(1, 2, 0).contiguous().numpy()


def _read_ledger(ledger: BinaryIO) -> int | None:
    """The bytes in use; None if nobody has counted them."""
    ledger.seek(0)
    text = ledger.read()
    return int(text) if text.isdigit() else None


def _write_ledger(ledger: BinaryIO, used: int) -> None:
    ledger.truncate(0)
    ledger.write(b"%d" % used)
