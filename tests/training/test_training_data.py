"""From files to batches: the split, the order, the substitutes of broken files, and the loader."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from jepakit._groups import main_class
from jepakit.bundle import Preprocess
from jepakit.config import ViewsConfig
from jepakit.errors import DataError
from jepakit.sources import list_images
from jepakit_training.cache import ImageCache
from jepakit_training.data import ENOUGH_GROUPS, Key, StepBatches, ViewDataset, make_loader, split, views_on
from jepakit_training.views import ViewMaker, Views, finish

SPEC = Preprocess(
    size=64, resize_to=64, resize="shorter", interpolation="bicubic", bands=3, dtype="uint8", mean=(0.5,) * 3,
    std=(0.5,) * 3,
)  # fmt: skip


def test_split_holds_each_class_out_in_proportion_and_never_overlaps() -> None:
    labels = ["a"] * 100 + ["b"] * 50 + ["c"] * 10 + ["d"] * 2
    parts = split(len(labels), labels, share=0.2, most=1000, seed=0)
    held_out = Counter(labels[index] for index in parts.held_out)
    assert held_out == {"a": 20, "b": 10, "c": 3, "d": 1}
    assert sorted([*parts.train, *parts.held_out]) == list(range(len(labels)))


def test_a_rare_class_holds_out_what_the_verdict_needs_where_it_can_spare_it() -> None:
    labels = ["common"] * 50_000 + ["nine"] * 9 + ["eight"] * 8 + ["two"] * 2 + ["one", "other"]
    for seed in range(20):
        parts = split(len(labels), labels, share=0.2, most=2000, seed=seed)
        held_out = Counter(labels[index] for index in parts.held_out)
        assert held_out == {"common": 1999, "nine": 3, "eight": 1, "two": 1}


def test_classes_of_one_image_each_are_one_stratum_where_there_are_no_others() -> None:
    assert len(split(40, [str(number) for number in range(40)], share=0.2, most=1000, seed=0).held_out) == 8


def test_a_class_of_nine_groups_holds_three_of_them_out() -> None:
    groups = [f"p{number // 20}" for number in range(180)]
    held_out = split(180, None, groups=groups, share=0.1, most=1000, seed=0).held_out
    assert len({groups[index] for index in held_out}) == 3


def test_split_depends_on_the_seed_alone() -> None:
    one, again, other = (split(200, None, share=0.2, most=1000, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.held_out, again.held_out)
    assert set(one.held_out) != set(other.held_out)
    assert len(one.held_out) == len(other.held_out) == 40


def test_split_is_capped() -> None:
    assert len(split(10_000, None, share=0.2, most=300, seed=0).held_out) == 300
    labels = ["a"] * 9000 + ["b"] * 1000
    held_out = split(10_000, labels, share=0.2, most=300, seed=0).held_out
    assert Counter(labels[index] for index in held_out) == {"a": 270, "b": 30}


def take(
    count: int = 10, batch: int = 4, seed: int = 0, steps: range = range(10), rank: int = 0, world: int = 1
) -> list[list[Key]]:
    return list(StepBatches(count, batch, seed, steps, rank=rank, world=world))


@pytest.mark.parametrize(("count", "batch"), [(10, 4), (7, 7), (5, 8), (3, 20)])
def test_every_image_is_seen_equally_often(count: int, batch: int) -> None:
    seen = Counter(key.place for keys in take(count, batch, steps=range(count)) for key in keys)
    assert set(seen.values()) == {batch}
    assert len(seen) == count


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


def test_its_length_is_the_number_of_steps() -> None:
    assert len(StepBatches(10, 4, 0, range(3, 10))) == 7


def make_dataset(folder: Path, seed: int = 0, cache: ImageCache | None = None) -> ViewDataset:
    maker, images = ViewMaker(ViewsConfig(n_local=1), 64, 32), list_images(folder, "none")
    return ViewDataset(images, np.arange(len(images)), SPEC, maker, seed, cache)


def views_of(dataset: ViewDataset, key: Key) -> Views:
    crops = dataset[key].crops
    assert crops is not None
    return finish(crops)


def test_an_unreadable_file_is_replaced_by_its_neighbour_and_reported(image_folder: Callable[..., Path]) -> None:
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


def test_the_last_file_is_replaced_by_the_first(image_folder: Callable[..., Path]) -> None:
    folder = image_folder(classes=0, per_class=4)
    (folder / "003.png").write_bytes(b"")
    assert [index for index, _ in make_dataset(folder)[Key(0, 3)].skipped] == [3]


def test_a_folder_of_rubbish_stops_with_the_first_files_name(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(b"rubbish")
    loader = make_loader(
        make_dataset(tmp_path), StepBatches(4, 2, 0, range(1)), 1, prefetch=2, pin=False, finished=True
    )
    with pytest.raises(DataError, match=r"^20 images in a row cannot be read; the first: \d\.png"):
        views_on(torch.device("cpu"), next(iter(loader)))


def test_views_depend_on_the_runs_seed_and_on_the_pass_over_the_data(image_folder: Callable[..., Path]) -> None:
    folder = image_folder(classes=0, per_class=2)
    views = [views_of(make_dataset(folder, seed), Key(epoch, 0)).global_ for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert not torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])


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
    dataset = make_dataset(folder, cache=ImageCache(tmp_path / "cache", 1 << 30, 80))
    first, again = views_of(dataset, Key(0, 1)), views_of(dataset, Key(0, 1))
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    (folder / "001.png").write_bytes((folder / "002.png").read_bytes())
    assert not torch.equal(views_of(dataset, Key(0, 1)).global_, first.global_)


def test_groups_are_held_out_whole_and_each_stratum_in_proportion() -> None:
    random = np.random.default_rng(0)
    patients = [f"p{number}" for number in random.integers(0, 60, 600)]
    labels = ["ill" if int(name[1:]) < 20 else "well" for name in patients]
    parts = split(600, labels, groups=patients, share=0.25, most=1000, seed=0)
    assert not {patients[index] for index in parts.held_out} & {patients[index] for index in parts.train}
    held_out = Counter(labels[index] for index in parts.held_out)
    for label, count in Counter(labels).items():
        assert held_out[label] == pytest.approx(0.25 * count, abs=12)


@pytest.mark.parametrize(("slides", "held_out"), [(100, 20), (450, 90), (1000, 120), (2000, 120)])
def test_of_large_groups_as_many_are_held_out_as_the_verdict_needs(slides: int, held_out: int) -> None:
    """1000 tiles a slide, of which 2000 tiles alone would be two slides."""
    slide_of = np.repeat(np.arange(slides), 1000)
    labels, groups = np.array(["a", "b"])[slide_of % 2], slide_of.astype(str)
    parts = split(
        len(slide_of),
        labels.tolist(),
        groups=groups.tolist(),
        share=0.2,
        most=2000,
        seed=0,
        enough_groups=ENOUGH_GROUPS,
    )
    assert Counter(np.unique(slide_of[parts.held_out]) % 2) == {0: held_out // 2, 1: held_out // 2}
    assert len(parts.held_out) <= 0.2 * len(slide_of)


def test_a_rare_class_holds_out_its_part_of_the_groups_and_no_more_than_its_share() -> None:
    slide_of = np.repeat(np.arange(1000), 100)
    for rare, expected in ((400, {"rare": 60, "common": 60}), (50, {"rare": 10, "common": 60})):
        labels = np.where(slide_of < rare, "rare", "common")
        parts = split(
            100_000,
            labels.tolist(),
            groups=slide_of.astype(str).tolist(),
            share=0.2,
            most=2000,
            seed=0,
            enough_groups=ENOUGH_GROUPS,
        )
        assert (
            Counter("rare" if slide < rare else "common" for slide in np.unique(slide_of[parts.held_out])) == expected
        )


def test_the_class_of_a_group_is_that_of_most_of_its_images_at_no_cost_of_memory() -> None:
    groups, classes = np.array([0, 0, 0, 1, 1, 2, 2, 2]), np.array([2, 1, 2, 3, 0, 1, 1, 3])
    assert main_class(groups, classes).tolist() == [2, 0, 1]
    every = np.arange(1_000_000)  # a table of groups and classes would be 8 TB
    np.testing.assert_array_equal(main_class(every, every[::-1]), every[::-1])


def test_classes_of_one_group_each_are_not_held_out_as_a_whole_class_by_class() -> None:
    scenes = [f"scene{number // 10}" for number in range(100)]
    parts = split(100, scenes, groups=scenes, share=0.2, most=1000, seed=0)
    assert len(parts.held_out) == 20


def test_a_class_of_one_group_stays_in_training_and_so_does_a_giant() -> None:
    labels = ["a"] * 50 + ["b"] * 50 + ["c"] * 10
    groups = [f"p{number // 5}" for number in range(100)] + ["only"] * 10
    giant = ["giant"] * 1000 + [f"p{number // 10}" for number in range(100)]
    for seed in range(20):
        assert not {100, 105} & set(
            split(110, labels, groups=groups, share=0.2, most=1000, seed=seed).held_out.tolist()
        )
        assert 0 not in split(1100, None, groups=giant, share=0.2, most=1000, seed=seed).held_out
