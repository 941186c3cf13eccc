"""From files to batches of views. Nothing here has state: a batch is a function of (seed, step)."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from jepakit.bundles.manifest import Preprocess
from jepakit.errors import DataError, ImageError, InputError, JepakitError, NoMemoryError, TrainingError
from jepakit.images import Pixels, read_image
from jepakit.readers.quiet import silence_loggers
from jepakit.sources import ImageList
from jepakit_training.data.cache import ImageCache, downscale
from jepakit_training.data.views import Crops, ViewMaker, Views, collate, finish
from jepakit_training.loader_limits import PATIENCE_S, end_with_trainer, hand_over, start_method
from jepakit_training.randomness import derive_seed

_MOST_SUBSTITUTES = 20


class Key(NamedTuple):
    """Which image, and in which pass over the data; with the seed, this determines its views."""

    epoch: int
    place: int


class StepBatches(Sampler[list[Key]]):
    """This rank's keys for the optimizer steps `first` … `last - 1`.

    The stream of images is one permutation after another, cut into batches of `batch_size` over all ranks: every
    image is seen equally often, however few there are, and no batch holds one twice: that would raise SIGReg's floor.
    """

    def __init__(self, count: int, batch_size: int, seed: int, steps: range, *, rank: int = 0, world: int = 1) -> None:
        self._count, self._batch_size, self._seed, self._steps = count, batch_size, seed, steps
        self._rank, self._world = rank, world

    def __iter__(self) -> Iterator[list[Key]]:
        orders = enumerate(self._orders())
        epoch, order = next(orders)
        for step in self._steps:
            keys = []
            for position in range(step * self._batch_size, (step + 1) * self._batch_size):
                while position // self._count > epoch:
                    epoch, order = next(orders)
                keys.append(Key(epoch, int(order[position % self._count])))
            yield keys[self._rank :: self._world]

    def _orders(self) -> Iterator[NDArray[np.intp]]:
        """A permutation for each epoch. If a batch spans two epochs, the second begins with images that are not in that batch yet."""
        order = np.empty(0, np.intp)
        for epoch in itertools.count():
            shared = epoch * self._count % self._batch_size
            taken = order[max(0, len(order) - shared) :]
            order = np.random.default_rng(derive_seed(self._seed, "order", epoch)).permutation(self._count)
            first = np.flatnonzero(~np.isin(order, taken))[: self._batch_size - shared]
            order = np.concatenate([order[first], np.delete(order, first)])
            yield order


class Item(NamedTuple):
    crops: Crops | None
    skipped: list[tuple[int, str]]
    """(index, reason) of files that could not be read and were replaced by another."""
    fault: InputError | NoMemoryError | None = None
    """Why there are no crops; raised in the main process, as raising it in a worker would add a traceback."""


class Batch(NamedTuple):
    """Views of N images, [V, N, C, H, W] at each size, finished or not yet; the rest as in `Item`."""

    views: Crops | Views | None
    skipped: list[tuple[int, str]]
    fault: JepakitError | None = None


class ViewDataset(Dataset[Item]):
    """Decodes the image of a key and cuts its views.

    images  the source; `indices` are the images to train on
    spec    the model's preprocess: the kind of pixels wanted
    cache   decoded and downscaled images, or None

    An unreadable file is replaced by one drawn at random, the same on every rank and at every resume.
    """

    def __init__(
        self,
        images: ImageList,
        indices: NDArray[np.intp],
        spec: Preprocess,
        make_views: ViewMaker,
        seed: int,
        cache: ImageCache | None = None,
    ) -> None:
        self.images, self._indices, self._spec = images, indices, spec
        self._make_views, self._seed, self._cache = make_views, seed, cache

    def __getitem__(self, key: Key) -> Item:
        skipped = []
        for place in self._places(key):
            index = int(self._indices[place])
            try:
                pixels = self._read(index)
            except ImageError as error:
                skipped.append((index, str(error)))
                continue
            except (InputError, NoMemoryError) as error:
                return Item(None, skipped, error)
            return Item(self._make_views(pixels, derive_seed(self._seed, "views", key.epoch, key.place)), skipped)
        fault = DataError(f"{_MOST_SUBSTITUTES} images in a row cannot be read; the first: {skipped[0][1]}")
        return Item(None, skipped, fault)

    def _places(self, key: Key) -> Iterator[int]:
        """The key's own place, then random substitutes: its neighbours could be tiles of the same damaged slide."""
        yield key.place
        random = np.random.default_rng(derive_seed(self._seed, "substitutes", key.epoch, key.place))
        yield from random.integers(len(self._indices), size=_MOST_SUBSTITUTES - 1).tolist()

    def _read(self, index: int) -> Pixels:
        least_side = self._make_views.least_side
        stamp = None if self._cache is None else self.images.stamp(index)
        if self._cache is None or stamp is None:
            return read_image(self.images[index], self._spec, at_least=least_side)
        key = self._cache.key(stamp)
        pixels = self._cache.get(key)
        if pixels is None:
            pixels = downscale(read_image(self.images[index], self._spec, at_least=least_side), least_side)
            self._cache.put(key, pixels)
        return pixels


def make_loader(
    dataset: ViewDataset, batches: StepBatches, workers: int, *, prefetch: int, pin: bool, finished: bool
) -> DataLoader[Batch]:
    """A loader of `batches`; the number of workers changes nothing but speed.

    prefetch  batches that each worker prepares in advance
    finished  whether views are finished (`views.finish`) in the loader's processes, rather than on the training device
    """
    return DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=batches,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        collate_fn=partial(_collate, finished=finished),
        pin_memory=pin,
        multiprocessing_context=start_method(workers),
        worker_init_fn=_start_worker if workers else None,
        timeout=PATIENCE_S if workers else 0,
    )


@contextmanager
def iterating(loader: Iterable[Batch]) -> Iterator[Iterator[Batch]]:
    """The loader's batches; its processes end with the block.

    Otherwise an error kept somewhere would keep its frames and the iterator in them alive, and this process would wait
    forever at exit for loader processes, which ignore SIGTERM.
    """
    batches: Any = iter(loader)
    try:
        yield batches
    finally:
        if hasattr(batches, "_shutdown_workers"):  # as torch does when the iterator is garbage-collected
            batches._shutdown_workers()
            for process in batches._workers:
                process.kill()  # in case it is still reading


def _collate(items: list[Item], *, finished: bool) -> Batch:
    """A batch, handed over to the trainer's process; without views but with a fault, if an item has one or it cannot be handed over."""
    skipped = [skip for item in items for skip in item.skipped]
    crops = [item.crops for item in items if item.crops is not None]
    if len(crops) < len(items):
        return Batch(None, skipped, next(item.fault for item in items if item.fault is not None))
    unfinished = collate(crops)
    views = finish(unfinished) if finished else unfinished
    try:
        hand_over(views.views if isinstance(views, Crops) else views)
    except TrainingError as fault:
        return Batch(None, skipped, fault)
    return Batch(views, skipped)


def views_on(device: torch.device, batch: Batch) -> Views:
    """A batch's views on `device`, finished there unless the loader has done so; raises the batch's fault, if it has one."""
    if batch.views is None:
        assert batch.fault is not None
        raise batch.fault
    moved = batch.views.to(device)
    return finish(moved) if isinstance(moved, Crops) else moved


def _start_worker(_: int) -> None:
    end_with_trainer()
    # A signal sent to a whole job, or to all of a lost terminal, is meant for the trainer, which still needs the batches
    # of its last step.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    silence_loggers()
