"""Verdicts on made-up vectors whose truth is known."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError
from typer.testing import CliRunner

from jepakit import _frontdoor
from jepakit.bundles.comparison import Comparison, Scores, Verdict
from jepakit.cli import app
from jepakit.errors import DataError
from jepakit.evaluation import evaluate
from jepakit.evaluation import interval as _interval
from jepakit.evaluation.evaluate import (
    SAME_WITHIN,
    Measurement,
    _groups_to_call_it_the_same,
    _leaving_out,
    cross_measure,
    judge,
    judge_best,
    measure,
    no_labels,
)
from jepakit.evaluation.interval import bootstrap, covariance, variance_of_fits
from jepakit.probes import LinearProbe

NO_SCORES = Scores(linear=0, linear_balanced=0, knn=0, knn_balanced=0)


def made_vectors(
    n: int, noise: float, *, classes: int = 3, dim: int = 8, seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.str_]]:
    """Class centres that are the same for every seed, with noise around them."""
    centres = np.random.default_rng(99).standard_normal((classes, dim))
    labels = np.arange(n) % classes
    vectors = centres[labels] + noise * np.random.default_rng(seed).standard_normal((n, dim))
    return vectors.astype(np.float32), np.array(["ant", "bee", "cat", "dog"])[labels]


def measured(noise: float, n_held_out: int = 300) -> tuple[Measurement, NDArray[np.str_]]:
    train, train_labels = made_vectors(120, noise, seed=1)
    held_out, held_out_labels = made_vectors(n_held_out, noise, seed=2)
    return measure(train, train_labels, held_out, held_out_labels), held_out_labels


def measurement(right: NDArray[np.bool_]) -> Measurement:
    """bool [N]: both probes are right on the same images."""
    return Measurement(NO_SCORES, np.stack([right, right]))


def judged(before: NDArray[np.bool_], after: NDArray[np.bool_], truth: NDArray[np.str_]) -> Verdict:
    return judge(measurement(before), measurement(after), truth, n_train=10).verdict


def test_separated_classes_are_measured_as_perfect() -> None:
    result, _ = measured(noise=0.05)
    assert result.scores == Scores(linear=1, linear_balanced=1, knn=1, knn_balanced=1)
    assert result.right.dtype == np.bool_
    assert result.right.shape == (2, 300)
    assert result.right.all()


def test_pure_noise_is_measured_as_chance() -> None:
    result, _ = measured(noise=1000)
    assert result.scores.linear == pytest.approx(1 / 3, abs=0.1)
    assert result.scores.knn_balanced == pytest.approx(1 / 3, abs=0.1)


def test_balanced_scores_give_each_class_the_same_weight() -> None:
    train, train_labels = made_vectors(60, 0.05, classes=2, seed=1)
    held_out, truth = made_vectors(100, 0.05, classes=2, seed=2)
    rare = np.concatenate([np.flatnonzero(truth == "ant"), np.flatnonzero(truth == "bee")[:2]])
    held_out, truth = held_out[rare], truth[rare]
    held_out[-1] = held_out[0]  # one of the two bees looks like an ant
    scores = measure(train, train_labels, held_out, truth).scores
    assert scores.linear == pytest.approx(51 / 52)
    assert scores.linear_balanced == pytest.approx(0.75)
    assert scores.knn == pytest.approx(51 / 52)
    assert scores.knn_balanced == pytest.approx(0.75)


def test_clearer_vectors_are_better_and_the_other_way_round_worse() -> None:
    noisy, truth = measured(noise=2.0)
    clear, _ = measured(noise=0.3)
    up, down = judge(noisy, clear, truth, n_train=120), judge(clear, noisy, truth, n_train=120)
    assert (up.verdict.word, down.verdict.word) == ("better", "worse")
    assert up.verdict.difference == pytest.approx(-(down.verdict.difference or 0))
    assert (up.verdict.low or 0) > 0 > (down.verdict.high or 0)
    assert (up.before, up.after) == (noisy.scores, clear.scores)
    assert (up.n_train, up.n_held_out) == (120, 300)


def test_the_difference_is_the_mean_gain_of_both_balanced_scores() -> None:
    before, truth = measured(noise=2.0)
    after, _ = measured(noise=0.7)
    verdict = judge(before, after, truth, n_train=120).verdict
    gains = (
        after.scores.linear_balanced - before.scores.linear_balanced,
        after.scores.knn_balanced - before.scores.knn_balanced,
    )
    assert verdict.difference == pytest.approx(np.mean(gains))


def test_the_same_vectors_are_the_same() -> None:
    result, truth = measured(noise=1.0)
    verdict = judge(result, result, truth, n_train=120).verdict
    assert (verdict.word, verdict.difference) == ("same", 0)


def test_a_small_difference_on_many_images_is_the_same_and_on_few_cannot_be_told() -> None:
    truth = np.repeat(["a", "b"], 10_000)
    before = np.random.default_rng(0).random(20_000) < 0.9
    after = before.copy()
    after[np.flatnonzero(before)[::400]] = False  # as many lost as gained
    after[np.flatnonzero(~before)[::44]] = True
    assert judged(before, after, truth).word == "same"

    few = np.repeat(["a", "b"], 30)
    before, after = np.random.default_rng(1).random((2, 60)) < 0.8
    verdict = judged(before, after, few)
    assert verdict.word == "cannot tell"
    assert "the interval includes 0" in verdict.reason
    assert (verdict.low or 0) < 0 < (verdict.high or 0)
    assert (verdict.high or 0) - (verdict.low or 0) > SAME_WITHIN


@pytest.mark.parametrize("per_class", [1, 2])
def test_a_handful_of_images_cannot_carry_a_verdict(per_class: int) -> None:
    truth = np.repeat(["a", "b"], per_class)
    wrong, right = np.zeros(len(truth), bool), np.ones(len(truth), bool)
    assert judged(wrong, right, truth).word == "cannot tell"
    assert judged(right, wrong, truth).word == "cannot tell"
    assert judged(right, right, truth).word == "cannot tell"


def test_one_held_out_class_carries_no_verdict_and_the_others_are_named() -> None:
    truth = np.repeat(["tumour"], 40)
    wrong, right = measurement(np.zeros(40, bool)), measurement(np.ones(40, bool))
    alone = judge(wrong, right, truth, n_train=10).verdict
    assert alone.word == "cannot tell"
    assert alone.reason.startswith(
        "only class 'tumour' is held out; a verdict needs at least two classes with 3 held-out images each"
    )
    groups, fitted = np.repeat(list("abcd"), 10), ["tumour"] * 6 + ["normal"] * 4
    named = judge(wrong, right, truth, n_train=10, groups=groups, train_labels=fitted).verdict
    assert (named.word, named.low) == ("cannot tell", None)
    assert "only class 'tumour' is held out" in named.reason
    assert "these have fewer: 'normal' (0): label images of more groups" in named.reason


def test_a_class_of_the_training_images_that_is_not_held_out_is_named_beside_two_that_are() -> None:
    truth = np.repeat(["a", "b"], 40)
    wrong, right = measurement(np.zeros(80, bool)), measurement(np.ones(80, bool))
    verdict = judge(wrong, right, truth, n_train=9, train_labels=["a", "b", "c"] * 3).verdict
    assert verdict.word == "better"
    assert verdict.reason.endswith("classes with fewer than 3 held-out images are left out: 'c' (0)")


def test_a_class_that_no_probe_was_fitted_on_is_left_out_by_name() -> None:
    truth = np.repeat(["a", "b", "new"], 20)
    right = truth != "new"
    known = judge(measurement(~right), measurement(right), truth, n_train=8, train_labels=["a", "b"] * 4)
    assert known.verdict.word == "better"
    assert known.verdict.reason.endswith("classes without images to fit probes on are left out: 'new' (20)")
    assert (known.n_held_out, known.verdict.difference) == (40, 1)
    one = judge(measurement(~right), measurement(right), truth, n_train=8, train_labels=["a"] * 8).verdict
    assert one.word == "cannot tell"
    assert "these have no images to fit probes on: 'b' (20), 'new' (20)" in one.reason


def test_what_a_few_images_agree_on_is_no_certainty() -> None:
    truth = np.repeat(["a", "b"], 3)
    before, after = np.array([False] * 3 + [True] * 3), np.ones(6, bool)
    verdict = judged(before, after, truth)
    assert verdict.word == "cannot tell"
    assert [verdict.low, verdict.high] == pytest.approx([0.0, 1.0])
    assert [judged(r := np.ones(2 * n, bool), r, np.repeat(["a", "b"], n)).word for n in (100, 160)] == [
        "cannot tell", "same",
    ]  # fmt: skip


def test_pairs_that_are_alike_are_seldom_called_better_or_worse() -> None:
    random, called = np.random.default_rng(5), 0
    truth = np.repeat(list("abcdefghij"), 3)
    for _ in range(200):
        changed = random.random(30) < 0.15
        before = random.random(30) < 0.5
        called += judged(before, before ^ changed, truth).word in ("better", "worse")
    assert called <= 20


def test_a_gain_on_the_common_class_does_not_hide_a_loss_on_the_rare_one() -> None:
    truth = np.repeat(["common", "rare"], [900, 100])
    before, after = np.ones(1000, bool), np.ones(1000, bool)
    before[:90] = False  # 10 % of the common class gained …
    after[900:940] = False  # … 40 % of the rare one lost
    verdict = judged(before, after, truth)
    assert verdict.difference == pytest.approx((0.1 - 0.4) / 2)
    assert verdict.word == "worse"
    assert after.mean() > before.mean()


def test_the_verdict_says_the_numbers_and_what_to_do() -> None:
    truth = np.repeat(["a", "b"], 200)
    before, after = np.zeros(400, bool), np.zeros(400, bool)
    before[::2], after[::2], after[1::8] = True, True, True
    verdict = judged(before, after, truth)
    assert str(verdict).startswith("better: +12.5 points (95 % interval +")
    assert "keep the adapted backbone" in str(verdict)
    assert "--which start" in judged(after, before, truth).reason


def test_a_comparison_prints_its_scores_as_a_table_and_the_verdict() -> None:
    before = Scores(linear=0.5, linear_balanced=0.25, knn=0.125, knn_balanced=0)
    after = Scores(linear=1, linear_balanced=0.75, knn=0.625, knn_balanced=0.0625)
    verdict = Verdict(word="better", reason="keep it")
    comparison = Comparison(before=before, after=after, verdict=verdict, n_train=80, n_held_out=20)
    assert str(comparison).splitlines() == [
        "                 before   after   (on 20 held-out images)",
        "linear probe      50.0%  100.0%",
        "k-NN              12.5%   62.5%",
        "linear, balanced  25.0%   75.0%",
        "k-NN, balanced     0.0%    6.2%",
        "better: keep it",
    ]
    assert str(no_labels(n_train=80, n_held_out=20)).startswith("cannot tell: without labels")


def test_what_a_manifest_says_is_printed_without_control_characters() -> None:
    scores = Scores(linear=0.5, linear_balanced=0.5, knn=0.5, knn_balanced=0.5)
    verdict = Verdict(word="same", reason="\x1b]0;title\x07\nbetter: all of it")
    comparison = Comparison(
        before=scores, after=scores, verdict=verdict, n_train=80, n_held_out=20, names=("a\nb", "c\x1b[2J")
    )
    shown = str(comparison).splitlines()
    assert shown[-1] == r"same: \x1b]0;title\x07\x0abetter: all of it"
    assert r"a\x0ab" in shown[0]
    assert r"c\x1b[2J" in shown[0]
    assert len(shown) == 6


def test_the_same_measurements_give_the_same_verdict() -> None:
    random = np.random.default_rng(2)
    truth = np.repeat(["a", "b"], 50)
    before, after = random.random((2, 100)) < 0.7
    assert judged(before, after, truth) == judged(before, after, truth)


def test_the_interval_holds_the_truth_about_19_times_in_20() -> None:
    random = np.random.default_rng(3)
    truth = np.repeat(["a", "b"], 100)
    held = []
    for _ in range(150):
        before, after = random.random(200) < 0.6, random.random(200) < 0.7
        verdict = judged(before, after, truth)
        assert verdict.low is not None
        assert verdict.high is not None
        held.append(verdict.low <= 0.1 <= verdict.high)
    assert 0.89 <= np.mean(held) <= 0.99


def test_pairing_makes_the_interval_narrow() -> None:
    random = np.random.default_rng(4)
    truth = np.repeat(["a", "b"], 150)
    before = random.random(300) < 0.6
    after = before | (random.random(300) < 0.1)
    paired, unpaired = judged(before, after, truth), judged(before, random.permutation(after), truth)
    assert (paired.high or 0) - (paired.low or 0) < 0.6 * ((unpaired.high or 0) - (unpaired.low or 0))


def test_without_labels_nobody_can_tell() -> None:
    comparison = no_labels(n_train=80, n_held_out=20)
    assert (comparison.before, comparison.after) == (None, None)
    assert comparison.verdict.word == "cannot tell"
    assert comparison.verdict.difference is None
    assert "class folders" in comparison.verdict.reason
    assert (comparison.n_train, comparison.n_held_out) == (80, 20)


def test_a_comparison_survives_json_and_is_frozen() -> None:
    before, truth = measured(noise=2.0, n_held_out=60)
    comparison = judge(before, before, truth, n_train=120)
    assert Comparison.model_validate_json(comparison.model_dump_json()) == comparison
    with pytest.raises(ValidationError):
        comparison.n_train = 3  # type: ignore[misc]


# Groups


def uneven_pair() -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.str_]]:
    """Right before, right after, and the shuffled classes of 64 images: four classes of 4 to 33."""
    random = np.random.default_rng(11)
    truth = random.permutation(np.repeat(["a", "b", "c", "d"], [33, 20, 7, 4]))
    before = random.random(64) < 0.6
    return before, before ^ (random.random(64) < 0.4), truth


def by_groups(
    before: NDArray[np.bool_], after: NDArray[np.bool_], truth: NDArray[np.str_], groups: NDArray[np.str_]
) -> Verdict:
    return judge(measurement(before), measurement(after), truth, n_train=10, groups=groups).verdict


def test_without_groups_the_interval_is_that_of_images_to_the_last_bit() -> None:
    verdict = judged(*uneven_pair())
    assert (verdict.difference, verdict.low, verdict.high) == (
        -0.16152597402597402,
        -0.38280538985672263,
        0.056937286320294156,
    )


def test_groups_of_one_image_each_change_nothing() -> None:
    before, after, truth = uneven_pair()
    names = np.random.default_rng(0).permutation(64).astype(str)
    grouped, plain = by_groups(before, after, truth, names), judged(before, after, truth)
    assert (grouped.difference, grouped.low, grouped.high) == (plain.difference, plain.low, plain.high)
    assert "interval over 64 groups" in grouped.reason


@pytest.mark.parametrize("classes_share_groups", [True, False])
def test_what_differs_from_slide_to_slide_is_not_called_better_or_worse(classes_share_groups: bool) -> None:
    """Adaptation moves each of 8 slides up or down, by chance, and none on the whole."""
    random = np.random.default_rng(6)
    slide = np.repeat(np.arange(8), 100)
    truth = np.array(["a", "b"])[random.integers(0, 2, 800) if classes_share_groups else slide % 2]
    by_image, by_slide = 0, 0
    for _ in range(40):
        effect = random.normal(0, 0.08, 8)[slide]
        before = random.random(800) < 0.5
        after = before ^ ((random.random(800) < 2 * np.abs(effect)) & (before == (effect < 0)))
        by_image += judged(before, after, truth).word in ("better", "worse")
        by_slide += by_groups(before, after, truth, slide.astype(str)).word in ("better", "worse")
    assert by_image >= 15
    assert by_slide <= 3


def test_resamples_drawn_a_few_at_a_time_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    gain, truth = random.normal(size=300), random.choice(["a", "b", "c"], 300)
    for group_of in (np.arange(300), np.arange(300) // 7):
        monkeypatch.setattr(_interval, "_DRAWN_AT_ONCE", 1 << 40)
        at_once = bootstrap(gain, truth, group_of)
        for few in (1, 1000, 9999):
            monkeypatch.setattr(_interval, "_DRAWN_AT_ONCE", few)
            assert bootstrap(gain, truth, group_of) == pytest.approx(at_once, abs=1e-12)


def test_the_interval_over_groups_is_as_wide_as_that_of_their_means() -> None:
    """200 groups of two classes with 5 images of each, all right or wrong alike: as 200 images of one class, by Student."""
    random = np.random.default_rng(8)
    before, after = random.random((2, 200)) < 0.6
    groups = np.repeat(np.arange(200), 10).astype(str)
    truth = np.tile(np.repeat(["a", "b"], 5), 200)
    grouped = by_groups(np.repeat(before, 10), np.repeat(after, 10), truth, groups)
    gain = after.astype(np.float64) - before
    difference, low, high = bootstrap(gain, np.repeat("a", 200), np.arange(200))
    assert grouped.difference == pytest.approx(difference)
    for over_groups, over_images in ((grouped.low, low), (grouped.high, high)):
        assert over_groups is not None
        expected = difference + (over_images - difference) * (1 + 1.21 / 199 + 1.44 / 199**2 + 1.30 / 199**3)
        assert over_groups == pytest.approx(expected, abs=1e-6)


def test_a_gain_that_every_one_of_eight_slides_shows_is_told() -> None:
    random = np.random.default_rng(3)
    slide = np.repeat(np.arange(8), 50)
    before = random.random(400) < 0.7
    after = before | (random.random(400) < 0.5)
    verdict = by_groups(before, after, np.array(["a", "b"])[slide % 2], slide.astype(str))
    assert verdict.word == "better"


@pytest.mark.parametrize("classes_share_groups", [True, False])
def test_a_few_groups_that_do_not_change_are_not_called_the_same(classes_share_groups: bool) -> None:
    def verdict(sizes: list[int]) -> Verdict:
        slide = np.repeat(np.arange(len(sizes)), sizes)
        truth = np.array(["a", "b"])[(np.arange(len(slide)) if classes_share_groups else slide) % 2]
        right = np.ones(len(slide), bool)
        return by_groups(right, right, truth, slide.astype(str))

    assert verdict([100] * 6).reason == (
        "+0.0 points (95 % interval over 6 groups -0.5 to +0.5); 6 groups are too few to call it the same, because they "
        "may not include any of the groups that it harms: label images of more groups, until about 90 are held out"
    )
    assert [verdict([20] * n).word for n in (6, 80, 90)] == ["cannot tell", "cannot tell", "same"]
    giants = verdict([*[200] * 2, *[20] * 98])
    assert giants.word == "cannot tell"
    assert "100 groups are too few" in giants.reason


@pytest.mark.parametrize("n_groups", [6, 8, 30])
def test_harm_to_one_group_in_ten_is_not_called_the_same(n_groups: int) -> None:
    random = np.random.default_rng(4)
    slide = np.repeat(np.arange(n_groups), 100)
    truth = np.array(["a", "b"])[slide % 2]
    for _ in range(30):
        before = random.random(len(slide)) < 0.7
        harmed = (random.random(n_groups) < 0.1)[slide]
        after = before & ~(harmed & (random.random(len(slide)) < 0.3 / 0.7))
        assert by_groups(before, after, truth, slide.astype(str)).word != "same"


def test_enough_groups_of_which_some_gain_and_as_many_lose_a_little_are_the_same() -> None:
    slide = np.repeat(np.arange(300), 20)
    first = np.arange(6000) % 20 == 0
    before = ~first | (slide % 10 == 5)
    after = ~first | (slide % 10 == 0)
    assert by_groups(before, after, np.array(["a", "b"])[slide // 10 % 2], slide.astype(str)).word == "same"


def test_one_giant_slide_makes_the_interval_wide() -> None:
    right, truth = np.ones(400, bool), np.tile(["a", "b"], 200)
    sizes = {"even": [20] * 20, "giant": [210, *[10] * 19]}
    width = {}
    for name, each in sizes.items():
        slide = np.repeat(np.arange(20), each)
        verdict = by_groups(right, slide % 2 == 0, truth, slide.astype(str))
        width[name] = (verdict.high or 0) - (verdict.low or 0)
    assert width["giant"] > 1.2 * width["even"]


def test_a_class_of_many_images_of_two_groups_is_left_out_and_named() -> None:
    truth = np.repeat(["a", "b", "c"], 100)
    groups = np.concatenate([np.arange(200) // 5, 100 + np.arange(100) // 50]).astype(str)
    right = np.ones(300, bool)
    verdict = by_groups(right, right, truth, groups)
    assert "classes with fewer than 3 held-out groups are left out: 'c' (2)" in verdict.reason
    assert "label images of more groups" in verdict.reason


# Few images to fit on


def noisy_twice(
    random: np.random.Generator, n: int, n_held_out: int, *, noise: tuple[float, float] = (2.5, 2.5), size: int = 1
) -> tuple[Comparison, Comparison]:
    """The verdict on two noisy versions of the same vectors, and the verdict over the held-out images alone.

    size  images per group; with several, each group is shifted at random
    """
    groups = [np.repeat(np.arange(count // size), size) for count in (n, n_held_out)]
    truth = [np.array(["ant", "bee"])[group % 2] for group in groups]
    centres = 0.6 * np.array([np.ones(16), -np.ones(16)])
    versions = []
    for spread in noise:
        fit, held_out = (
            (centres[group % 2] + spread * random.standard_normal((len(group), 16))
             + (size > 1) * random.standard_normal((len(group) // size, 16))[group]).astype(np.float32)
            for group in groups
        )  # fmt: skip
        versions.append(measure(fit, truth[0], held_out, truth[1], train_groups=groups[0], held_out_groups=groups[1]))
    before, after = versions
    assert before.refits is not None
    assert after.refits is not None
    alone = before._replace(refits=None), after._replace(refits=None)
    return (
        judge(before, after, truth[1], n_train=n, groups=groups[1]),
        judge(*alone, truth[1], n_train=n, groups=groups[1]),
    )


def called(comparisons: list[Comparison]) -> int:
    return sum(comparison.verdict.word in ("better", "worse") for comparison in comparisons)


@pytest.mark.slow
def test_what_another_draw_of_few_images_to_fit_on_would_turn_round_is_seldom_called() -> None:
    random = np.random.default_rng(0)
    told, alone = zip(*(noisy_twice(random, 40, 800) for _ in range(30)), strict=True)
    assert called(list(alone)) >= 10, "the held-out images alone call chance a difference"
    assert called(list(told)) <= 3
    told, _ = zip(*(noisy_twice(random, 80, 800, size=10) for _ in range(20)), strict=True)
    assert called(list(told)) <= 2


def test_a_gain_that_few_images_to_fit_on_show_is_still_told() -> None:
    random = np.random.default_rng(0)
    told = [noisy_twice(random, 40, 800, noise=(2.5, 1.0))[0] for _ in range(10)]
    assert [comparison.verdict.word for comparison in told].count("better") >= 8


def test_with_no_fewer_images_to_fit_on_nothing_is_fitted_again() -> None:
    vectors, labels = made_vectors(60, 0.5)
    assert measure(vectors, labels, vectors, labels).refits is None
    groups = np.arange(60) % 20  # of 60 images to fit on there are 20 groups, of 30 to judge by 30
    assert measure(vectors, labels, vectors[:30], labels[:30], train_groups=groups).refits is not None


def test_a_class_of_one_image_to_fit_on_costs_no_verdict() -> None:
    vectors, labels = made_vectors(12, 0.1, classes=2)
    one_bee = np.concatenate([np.flatnonzero(labels == "ant"), np.flatnonzero(labels == "bee")[:1]])
    held_out, truth = made_vectors(60, 0.1, classes=2, seed=1)
    result = measure(vectors[one_bee], labels[one_bee], held_out, truth)
    assert result.refits is not None
    assert len(result.refits.right) == 6, "without the part of the one bee there would be one class"
    assert judge(result, result, truth, n_train=7).verdict.difference == 0


def few_of_many(random: np.random.Generator, classes: int, each: int) -> str:
    """The verdict on two noisy versions of the same vectors, with few images per class to fit on, 60 to judge by."""
    centres = 0.6 * random.standard_normal((classes, 16))
    of_fit, of_held_out = (np.repeat(np.arange(classes), count) for count in (each, 60))
    before, after = (
        measure(
            (centres[of_fit] + random.standard_normal((len(of_fit), 16))).astype(np.float32), of_fit.astype(str),
            (centres[of_held_out] + random.standard_normal((len(of_held_out), 16))).astype(np.float32), of_held_out.astype(str),
        )
        for _ in range(2)
    )  # fmt: skip
    return judge(before, after, of_held_out.astype(str), n_train=len(of_fit)).verdict.word


def test_one_image_of_each_class_to_fit_on_seldom_calls_chance_a_difference() -> None:
    random = np.random.default_rng(0)
    words = [few_of_many(random, 5, 1) for _ in range(30)]
    assert words.count("better") + words.count("worse") <= 4, "13 by the held-out images alone"


def test_two_images_to_fit_on_tell_nothing() -> None:
    assert {few_of_many(np.random.default_rng(seed), 2, 1) for seed in range(3)} == {"cannot tell"}


def test_groups_that_are_not_one_a_held_out_image_are_refused() -> None:
    right, truth = np.ones(6, bool), np.repeat(["a", "b"], 3)
    with pytest.raises(DataError, match=r"6 images, but groups of shape \[5\]"):
        by_groups(right, right, truth, np.arange(5).astype(str))


# Rare classes


def test_a_rare_class_is_left_out_of_scores_and_verdict_and_named() -> None:
    train, train_labels = made_vectors(120, 0.3, seed=1)
    held_out, truth = made_vectors(120, 0.3, seed=2)
    kept = np.flatnonzero(truth != "cat")
    few = np.concatenate([kept, np.flatnonzero(truth == "cat")[:2]])
    noise = np.random.default_rng(0).standard_normal(held_out.shape, np.float32)
    noisy = measure(train, train_labels, held_out[few] + 3 * noise[few], truth[few])
    clear = measure(train, train_labels, held_out[few], truth[few])
    comparison = judge(noisy, clear, truth[few], n_train=120)
    alone = judge(
        measure(train, train_labels, held_out[kept] + 3 * noise[kept], truth[kept]),
        measure(train, train_labels, held_out[kept], truth[kept]),
        truth[kept], n_train=120,
    )  # fmt: skip
    assert comparison.verdict.word == "better"
    assert comparison.verdict.reason == (
        f"{alone.verdict.reason}; classes with fewer than 3 held-out images are left out: 'cat' (2)"
    )
    assert comparison.model_copy(update={"verdict": alone.verdict}) == alone
    assert comparison.n_held_out == 80


def test_where_no_two_classes_can_be_judged_the_rare_ones_are_named() -> None:
    truth = np.repeat(["a", "b", "c", "d", "e"], [50, 2, 1, 1, 2])
    right = np.ones(56, bool)
    comparison = judge(measurement(right), measurement(right), truth, n_train=10)
    assert comparison.verdict.word == "cannot tell"
    assert comparison.verdict.low is None
    assert comparison.n_held_out == 56
    assert comparison.verdict.reason == (
        "a verdict needs at least two classes with 3 held-out images each, but these have fewer: 'b' (2), 'c' (1), 'd' (1) and "
        "1 more: label more images"
    )


# What `jepakit adapt` says to do next


@pytest.mark.parametrize(
    ("after", "told"),
    [
        (
            None,
            [
                "export runs/a --which start --out bundles/a-start",
                "export runs/a --out bundles/a",
                "compare bundles/a-start bundles/a --images LABELLED",
            ],
        ),
        (1.0, ["export runs/a --out bundles/a"]),
        (0.2, ["export runs/a --which start --out bundles/a"]),
    ],
)
def test_where_nobody_can_tell_both_are_to_be_exported(
    monkeypatch: pytest.MonkeyPatch, after: float | None, told: list[str]
) -> None:
    truth, random = np.tile(["a", "b"], 200), np.random.default_rng(0)
    found = no_labels(8, 2)
    if after is not None:
        before, adapted = (measurement(random.random(400) < share) for share in (0.6, after))
        found = judge(before, adapted, truth, n_train=8)
    picture = Path("runs/a/neighbours.png")
    run = SimpleNamespace(
        path=Path("runs/a"), neighbours=picture, comparison=found, verdict=found.verdict, config={"tile": 48}
    )
    monkeypatch.setattr(_frontdoor, "adapt", lambda *_, **__: run)
    shown = CliRunner().invoke(app, ["adapt", "scans"]).stdout.splitlines()
    assert not any("to see for yourself" in line for line in shown), "no picture is named that is not there"
    assert [line for line in shown if line.startswith("next")] == [f"next: jepakit {words}" for words in told]
    assert ("what `jepakit embed --tile 48` writes" in shown[-1]) == (after is None)


def test_single_images_that_tip_over_are_not_counted_twice() -> None:
    random, truth = np.random.default_rng(0), np.repeat(["ant", "bee"], 1000)
    changes = (random.integers(-1, 2, (10, 2000)).astype(float) for _ in range(20))
    # Without what single images add it is 3e-3.
    assert abs(np.mean([variance_of_fits(each, truth, np.arange(2000)) for each in changes])) < 1e-3


def test_an_image_that_moves_the_difference_in_both_ways_counts_in_both() -> None:
    random, truth, left_out = np.random.default_rng(0), np.repeat(["ant", "bee"], 5), np.eye(10, dtype=bool)
    gain = random.standard_normal(10)
    of_class = [np.mean([gain[stay & (truth == name)].mean() for name in ("ant", "bee")]) for stay in ~left_out]
    gains = np.repeat(0.5 * np.array(of_class)[:, None], 10, axis=1)  # fitting on an image does half of what it shows
    assert covariance(gain, gains, left_out, truth) == pytest.approx(
        0.5 * 0.9 * np.square(of_class - np.mean(of_class)).sum()
    )
    assert covariance(gain, gains, np.zeros((10, 10), bool), truth) == 0, "unless other images are judged"


def test_a_class_that_lies_wholly_in_one_part_does_not_change_what_is_meant_by_the_mean() -> None:
    truth = np.array(["ant"] * 8 + ["bee"] * 2)
    gain = np.where(truth == "bee", 1.0, 0.0)
    left_out = np.repeat(np.eye(5, dtype=bool), 2, axis=1)  # the last part holds all bees
    gains = np.repeat(np.linspace(0, 1, 5)[:, None], 10, axis=1)
    assert covariance(gain, gains, left_out, truth) == 0


def test_images_that_are_judged_and_fitted_on_make_the_interval_wider() -> None:
    random, scene, truth = np.random.default_rng(0), np.repeat(np.arange(12), 8), np.tile(["ant", "bee"], 48)
    widths = []
    for _ in range(4):
        versions = []
        for clearness in random.normal(1, 0.5, (2, 12)):  # by chance, each scene is clearer for one of the two
            vectors = random.standard_normal((96, 4)).astype(np.float32)
            vectors[:, 0] += np.where(truth == "ant", 1, -1) * clearness[scene]
            versions.append(cross_measure(vectors, truth, groups=scene))
        before, after = versions
        assert after.refits is not None
        assert (after.refits.left_out.sum(axis=0) == 1).all(), "each image is left out once"
        of_others = after._replace(refits=after.refits._replace(left_out=np.zeros((10, 96), bool)))
        for measured in (after, of_others):
            verdict = judge(before, measured, truth, n_train=96, groups=scene).verdict
            assert verdict.low is not None
            assert verdict.high is not None
            widths.append(verdict.high - verdict.low)
    assert sum(widths[::2]) > 1.1 * sum(widths[1::2])


def test_each_part_that_is_left_out_has_its_share_of_every_class() -> None:
    labels = np.repeat(["ant", "bee"], [200, 10])
    assert [int((labels[~kept] == "bee").sum()) for kept in _leaving_out(labels, np.arange(210))] == [1] * 10


def test_groups_of_classes_that_are_left_out_raise_no_number_of_groups() -> None:
    truth, groups = np.repeat(["ant", "bee"], 50), np.arange(100)
    assert _groups_to_call_it_the_same(truth, groups) == _groups_to_call_it_the_same(truth, 3 * groups) == 90


def verdict(low: float, high: float, word: str) -> Verdict:
    return Verdict.model_validate(
        {"word": word, "reason": "its own", "difference": (low + high) / 2, "low": low, "high": high}
    )


def test_the_best_of_one_has_its_own_verdict() -> None:
    only = verdict(0.01, 0.05, "better")
    assert judge_best("lamb=0.1", [only]) is only


@pytest.mark.parametrize(
    ("low", "high", "own", "word"),
    [
        (0.02, 0.06, "better", "better"),
        (0.004, 0.05, "better", "cannot tell"),
        (-0.007, 0.007, "same", "same"),
        (-0.009, 0.009, "same", "cannot tell"),
        (-0.0095, 0.005, "same", "cannot tell"),
        (-0.005, 0.0095, "same", "cannot tell"),
        (-0.007, 0.007, "cannot tell", "cannot tell"),  # of too few groups
        (-0.06, -0.02, "worse", "worse"),
    ],
)
def test_the_best_of_several_needs_more_than_one_alone(low: float, high: float, own: str, word: str) -> None:
    best = verdict(low, high, own)
    found = judge_best("lamb=0.1", [best, *3 * [verdict(-0.2, -0.1, "worse")]])
    assert found.word == word
    assert found.difference == best.difference
    assert found.low is not None
    assert found.high is not None
    # 2.5 % over four is 0.625 % a side: the normal quantile 2.4977 in the place of 1.96.
    assert (found.high - found.low) / (high - low) == pytest.approx(2.4977 / 1.96, rel=1e-4)
    assert "lamb=0.1, the best of 4" in found.reason


def test_the_best_of_six_that_change_nothing_is_seldom_called_better() -> None:
    random, truth = np.random.default_rng(0), np.array(["ant", "bee"])[np.arange(200) % 2]
    hard = random.beta(4, 1, 200)

    def right() -> NDArray[np.bool_]:
        return random.random(200) < hard

    called = {"alone": 0, "as the best": 0}
    for _ in range(40):
        before = right()
        verdicts = sorted((judged(before, right(), truth) for _ in range(6)), key=lambda each: -(each.difference or 0))
        called["alone"] += verdicts[0].word == "better"
        called["as the best"] += judge_best("it", verdicts).word == "better"
    assert called["as the best"] <= 2 < called["alone"]


def test_where_nothing_can_be_told_the_best_of_several_cannot_be_told_either() -> None:
    unknown = no_labels(10, 5).verdict
    assert judge_best("it", [unknown, unknown]) is unknown


def shifted(seed: int, labels: NDArray[np.str_], shift: float, dim: int = 8) -> NDArray[np.float32]:
    """Noise [N, dim], in which the rare class "defect" is shifted along the first axis."""
    vectors = np.random.default_rng(seed).normal(size=(len(labels), dim))
    vectors[:, 0] += shift * (labels == "defect")
    return vectors.astype(np.float32)


@pytest.mark.parametrize(("shifts", "word"), [((1.6, 0.4), "worse"), ((0.4, 1.6), "better")])
def test_what_happens_to_a_rare_class_is_seen(shifts: tuple[float, float], word: str) -> None:
    """Probes that never predict it are right about half of the classes, before and after."""
    labels = np.array(["ok"] * 950 + ["defect"] * 50)
    before, after = (
        measure(shifted(seed, labels, shift), labels, shifted(seed + 9, labels, shift), labels)
        for seed, shift in enumerate(shifts)
    )
    assert judge(before, after, labels, n_train=len(labels)).verdict.word == word


def width(verdict: Verdict) -> float:
    assert verdict.low is not None
    assert verdict.high is not None
    return verdict.high - verdict.low


def test_a_class_with_few_images_to_fit_on_widens_the_interval() -> None:
    """A long-tailed part to fit on and an even part to judge by, as public data sets often are."""
    fit = np.array(["ok"] * 300 + ["defect"] * 8)
    held_out = np.array(["ok"] * 100 + ["defect"] * 100)
    one, other = (measure(shifted(seed, fit, 2.0), fit, shifted(seed + 9, held_out, 2.0), held_out) for seed in (0, 1))
    assert one.refits is not None
    assert other.refits is not None
    told = judge(one, other, held_out, n_train=len(fit), train_labels=fit).verdict
    alone = judge(
        one._replace(refits=None), other._replace(refits=None), held_out, n_train=len(fit), train_labels=fit
    ).verdict
    assert width(told) > 1.3 * width(alone)
    own_split = np.array(["ok"] * 25 + ["defect"] * 4)
    assert measure(shifted(0, fit, 2.0), fit, shifted(1, own_split, 2.0), own_split).refits is None


def test_probes_that_move_apart_are_told_and_decide_nothing() -> None:
    """One in six of the linear probe's answers is lost; the k-NN gains more than that."""
    truth = np.array(["a", "b"] * 300)
    was, now = np.ones((2, 600), bool), np.ones((2, 600), bool)
    now[0, ::6], was[1, ::2] = False, False
    for before, after, signs in ((was, now, ("-16.7", "+50.0")), (now, was, ("+16.7", "-50.0"))):
        start, result = (evaluate._measurement(right, truth, None) for right in (before, after))
        told = judge(start, result, truth, n_train=600).verdict
        assert told.word == "cannot tell"
        assert re.search(
            rf"but the linear probe changes by \{signs[0]} \(.* to .*\) and k-NN by \{signs[1]} \(.*\): keep the one that does better with the probe",
            told.reason,
        )


