"""What every kind of source comes down to: a store that hands out images by place, and what was found around it."""

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
"""How much of an image's file goes into its fingerprint."""


def stamp_of(path: str | Path, *part: int) -> str | None:
    """A file, its size and its time; `part` says which part of it. None when it is gone."""
    path = Path(path).absolute()
    try:
        stat = path.stat()
    except OSError:
        return None
    return json.dumps([os.fsdecode(path), stat.st_size, stat.st_mtime_ns, *part])


def repeated(names: Sequence[str], root: str = "") -> str | None:
    """The first of some files, relative to `root`, that is named a second time, however it is spelt."""
    seen: set[str] = set()
    here = os.path.abspath(root)  # noqa: PTH100
    for name in names:
        path = os.path.normpath(os.path.join(here, with_home(name)))  # noqa: PTH118 (hot loop)
        if path in seen:
            return name
        seen.add(path)
    return None


class Store(Protocol):
    """Images by place. Picklable, and safe in threads and after a fork, since nothing is kept open."""

    @property
    def in_memory(self) -> bool:
        """Whether the images are the caller's objects, not files."""
        ...

    def __len__(self) -> int: ...

    def image(self, index: int) -> ImageSource:
        """What a reader takes: a path, a file's bytes, an array or a Pillow image. Raises ImageError."""
        ...

    def stamp(self, index: int) -> str | None:
        """Where the image's bytes lie, and when they were last changed: its file is not read. None in memory,
        and for a file that is gone."""
        ...

    def fingerprint(self, index: int) -> bytes:
        """Bytes that change when the image does, cheap to have; never raises for a file that is gone."""
        ...


@dataclass(frozen=True)
class Found:
    """A source before the rules for labels and groups are applied."""

    store: Store
    ids: tuple[str, ...]
    folders: Sequence[str] | None = None
    """Names whose first-level folders may be classes; None where a source has no such folders."""
    kind: str = "the source"
    """What messages call a source without such folders."""
    labels: tuple[str | None, ...] | None = None
    label_note: str = ""
    """Of the labels that the source brings, or why it brings none; empty: the folders decide."""
    groups: tuple[str, ...] | None = None
    group_note: str = ""
    held_out: NDArray[np.bool_] | None = None
    note: str = ""
