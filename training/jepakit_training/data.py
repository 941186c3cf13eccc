"""From files to batches of views. Nothing here keeps state: a batch is a function of (seed, step)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from jepakit.errors import DataError, ImageError
from jepakit.images import read_image
from jepakit_training.randomness import derive_seed
from jepakit_training.views import ViewMaker, Views

_MOST_SUBSTITUTES = 20


class Split(NamedTuple):
    """Indices of the images that are trained on, and of those never trained on."""

    train: NDArray[np.intp]
    held_out: NDArray[np.intp]


def split(count: int, labels: Sequence[str] | None, *, share: float, most: int, seed: int) -> Split:
    """Hold `share` of the images out, at most `most`, each class in proportion and by at least one image."""
    random = np.random.default_rng(derive_seed(seed, "split"))
    share = min(share, most / count)
    groups = np.asarray(labels) if labels is not None else np.zeros(count, np.intp)
    held_out = np.zeros(count, bool)
    for group in np.unique(groups):
        members = random.permutation(np.flatnonzero(groups == group))
        held_out[members[: max(1, round(share * len(members)))]] = True
    return Split(np.flatnonzero(~held_out), np.flatnonzero(held_out))


class Key(NamedTuple):
    """Which image, and in which pass over the data: together with the seed, all that its views depend on."""

    epoch: int
    place: int


class StepBatches(Sampler[list[Key]]):
    """This rank's keys for the optimizer steps `first` … `last - 1`.

    The stream of images is one permutation after another, cut into batches of `batch_size` over all ranks:
    every image is seen equally often, however small the data; only at the seam can a batch hold one twice.
    """

    def __init__(self, count: int, batch_size: int, seed: int, steps: range, *, rank: int = 0, world: int = 1) -> None:
        self._count, self._batch_size, self._seed, self._steps = count, batch_size, seed, steps
        self._rank, self._world = rank, world

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order = -1, np.empty(0, np.intp)
        for step in self._steps:
            keys = []
            for position in range(step * self._batch_size, (step + 1) * self._batch_size):
                if position // self._count != epoch:
                    epoch = position // self._count
                    order = np.random.default_rng(derive_seed(self._seed, "order", epoch)).permutation(self._count)
                keys.append(Key(epoch, int(order[position % self._count])))
            yield keys[self._rank :: self._world]


class Item(NamedTuple):
    views: Views
    skipped: list[tuple[int, str]]
    """(index, reason) of files that could not be read and whose place a neighbour took."""


class Batch(NamedTuple):
    """Views of N images: uint8 [V, N, C, H, W] at each size; `skipped` as in `Item`."""

    views: Views
    skipped: list[tuple[int, str]]


class ViewDataset(Dataset[Item]):
    """Decodes the image of a key and cuts its views.

    An unreadable file is replaced by the next readable one, the same on every rank and at every resume.
    """

    def __init__(self, paths: Sequence[Path], make_views: ViewMaker, seed: int) -> None:
        self._paths, self._make_views, self._seed = paths, make_views, seed

    def __getitem__(self, key: Key) -> Item:
        skipped = []
        for offset in range(_MOST_SUBSTITUTES):
            index = (key.place + offset) % len(self._paths)
            try:
                image = read_image(self._paths[index])
            except ImageError as error:
                skipped.append((index, str(error)))
                continue
            return Item(self._make_views(image, derive_seed(self._seed, "views", key.epoch, key.place)), skipped)
        raise DataError(f"{_MOST_SUBSTITUTES} images in a row cannot be read; the first: {skipped[0][1]}")


def make_loader(dataset: ViewDataset, batches: StepBatches, workers: int, *, pin: bool) -> DataLoader[Batch]:
    """A loader of `batches`; the number of workers changes nothing but speed."""
    return DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin,
        worker_init_fn=_one_thread if workers else None,
        timeout=600 if workers else 0,
    )


def _collate(items: list[Item]) -> Batch:
    views = Views(*(torch.stack(sizes, dim=1) for sizes in zip(*(item.views for item in items), strict=True)))
    return Batch(views, [skip for item in items for skip in item.skipped])


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 [..., C, H, W] to float32, by 0-255 `mean` and `std` of shape [C, 1, 1]."""
    return (images.float() - mean) / std