def test_the_best_of_several_whose_probes_disagree_is_not_called_better() -> None:
    own = Verdict(word="cannot tell", reason="", difference=0.2, low=0.15, high=0.25)
    found = judge_best("one", [own, own])
    assert (found.word, "its linear probe and its k-NN disagree" in found.reason) == ("cannot tell", True)


def test_the_best_of_several_by_few_groups_allows_for_how_few_they_are() -> None:
    """As Student's t: 4.98 standard errors over 2.57 with six groups, 2.87 over 1.96 with very many."""
    own = Verdict(word="better", reason="", difference=0.2, low=0.1, high=0.3)
    widths = []
    for n_groups in (None, 10_000, 6):
        found = judge_best("one", [own.model_copy(update={"n_groups": n_groups}), *[own] * 11])
        assert found.low is not None
        assert found.n_groups == n_groups
        widths.append((0.2 - found.low) / 0.1)
    np.testing.assert_allclose(widths, [2.87 / 1.96, 2.87 / 1.96, 4.98 / 2.57], rtol=0.03)


# What each number is made of


def test_each_probe_has_its_own_scores() -> None:
    truth = np.array(["a", "a", "a", "b"])
    scores = evaluate._measurement(np.array([[1, 1, 1, 0], [0, 0, 1, 1]], bool), truth, None).scores
    assert (scores.linear, scores.linear_balanced) == (3 / 4, 1 / 2)
    assert (scores.knn, scores.knn_balanced) == pytest.approx((2 / 4, 2 / 3))


