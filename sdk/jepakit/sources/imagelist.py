"""`ImageList`: images in a stable order, with their names, labels and groups."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from jepakit.readers import ImageRef, Scenes, Window
from jepakit.sources.labels import MAX_CLASSES
from jepakit.sources.spread import evenly_spread
from jepakit.sources.store import Store

_SAMPLED = 256


@dataclass(frozen=True)
class Pieces:
    """Which part of which image each item is. Held in arrays, since scenes have millions of tiles."""

    image: NDArray[np.int64]
    """[N], indices into the store."""
    frame: NDArray[np.int32]
    """[N], -1 where no frame was chosen."""
    window: NDArray[np.int32] | None
    """[N, 4]: x, y, width, height; None: whole images."""

    def __len__(self) -> int:
        return len(self.image)

    def where(self, chosen: NDArray[np.bool_] | slice) -> Pieces:
        """The items selected by a mask [N] or a slice."""
        window = None if self.window is None else self.window[chosen]
        return Pieces(self.image[chosen], self.frame[chosen], window)


@dataclass(frozen=True, eq=False)
class ImageList:
    """Images in a stable order. `ids` name them; `labels` and `groups` are None if there are none.

    labels    entries are None for unlabelled images, but not all of them
    held_out  bool [N] from a manifest's split column: rows that are not "train"
    note      what was assumed about labels, groups and tiles, in words

    Picklable, and usable in threads and forked workers. `images[i]` is an `ImageRef`, not decoded yet; indexing reads
    members of archives into bytes, and raises ImageError if that fails.
    """

    ids: Sequence[str]
    labels: tuple[str | None, ...] | None
    groups: tuple[str, ...] | None
    held_out: NDArray[np.bool_] | None
    note: str
    store: Store = field(repr=False)
    pieces: Pieces | None = field(default=None, repr=False)
    _scenes: Scenes = field(default_factory=Scenes, repr=False)

    def __post_init__(self) -> None:
        if self.labels is not None and all(label is None for label in self.labels):
            object.__setattr__(self, "labels", None)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> ImageRef:
        name, pieces = self.ids[index], self.pieces
        if pieces is None:
            return ImageRef(self.store.image(index), name)
        frame = int(pieces.frame[index])
        return ImageRef(
            self.store.image(int(pieces.image[index])),
            name,
            window=None if pieces.window is None else Window(*map(int, pieces.window[index])),
            frame=None if frame < 0 else frame,
            scenes=self._scenes,
        )

    def __iter__(self) -> Iterator[ImageRef]:
        return (self[index] for index in range(len(self)))

    def stamp(self, index: int) -> str | None:
        """Text that changes whenever the item's pixels may: file, size, time, member, window, frame. Nothing is read.

        None for images in memory and files that are gone.
        """
        where, pieces = self.store.stamp(index if self.pieces is None else int(self.pieces.image[index])), self.pieces
        if where is None or pieces is None:
            return where
        window = "" if pieces.window is None else pieces.window[index].tolist()
        return f"{where} frame {pieces.frame[index]} window {window}"

    @property
    def in_memory(self) -> bool:
        """Whether the images are objects in memory, which another process cannot find by name."""
        return self.store.in_memory

    def threads(self, most: int) -> int:
        """How many threads, at most `most`, may ask for images at once; 0: only the caller's own thread may."""
        return most if self.store.most_threads is None else min(most, self.store.most_threads)

    def digest(self) -> str:
        """A fingerprint, 16 hex digits, to notice that a resumed run has other data.

        It covers every name, label and group, and the size and first 4 KB of at most 256 evenly spread files:
        adding, removing or renaming files always changes it, changed contents only for those files.
        """
        digest = hashlib.sha256()
        for words in (self.ids, self.labels, self.groups):
            for word in words or ():
                # UTF-8 text never contains the byte 0xff.
                digest.update((b"\xff" if word is None else word.encode("utf-8", "surrogatepass")) + b"\0")
            digest.update(b"\n")
        if self.held_out is not None:
            digest.update(self.held_out.tobytes())
        for place in evenly_spread(len(self.store), _SAMPLED).tolist():
            digest.update(hashlib.sha256(self.store.fingerprint(place)).digest())
        return digest.hexdigest()[:16]

    def labels_given(self) -> tuple[str, ...] | None:
        """The labels of the images that have one; in a list to be embedded, all of them do."""
        return None if self.labels is None else tuple(label for label in self.labels if label is not None)

    def judges(self) -> NDArray[np.intp]:
        """Sorted indices of the images that can be held out: those with a label, or all if none has one."""
        if self.labels is None:
            return np.arange(len(self))
        return np.flatnonzero([label is not None for label in self.labels])

    def strata(self) -> tuple[str, ...] | None:
        """The stratum of each of `judges`, to hold out in proportion: its label, or its first-level folder if there are
        at most 50 of these."""
        if self.labels is not None:
            return self.labels_given()
        tops = tuple(name.rpartition("/")[0].partition("/")[0] for name in self.ids)
        return tops if len(set(tops)) <= MAX_CLASSES else None
