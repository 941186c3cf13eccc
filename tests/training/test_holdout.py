"""Which images are held out, and which are measured."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from jepakit._groups import main_class
from jepakit.bundles.comparison import Scores
from jepakit.config import AdaptConfig
from jepakit.errors import DataError
from jepakit.evaluation.evaluate import Measurement, judge
from jepakit.sources import ImageList, list_images
from jepakit_training.holdout import ENOUGH_GROUPS, MeasuringSet, Split, _near_share, hold_out, split


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


def test_a_rare_class_has_enough_images_to_fit_probes_on() -> None:
    labels = np.repeat(["common", "other", "rare", "rarer"], [70_000, 29_940, 30, 30])[
        np.random.default_rng(0).permutation(100_000)
    ]
    pixels = np.zeros((4, 4), np.uint8)
    images = replace(list_images([pixels] * 100_000, "none"), labels=tuple(labels.tolist()))
    parts = split(100_000, labels.tolist(), share=0.2, most=2000, seed=0)
    chosen = MeasuringSet.choose(images, parts, 2000)
    assert chosen.labels is not None
    fit, held_out = Counter(chosen.labels[chosen.is_fit]), Counter(chosen.labels[~chosen.is_fit])
    assert fit["rare"] == fit["rarer"] == 20
    assert held_out["rare"] == held_out["rarer"] == 3
    assert fit.total() == held_out.total() == 2000
    assert fit["common"] == pytest.approx(0.7 * 2000, rel=0.05)
    assert set(chosen.indices[chosen.is_fit]) <= set(parts.train)
    assert len(set(chosen.indices)) == 4000


def listed(labels: NDArray[Any], groups: NDArray[Any] | None = None) -> ImageList:
    """Images in memory with these labels and groups."""
    images = list_images([np.zeros((4, 4), np.uint8)] * len(labels), "none")
    return replace(
        images, labels=tuple(map(str, labels)), groups=None if groups is None else tuple(map(str, groups))
    )  # fmt: skip


def test_of_more_classes_than_images_to_measure_on_some_are_measured_each_on_both_sides() -> None:
    """4800 of 5000 classes: the others are on one side of the split only."""
    class_of = np.concatenate([np.arange(30_000) % 4800, np.arange(4800, 5000)])
    random = np.random.default_rng(0).permutation(30_000)
    split = Split(np.concatenate([random[:24_000], np.arange(30_000, 30_200)]), random[24_000:])
    chosen = MeasuringSet.choose(listed(class_of), split, 2000)
    assert chosen.labels is not None
    fit, held_out = Counter(chosen.labels[chosen.is_fit]), Counter(chosen.labels[chosen.is_labelled & ~chosen.is_fit])
    assert fit.total() == 2000
    assert held_out.keys() <= fit.keys()
    assert held_out.keys() == set(chosen.labels[chosen.is_labelled & chosen.is_fit])
    assert held_out.total() <= 2000


@pytest.mark.parametrize("n_classes", [700, 1000])
def test_a_thousand_classes_are_all_judged(n_classes: int) -> None:
    labels = np.arange(30 * n_classes) % n_classes
    images = listed(labels)
    parts = split(len(images), images.strata(), share=0.2, most=2000, seed=0)
    chosen = MeasuringSet.choose(images, parts, 2000)
    assert chosen.labels is not None
    fit, truth = chosen.labels[chosen.is_fit], chosen.labels[~chosen.is_fit]
    right = np.random.default_rng(0).random((2, 2, len(truth))) < np.array([0.3, 0.6])[:, None, None]
    none = Scores(linear=0, linear_balanced=0, knn=0, knn_balanced=0)
    before, after = (Measurement(none, each) for each in right)
    judged = judge(before, after, truth, n_train=len(fit), train_labels=np.unique(images.labels_given() or ()))
    assert judged.n_held_out == 3 * n_classes
    assert judged.verdict.word == "better"


def test_slides_of_many_tiles_are_all_measured_and_evenly() -> None:
    """120 of 1000 slides are held out; some have 5 tiles, some 1500."""
    sizes = np.random.default_rng(0).choice([5, 200, 1500], 1000, p=[0.1, 0.6, 0.3])
    slide_of = np.repeat(np.arange(1000), sizes)
    images = listed(slide_of % 2, slide_of)
    parts = split(
        len(images), images.strata(), groups=images.groups, share=0.2, most=2000, seed=0, enough_groups=ENOUGH_GROUPS
    )
    chosen = MeasuringSet.choose(images, parts, 2000)
    assert chosen.groups is not None
    held_out = Counter(chosen.groups[~chosen.is_fit].tolist())
    assert held_out.keys() == set(slide_of[parts.held_out].astype(str).tolist())
    assert all(min(int(sizes[int(slide)]), 16) <= count <= 20 for slide, count in held_out.items())
    assert len(chosen.groups[chosen.is_fit]) == held_out.total() == 2000
    truth = chosen.labels[~chosen.is_fit] if chosen.labels is not None else pytest.fail("no labels")
    alike = Measurement(Scores(linear=1, linear_balanced=1, knn=1, knn_balanced=1), np.ones((2, 2000), bool))
    assert judge(alike, alike, truth, n_train=2000, groups=chosen.groups[~chosen.is_fit]).verdict.word == "same"


def test_classes_that_take_all_their_images_leave_none_to_spread_over_groups() -> None:
    labels = np.repeat([f"class {number:02}" for number in range(7)], 10)
    images = listed(labels, np.arange(70).astype(str))
    parts = hold_out(AdaptConfig(images="x", out="y", measure_on=20), images)[0]
    chosen = MeasuringSet.choose(images, parts, 20)
    assert Counter(labels[chosen.indices[~chosen.is_fit]]) == dict.fromkeys(labels.tolist(), 3)


def test_fewer_images_than_groups_are_of_as_many_groups() -> None:
    images = listed(np.zeros(400), np.arange(400) // 4)
    chosen = MeasuringSet.choose(images, Split(np.arange(200), np.arange(200, 400)), 20)
    assert chosen.groups is not None
    assert Counter(Counter(chosen.groups).values()) == {1: 40}


def partly_labelled(count: int, groups: NDArray[Any] | None = None) -> ImageList:
    """Every tenth image has a label: two of three of them "a", the others "b"."""
    images = listed(np.arange(count), groups)
    labels = (None if place % 10 else "b" if place % 3 == 0 else "a" for place in range(count))
    return replace(images, labels=tuple(labels))


def test_of_a_set_that_is_labelled_in_part_the_labelled_images_are_held_out_in_proportion() -> None:
    """However many others there are: 2000 of 30,000 would be 20 of 300."""
    images = partly_labelled(3000)
    parts, notes = hold_out(AdaptConfig(images="x", measure_on=300), images)
    labels = np.array(images.labels)
    assert Counter(labels[parts.held_out]) == {"a": 40, "b": 20}
    assert sorted([*parts.train, *parts.held_out]) == list(range(3000))
    assert notes == []
    fully = listed(np.array(images.labels_given()))
    of_labelled, _ = hold_out(AdaptConfig(images="x", measure_on=300), fully)
    np.testing.assert_array_equal(parts.held_out, 10 * of_labelled.held_out)


def test_a_group_of_labelled_and_other_images_is_held_out_whole() -> None:
    groups = np.arange(3000) // 20
    parts, _ = hold_out(AdaptConfig(images="x"), partly_labelled(3000, groups))
    assert len(parts.held_out) == 600
    assert not set(groups[parts.held_out]) & set(groups[parts.train])


def test_labelled_images_of_one_group_among_many_are_held_out_with_a_warning() -> None:
    groups = np.where(np.arange(3000) % 10, np.arange(3000) // 20, 7)
    images = partly_labelled(3000, groups)
    parts, (caveat,) = hold_out(AdaptConfig(images="x"), images)
    assert "all labelled images are one group" in caveat.warning
    assert len(parts.held_out) == 60
    assert MeasuringSet.choose(images, parts, 2000).groups is None


def test_labelled_images_judge_and_others_fill_up_what_the_embedding_is_centred_on() -> None:
    images = partly_labelled(30_000)
    parts, _ = hold_out(AdaptConfig(images="x"), images)
    for most, labelled in ((2800, 2400), (2000, 2000)):
        chosen = MeasuringSet.choose(images, parts, most)
        assert len(chosen.indices) == most + 600
        assert chosen.is_labelled[~chosen.is_fit].all()
        assert chosen.is_labelled[chosen.is_fit].sum() == labelled
        assert chosen.labels is not None
        assert images.labels is not None
        for place, label in zip(chosen.indices[chosen.is_labelled], chosen.labels[chosen.is_labelled], strict=True):
            assert images.labels[place] == label
        assert set(chosen.indices[chosen.is_fit]) <= set(parts.train.tolist())
        assert (np.diff(chosen.indices[chosen.is_fit]) > 0).all()


def test_one_labelled_image_cannot_be_held_out() -> None:
    images = replace(listed(np.arange(40)), labels=(*[None] * 39, "a"))
    with pytest.raises(DataError, match=r"0 are held out: .* or the labels$"):
        hold_out(AdaptConfig(images="x"), images)


def test_the_seed_of_a_run_says_which_images_are_held_out() -> None:
    source = list_images([np.zeros((8, 8), np.uint8)] * 100, "none")
    first, second = (hold_out(AdaptConfig(images="x", seed=seed), source)[0].held_out for seed in (0, 1))
    assert set(first) != set(second)


def test_groups_on_both_sides_of_a_manifests_split_are_told() -> None:
    source = list_images([np.zeros((8, 8), np.uint8)] * 40, "none")
    source = replace(source, groups=tuple(f"g{place % 10}" for place in range(40)), held_out=np.arange(40) < 12)
    assert "10 groups are on both sides" in hold_out(AdaptConfig(images="x"), source)[1][0].warning


def test_the_share_of_a_run_is_held_out_and_without_labels_no_groups_beyond_it() -> None:
    images = listed(np.arange(6000) % 2, np.arange(6000) // 20)
    assert len(hold_out(AdaptConfig(images="x", held_out=0.4), images)[0].held_out) == 2400
    without_labels = replace(images, labels=None)
    assert len(hold_out(AdaptConfig(images="x", measure_on=100), without_labels)[0].held_out) == 100


def test_held_out_images_without_a_label_are_measured_where_no_others_are_held_out() -> None:
    images = partly_labelled(100)
    held_out = np.flatnonzero(np.arange(100) % 10 == 3)
    chosen = MeasuringSet.choose(images, Split(np.setdiff1d(np.arange(100), held_out), held_out), 50)
    np.testing.assert_array_equal(chosen.indices[~chosen.is_fit], held_out)
    assert not chosen.is_labelled[~chosen.is_fit].any()


def test_where_no_group_fits_into_the_share_the_smallest_are_held_out() -> None:
    assert sorted(_near_share(np.arange(4), np.array([50, 7, 9, 8]), 0.01, 3)) == [1, 2, 3]


def test_the_group_that_brings_the_share_nearer_is_held_out() -> None:
    assert len(_near_share(np.arange(10), np.full(10, 10), 0.27, 1)) == 3  # 30 of 100 is nearer to 27 than 20


@pytest.mark.parametrize(("count", "held_out", "fits"), [(16, 8, True), (16, 9, False), (15, 3, False)])
def test_sixteen_images_of_which_eight_train_are_the_fewest(count: int, held_out: int, fits: bool) -> None:
    source = list_images([np.zeros((8, 8), np.uint8)] * count, "none")
    source = replace(source, held_out=np.arange(count) < held_out)
    if fits:
        assert len(hold_out(AdaptConfig(images="x"), source)[0].train) == 8
    else:
        with pytest.raises(DataError, match=r"too few to adapt on|8 and 1 are the fewest possible"):
            hold_out(AdaptConfig(images="x"), source)