def test_no_end_of_an_interval_is_beyond_all_or_nothing() -> None:
    truth, each = np.repeat(["a", "b"], 3), np.arange(6)
    assert bootstrap(np.ones(6), truth, each) == (1, 0.5, 1)
    assert bootstrap(-np.ones(6), truth, each) == (-1, -1, -0.5)
    assert _interval.scaled((0.5, 0.0, 1.0), 4) == (0.5, -1, 1)


@pytest.mark.parametrize(("low", "high"), [(-0.05, 0.005), (-0.005, 0.05)])
def test_an_interval_that_reaches_far_to_one_side_is_not_small(low: float, high: float) -> None:
    each = ((low + high) / 2, low, high)
    assert evaluate._Result(*each, n_groups=1000, n_needed=90, of_each=(each, each)).word == "cannot tell"


def test_probes_of_which_one_loses_what_the_other_gains_are_not_the_same() -> None:
    truth = np.array(["a", "b"] * 300)
    was, now = np.ones((2, 600), bool), np.ones((2, 600), bool)
    now[0, ::6], was[1, ::6] = False, False
    start, result = (evaluate._measurement(right, truth, None) for right in (was, now))
    told = judge(start, result, truth, n_train=600).verdict
    assert (told.word, told.difference) == ("cannot tell", 0)


