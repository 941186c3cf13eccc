"""From files to batches: the order, the substitutes for broken files, and the loader."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import psutil
import pytest
import torch
from tests.training.forked import start
from tests.training.full_disk import files_no_longer_than
from torch.utils.data import DataLoader, Dataset

from jepakit.bundles.manifest import Preprocess
from jepakit.config import ViewsConfig
from jepakit.errors import DataError, NoMemoryError, TrainingError
from jepakit.sources import list_images
from jepakit_training.data.batches import Key, StepBatches, ViewDataset, iterating, make_loader, views_on
from jepakit_training.data.cache import ImageCache
from jepakit_training.data.views import ViewMaker, Views, finish
from jepakit_training.loader_limits import end_with_trainer
from jepakit_training.memory import memory_errors

SPEC = Preprocess(
    size=64, resize_to=64, resize="shorter", interpolation="bicubic", bands=3, dtype="uint8", mean=(0.5,) * 3,
    std=(0.5,) * 3,
)  # fmt: skip


def take(
    count: int = 10, batch: int = 4, seed: int = 0, steps: range = range(10), rank: int = 0, world: int = 1
) -> list[list[Key]]:
    return list(StepBatches(count, batch, seed, steps, rank=rank, world=world))


@pytest.mark.parametrize(("count", "batch"), [(10, 4), (7, 7), (5, 8), (3, 20)])
def test_every_image_is_seen_equally_often(count: int, batch: int) -> None:
    seen = Counter(key.place for keys in take(count, batch, steps=range(count)) for key in keys)
    assert set(seen.values()) == {batch}
    assert len(seen) == count


@pytest.mark.parametrize(("count", "batch"), [(10, 4), (9, 8), (140, 128), (200, 128), (255, 128), (400, 128)])
def test_no_batch_holds_an_image_twice(count: int, batch: int) -> None:
    for keys in take(count, batch, steps=range(60)):
        assert len({key.place for key in keys}) == batch
    places = [key.place for keys in take(count, batch, steps=range(count)) for key in keys]
    assert all(sorted(places[first : first + count]) == list(range(count)) for first in range(0, len(places), count))


def test_every_epoch_has_an_order_of_its_own() -> None:
    orders = np.array([[key.place for key in keys] for keys in take(30, 30, steps=range(3))])
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[1], orders[2])
    assert [{key.epoch for key in keys} for keys in take(30, 30, steps=range(3))] == [{0}, {1}, {2}]


@pytest.mark.parametrize(("count", "batch"), [(10, 4), (3, 8)])
@pytest.mark.parametrize("first", [0, 1, 5, 9])
def test_a_resumed_stream_is_the_tail_of_the_whole_one(count: int, batch: int, first: int) -> None:
    assert take(count, batch, steps=range(first, 10)) == take(count, batch)[first:]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_out_the_batch_of_one_process(world: int) -> None:
    whole = take(10, 8)
    shares = [take(10, 8, rank=rank, world=world) for rank in range(world)]
    for step, keys in enumerate(whole):
        assert [len(share[step]) for share in shares] == [8 // world] * world
        assert [shares[place % world][step][place // world] for place in range(8)] == keys


def test_another_seed_is_another_order() -> None:
    assert take(30, 30, seed=0) != take(30, 30, seed=1)


def make_dataset(folder: Path, seed: int = 0, cache: ImageCache | None = None) -> ViewDataset:
    maker, images = ViewMaker(ViewsConfig(n_local=1), 64, 32), list_images(folder, "none")
    return ViewDataset(images, np.arange(len(images)), SPEC, maker, seed, cache)


def views_of(dataset: ViewDataset, key: Key) -> Views:
    crops = dataset[key].crops
    assert crops is not None
    return finish(crops)


def test_an_unreadable_file_is_replaced_by_another_and_reported(image_folder: Callable[..., Path]) -> None:
    folder = image_folder(classes=0, per_class=6)
    whole = make_dataset(folder)
    untouched = views_of(whole, Key(0, 0))
    (folder / "003.png").write_bytes(b"this is no image")
    broken = make_dataset(folder)

    item = broken[Key(0, 3)]
    assert [index for index, _ in item.skipped] == [3]
    assert "003.png" in item.skipped[0][1]
    assert all(
        torch.equal(a, b)
        for a, b in zip(finish(item.crops or pytest.fail("no crops")), views_of(broken, Key(0, 3)), strict=True)
    )
    assert all(torch.equal(a, b) for a, b in zip(untouched, views_of(broken, Key(0, 0)), strict=True))
    assert broken[Key(0, 4)].skipped == []


@pytest.mark.parametrize("workers", [0, 1])
def test_a_lack_of_memory_is_told_as_such_and_no_substitute_is_taken(
    image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(
        "jepakit_training.data.batches.read_image", MagicMock(side_effect=NoMemoryError("a.png: no memory"))
    )
    dataset, batches = (
        make_dataset(image_folder(classes=0, per_class=6)),
        StepBatches(6, 2, 0, range(1), rank=0, world=1),
    )
    told = memory_errors(micro_batch=64, activation_checkpointing=False, image_size=64, workers=workers)
    with (
        iterating(make_loader(dataset, batches, workers, prefetch=1, pin=False, finished=True)) as loaded,
        pytest.raises(NoMemoryError, match=r"^a\.png: no memory$"),
        told,
    ):
        views_on(torch.device("cpu"), next(loaded))


def test_each_image_has_substitutes_of_its_own_in_each_pass(image_folder: Callable[..., Path]) -> None:
    dataset = make_dataset(image_folder(classes=0, per_class=6))
    others = [[*dataset._places(Key(epoch, place))][1:] for epoch, place in ((0, 0), (0, 1), (1, 0))]
    assert others[0] not in others[1:]
    assert others[1] != others[2]


def test_a_damaged_slide_stops_nothing_though_its_tiles_are_neighbours(image_folder: Callable[..., Path]) -> None:
    folder = image_folder(classes=0, per_class=80)
    for number in range(40):
        (folder / f"{number:03d}.png").write_bytes(b"a tile of one slide")
    dataset = make_dataset(folder)
    for place in range(40):
        assert dataset[Key(0, place)].fault is None
    assert all(index < 40 for index, _ in dataset[Key(0, 0)].skipped)


def test_a_folder_of_rubbish_stops_with_the_first_files_name(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(b"rubbish")
    loader = make_loader(
        make_dataset(tmp_path), StepBatches(4, 2, 0, range(1)), 1, prefetch=2, pin=False, finished=True
    )
    with pytest.raises(DataError, match=r"^20 images in a row cannot be read; the first: \d\.png"):
        views_on(torch.device("cpu"), next(iter(loader)))


def test_a_loaders_processes_end_with_its_block_whoever_keeps_the_error(tmp_path: Path) -> None:
    """They ignore SIGTERM: an exit would wait for them for ever."""
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(b"rubbish")
    loader = make_loader(
        make_dataset(tmp_path), StepBatches(4, 2, 0, range(9)), 1, prefetch=2, pin=False, finished=True
    )
    before = set(multiprocessing.active_children())

    def train() -> None:
        with iterating(loader) as batches:
            batch = next(batches)
            views_on(torch.device("cpu"), batch)

    with pytest.raises(DataError, match="20 images in a row"):
        train()
    assert set(multiprocessing.active_children()) <= before


def test_views_depend_on_the_runs_seed_and_on_the_pass_over_the_data(image_folder: Callable[..., Path]) -> None:
    folder = image_folder(classes=0, per_class=2)
    views = [views_of(make_dataset(folder, seed), Key(epoch, 0)).global_ for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert not torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])


def test_every_image_of_a_pass_is_cut_in_its_own_way(image_folder: Callable[..., Path]) -> None:
    folder = image_folder(classes=0, per_class=2)
    (folder / "001.png").write_bytes((folder / "000.png").read_bytes())
    first, second = (views_of(make_dataset(folder), Key(0, place)).global_ for place in (0, 1))
    assert not torch.equal(first, second)


def test_neither_the_number_of_workers_nor_where_colours_are_changed_changes_anything(
    image_folder: Callable[..., Path],
) -> None:
    folder = image_folder(classes=0, per_class=6)
    (folder / "002.png").write_bytes(b"broken")

    def batches(workers: int, finished: bool) -> list[tuple[Views, list[tuple[int, str]]]]:
        loader = make_loader(
            make_dataset(folder), StepBatches(6, 4, 0, range(4)), workers, prefetch=1, pin=False, finished=finished
        )
        return [(views_on(torch.device("cpu"), batch), batch.skipped) for batch in loader]

    alone = batches(0, finished=True)
    for others in (batches(2, finished=True), batches(2, finished=False)):
        assert len(alone) == len(others) == 4
        for (views, skipped), (other_views, other_skipped) in zip(alone, others, strict=True):
            assert torch.equal(views.global_, other_views.global_)
            assert torch.equal(views.local, other_views.local)
            assert skipped == other_skipped
    assert {index for _, skipped in alone for index, _ in skipped} == {2}
    assert alone[0][0].global_.shape == (2, 4, 3, 64, 64)
    assert alone[0][0].local.shape == (1, 4, 3, 32, 32)


def test_from_the_cache_the_views_are_the_same_and_a_changed_file_is_read_anew(
    image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = image_folder(classes=0, per_class=3, height=300, width=340)
    dataset = make_dataset(folder, cache=ImageCache(tmp_path / "cache", 1 << 30, 80, ""))
    first, again = views_of(dataset, Key(0, 1)), views_of(dataset, Key(0, 1))
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    (folder / "001.png").write_bytes((folder / "002.png").read_bytes())
    assert not torch.equal(views_of(dataset, Key(0, 1)).global_, first.global_)


@pytest.mark.parametrize("finished", [True, False])
def test_a_batch_without_room_in_shared_memory_is_an_error_at_once(
    image_folder: Callable[..., Path], finished: bool
) -> None:
    """Left to torch, it is dropped, and the trainer waits for ten minutes."""
    dataset = make_dataset(image_folder(classes=0, per_class=6))
    loader = make_loader(dataset, StepBatches(6, 4, 0, range(2)), 1, prefetch=1, pin=False, finished=finished)
    with files_no_longer_than(4096), iterating(loader) as batches:
        batch = next(batches)
    with pytest.raises(TrainingError, match=r"no room in /dev/shm .* MB are free.*--shm-size.*fewer workers"):
        views_on(torch.device("cpu"), batch)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere processes never start by fork")
def test_what_cannot_be_pickled_is_loaded_however_python_starts_processes(image_folder: Callable[..., Path]) -> None:
    dataset = make_dataset(image_folder(classes=0, per_class=4))
    dataset.unpicklable = lambda: None  # type: ignore[attr-defined]
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        loader = make_loader(dataset, StepBatches(4, 2, 0, range(2)), 1, prefetch=2, pin=False, finished=True)
        with iterating(loader) as batches:
            assert len(list(batches)) == 2
    finally:
        multiprocessing.set_start_method(before, force=True)


class Large(Dataset[bytes]):
    """Items that do not fit into a pipe; whoever makes them is noted in the folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __getitem__(self, index: int) -> bytes:
        (self._folder / str(os.getpid())).touch()
        return bytes(1 << 20)


def load_until_killed(folder: Path) -> None:
    """Begin to load, and take nothing."""
    loader = DataLoader(
        Large(folder), sampler=range(8), num_workers=1, collate_fn=list, worker_init_fn=end_with_trainer
    )  # fmt: skip
    begun = iter(loader)
    time.sleep(60)
    del begun


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's way to be told")
def test_a_loaders_process_ends_with_a_killed_trainer_though_nobody_takes_its_batch(tmp_path: Path) -> None:
    start(int, log=tmp_path / "log").join()  # until everything is imported
    trainer = start(load_until_killed, tmp_path, log=tmp_path / "log")
    deadline = time.monotonic() + 30
    while not (made := [int(file.name) for file in tmp_path.iterdir() if file.name.isdecimal()]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    trainer.kill()
    while psutil.pid_exists(made[0]) and psutil.Process(made[0]).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    trainer.join()
