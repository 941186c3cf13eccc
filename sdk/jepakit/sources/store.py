"""What every kind of source is turned into: a store that returns images by index, and what was found along with it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from jepakit._files import with_home
from jepakit.readers import ImageSource

SAMPLE_BYTES = 4096
"""How many bytes of an image file go into its fingerprint."""


def stamp_of(path: str | Path, *part: int) -> str | None:
    """A file's path, size, and when its contents and its entry were last changed (the former can be set, as by `cp -p`), and
    `part` if only a part of it is meant. None if it is gone."""
    path = Path(path).absolute()
    try:
        stat = path.stat()
    except (OSError, ValueError):  # a name with a NUL byte is no file's
        return None
    return json.dumps([os.fsdecode(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, *part])


def repeated(names: Sequence[str], root: str = "") -> str | None:
    """The first of the files, relative to `root`, that is named a second time, even if spelt differently."""
    seen: set[str] = set()
    here = os.path.abspath(root)  # noqa: PTH100
    for name in names:
        path = os.path.normpath(os.path.join(here, with_home(name)))  # noqa: PTH118 (hot loop)
        if path in seen:
            return name
        seen.add(path)
    return None


class Store(Protocol):
    """Images by index. Picklable, and safe in threads and after a fork, since nothing is kept open."""

    @property
    def in_memory(self) -> bool:
        """Whether the images are the caller's objects, not files."""
        ...

    @property
    def most_threads(self) -> int | None:
        """How many threads may ask for images at once; 0: only the caller's own may, None: any number."""
        ...

    def __len__(self) -> int: ...

    def image(self, index: int) -> ImageSource:
        """The image as a reader takes it: a path, a file's bytes, an array or a Pillow image. Raises ImageError."""
        ...

    def stamp(self, index: int) -> str | None:
        """Where the image's bytes lie and when they last changed, without reading the file. None for images in memory
        and for a file that is gone."""
        ...

    def fingerprint(self, index: int) -> bytes:
        """Bytes that change when the image does, cheap to get; does not raise for a file that is gone."""
        ...


@dataclass(frozen=True)
class Found:
    """A source before the rules for labels and groups are applied."""

    store: Store
    ids: tuple[str, ...]
    folders: Sequence[str] | None = None
    """Names whose first-level folders may be classes; None if the source has no such folders."""
    kind: str = "the source"
    """What messages call a source without such folders."""
    labels: tuple[str | None, ...] | None = None
    label_note: str = ""
    """A note on the source's own labels, or on why it has none; empty: the folders decide."""
    groups: tuple[str, ...] | None = None
    group_note: str = ""
    held_out: NDArray[np.bool_] | None = None
    note: str = ""