def test_a_verdict_tells_the_groups_of_the_class_that_has_the_fewest() -> None:
    truth, groups = np.repeat(["a", "b"], [40, 16]), np.arange(56) // 4
    assert by_groups(np.ones(56, bool), np.ones(56, bool), truth, groups.astype(str)).n_groups == 4


def refitted(right: NDArray[np.bool_]) -> Measurement:
    """bool [parts, 2, 200]: right on nothing, and so refitted without each part; other images are fitted on."""
    refits = evaluate.Refits(right, np.zeros((len(right), right.shape[2]), bool))
    return Measurement(NO_SCORES, np.zeros(right.shape[1:], bool), refits)


def test_the_fits_of_a_probe_widen_its_own_interval_by_students_t_and_never_narrow_it() -> None:
    truth, each, none = np.repeat(["a", "b"], 100), np.arange(200), np.zeros((10, 2, 200), bool)
    some = none.copy()
    some[:5, 1, ::4] = True  # with five of ten parts left out, the k-NN is right about a quarter of the images
    linear, knn = (evaluate._interval(refitted(none), refitted(some), truth, each, [probe]) for probe in (0, 1))
    alone = bootstrap(np.zeros(200), truth, each)
    assert linear == alone
    added = 2.262**2 * variance_of_fits(some[:, 1].astype(float), truth, each)
    assert (knn[2] - knn[1]) ** 2 == pytest.approx((alone[2] - alone[1]) ** 2 + 4 * added, rel=0.01)

    before, after = none.copy(), none.copy()
    for part in range(10):  # in each, one image is lost and another gained: no part differs from the others
        before[part, :, part], after[part, :, 50 + part] = True, True
    assert variance_of_fits(after[:, 1].astype(float) - before[:, 1], truth, each) < 0
    assert evaluate._interval(refitted(before), refitted(after), truth, each, [0, 1]) == alone


