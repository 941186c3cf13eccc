"""The results of one `embed` so far: in memory and, with `resume`, in a file from which the same call continues."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from jepakit._files import as_path, lock_file, reason_of
from jepakit._messages import counted
from jepakit._say import say
from jepakit.embedding.skipped import Skipped
from jepakit.embeddings import Embeddings
from jepakit.errors import ConfigError, ImageError, SpaceError, WriteError
from jepakit.sources import ImageList

_MAGIC = b"jepakit: vectors so far, 1\n"
_CHECKSUM_BYTES = 32


class Results:
    """Vectors of the first `done` images, in order, except for those left out.

    most_skipped  share of the images that may be left out
    resume        file that keeps what is done; what it holds of the same images is taken from it
    progress      whether to say what was taken from the file, and what it keeps when the work ends early

    Use it as a context manager. Raises ConfigError if `resume` cannot be written, is a file of another kind or in use, or
    for images in memory, which have no names that last.
    """

    def __init__(
        self, images: ImageList, most_skipped: float, resume: str | Path | None = None, *, progress: bool = True
    ) -> None:
        self._images, self._progress = images, progress
        self.skipped = Skipped(images, most_skipped)
        self.done = 0
        self.model_id: str | None = None
        self._vectors, self._rows = np.empty((0, 0), np.float32), 0
        self._file: _PartsFile | None = None
        if resume is not None:
            path = as_path(resume, "resume")
            if images.in_memory:
                raise ConfigError(
                    f"resume = {str(path)!r} needs images in files: those in memory have no names that last"
                )
            self._file = _PartsFile(path)
        self._stamps: dict[int, str | None] = {}
        """By place, the state (`ImageList.stamp`) of each image that was read and has no vector yet."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._file is None:
            return
        self._file.close()
        if kind is not None and self.done:
            self._say(
                f"{self._file.path} keeps what is done, {self._so_far()}: do the same again to continue from there"
            )

    def take_kept(self) -> None:
        """Take from the file what it holds of these images, up to the first that has changed or is damaged.

        Raises ConfigError if it holds vectors of other images only, ImageError if more images are left out there than are
        allowed.
        """
        if (file := self._file) is None:
            return
        for part, vectors in file.read():
            follows = part.first == self.done and part.done <= len(self._images)
            if not follows or part.images != self._fingerprint(part.first, part.done):
                if not self.done:
                    raise ConfigError(
                        f"{file.path} keeps vectors of other images than these, or these have changed: name another file, or "
                        "delete it to begin anew"
                    )
                break
            for place, message, code in part.left_out:
                self.skipped.add(place, ImageError(message, code=code))
            self._take(part.done, vectors, part.model_id)
            file.keep()
        if left := file.bytes_left:
            self._say(f"{file.path}: its last {left:,} bytes are damaged, or of other images than these: not used")
        if self.done:
            self._say(f"{file.path} keeps what is done, {self._so_far()}: continuing from there")

    def will_read(self, place: int) -> None:
        """Note the state of an image before it is read: its vector is of that state, whatever becomes of the file."""
        if self._file is not None:
            self._stamps[place] = self._images.stamp(place)

    def check(self, model_id: str) -> None:
        """Raise SpaceError if the vectors taken from the file are another model's."""
        if self.model_id not in (None, model_id):
            assert self._file is not None
            raise SpaceError(
                f"{self._file.path} keeps vectors of model {self.model_id}, and these would be of {model_id}: use that "
                "model again, or delete the file to begin anew"
            )

    def add(self, done: int, vectors: NDArray[np.float32], model_id: str) -> None:
        """Take float32 [N, D] of the images from the previous `done` up to this one, except for those left out.

        Raises SpaceError for the vectors of another model than before, WriteError if the file cannot be written.
        """
        self.check(model_id)
        if self._file is not None:
            left_out = self.skipped.told(self.done, done)
            fingerprint = self._fingerprint(self.done, done)
            part = _Part(self.done, done, model_id, vectors.shape[1], fingerprint, left_out)
            self._file.append(part, vectors)
        self._take(done, vectors, model_id)

    def embeddings(self) -> Embeddings:
        """The embeddings of all images but those left out."""
        assert self.model_id is not None
        ids, labels = self._images.ids, self._images.labels_given()
        kept = [place for place in range(len(ids)) if place not in self.skipped]
        return Embeddings(
            self._vectors[: self._rows],
            self.model_id,
            tuple(ids[place] for place in kept),
            None if labels is None else tuple(labels[place] for place in kept),
        )

    def _take(self, done: int, vectors: NDArray[np.float32], model_id: str) -> None:
        if self.model_id is None:
            self.model_id = model_id
            self._vectors = np.empty((len(self._images), vectors.shape[1]), np.float32)
        self._vectors[self._rows : self._rows + len(vectors)] = vectors
        self._rows += len(vectors)
        self.done = done

    def _fingerprint(self, first: int, done: int) -> str:
        """Changes whenever the pixels of these images may; no image is read."""
        digest = hashlib.sha256()
        for place in range(first, done):
            stamp = self._stamps.pop(place) if place in self._stamps else self._images.stamp(place)
            digest.update(f"{self._images.ids[place]}\n{stamp}\n".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def _so_far(self) -> str:
        return f"{self.done:,} of {counted(len(self._images), 'image')}"

    def _say(self, line: str) -> None:
        if self._progress:
            say(line)


class _Part(NamedTuple):
    """The header of a part: which images the vectors after it belong to."""

    first: int
    done: int
    model_id: str
    dim: int
    images: str
    """Fingerprint of the images from `first` up to `done`."""
    left_out: list[tuple[int, str, str]]
    """Place, message and code of each without a vector."""

    @property
    def rows(self) -> int:
        return self.done - self.first - len(self.left_out)


class _PartsFile:
    """The file behind `resume`. Each part is a line of JSON (`_Part`), the vectors as little-endian float32, and the SHA-256 of both.

    Only whole parts count, as a process may be killed while it writes one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = path.open("ab+")
        except OSError as error:
            raise ConfigError(f"{path} cannot be written ({reason_of(error)}): name another place") from None
        try:
            lock_file(self._file.fileno())
        except BlockingIOError:
            self.close()
            raise ConfigError(f"{path} is in use by another `embed`: let it end, or name another file") from None
        self._file.seek(0)
        begins = self._file.read(len(_MAGIC))
        if not _MAGIC.startswith(begins):
            self.close()
            if begins.startswith(_MAGIC[:-2]):
                raise _of_another_version(path)
            raise ConfigError(f"{path} exists, and no `embed` has made it to resume from: name another file")
        self._end = len(_MAGIC) if begins == _MAGIC else 0
        """Where the parts that count end."""

    def read(self) -> Iterator[tuple[_Part, NDArray[np.float32]]]:
        """The parts in order, up to the first that is damaged. Those for which `keep` is called count."""
        size = self._file.seek(0, 2)
        self._file.seek(self._end)
        while line := self._file.readline():
            try:
                told = json.loads(line)
                part = _Part(*(told.pop(name) for name in _Part._fields))
                count = 4 * part.rows * part.dim
            except (ValueError, TypeError, AttributeError, KeyError):
                return
            if not 0 <= count <= size - self._file.tell():
                return
            data = self._file.read(count)
            if self._file.read(_CHECKSUM_BYTES) != hashlib.sha256(line + data).digest():
                return
            if told:
                raise _of_another_version(self.path)
            yield part, np.frombuffer(data, "<f4").reshape(part.rows, part.dim)

    def keep(self) -> None:
        """Count the part that was read last."""
        self._end = self._file.tell()

    @property
    def bytes_left(self) -> int:
        """How many bytes follow the parts that count; the next part takes their place."""
        return self._file.seek(0, 2) - self._end

    def append(self, part: _Part, vectors: NDArray[np.float32]) -> None:
        """Write one part, which then survives the death of this process. Raises WriteError."""
        line = json.dumps(part._asdict()).encode() + b"\n"
        data = vectors.astype("<f4", copy=False).tobytes()
        try:
            self._file.truncate(self._end)
            self._file.write(b"".join([b"" if self._end else _MAGIC, line, data, hashlib.sha256(line + data).digest()]))
            self._file.flush()
        except OSError as error:
            raise WriteError(
                f"{self.path} cannot be written ({reason_of(error)}): make room, then run it again"
            ) from None
        self._end = self._file.tell()

    def close(self) -> None:
        """Close the file; an error in writing its last bytes is ignored."""
        try:
            self._file.close()
        except OSError:
            return


def _of_another_version(path: Path) -> ConfigError:
    return ConfigError(f"{path} was begun by another version of jepakit: resume with that one, or delete the file")