@pytest.mark.parametrize(
    ("fitted_on", "held_out", "again"), [(8, 10, False), (8, 11, True), (1, 2, False), (2, 3, True)]
)
def test_a_quarter_more_of_a_class_held_out_than_fitted_on_makes_the_fits_count(
    fitted_on: int, held_out: int, again: bool
) -> None:
    fit, truth = (np.array(["ok"] * 40 + ["defect"] * count) for count in (fitted_on, held_out))
    truth = truth[10:]
    assert (measure(shifted(0, fit, 2.0), fit, shifted(1, truth, 2.0), truth).refits is not None) == again


def test_c_is_chosen_by_groups_and_once_for_all_parts_that_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    fits: list[tuple[float | None, float]] = []
    fitted = evaluate._fitted

    def noting(*given: Any) -> Any:
        probes = fitted(*given)
        fits.append((given[3] if len(given) > 3 else None, probes[0].C_))
        return probes

    monkeypatch.setattr(evaluate, "_fitted", noting)
    random, pairs = np.random.default_rng(0), np.repeat(np.arange(30), 2)
    vectors, labels = random.standard_normal((30, 64)).astype(np.float32)[pairs], np.array(["a", "b"])[pairs % 2]
    by_pair, by_image = (
        LinearProbe(class_weight="balanced").fit(vectors, labels, groups=groups).C_ for groups in (pairs, None)
    )
    assert by_pair != by_image, "or nothing is tested"
    measure(vectors, labels, np.tile(vectors, (2, 1)), np.tile(labels, 2), train_groups=pairs)
    assert fits == [(None, by_pair), *[(by_pair, by_pair)] * 10]
    fits.clear()
    cross_measure(vectors, labels, groups=pairs)
    assert [place for place, (given, _) in enumerate(fits) if given is None] == [0, 11, 22, 33, 44]
    assert all(
        given in (None, chosen) and chosen == fits[place // 11 * 11][1] for place, (given, chosen) in enumerate(fits)
    )


def test_the_only_class_that_is_left_to_fit_on_is_predicted() -> None:
    truth, judged = np.array(["a", "a", "b", "a"]), np.array([False, True, True, False])
    right, _ = evaluate._right_of_refit(np.eye(4, dtype=np.float32), truth, ~judged, judged, np.arange(4), None)
    assert right.tolist() == [[True, False]] * 2


def test_a_class_in_few_of_the_groups_has_the_students_t_of_these_few_and_none_of_their_absence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Forty groups of five images of "a"; three of them hold five of "b" too, and one resample in twenty none of the three."""
    groups, truth = np.repeat([*range(40), 0, 1, 2], 5), np.repeat(["a", "b"], [200, 15])
    shifted, alike = (np.where(truth == "b", gain, 0.0) for gain in (0.3 * np.sign(groups - 1.0), 1.0))
    least = 3 * (1 / 200 + 1 / 15) / 4
    assert bootstrap(alike, truth, groups) == pytest.approx((0.5, 0.5 - least, 0.5 + least))
    _, low, high = bootstrap(shifted, truth, groups)
    monkeypatch.setattr(_interval, "student", np.ones_like)
    _, plain_low, plain_high = bootstrap(shifted, truth, groups)
    assert (high - low) / (plain_high - plain_low) == pytest.approx(4.303 / 1.96, rel=0.05)
