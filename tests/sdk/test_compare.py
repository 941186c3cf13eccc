"""Choosing which of two models' embeddings of the same images to keep."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

import jepakit
from jepakit import Embeddings
from jepakit._groups import assign_folds
from jepakit.cli import app
from jepakit.errors import ConfigError, DataError
from jepakit.evaluation.evaluate import cross_measure

NAMES = np.array(["ant", "bee", "cat"])


def embeddings(noise: float, n: int = 90, *, seed: int = 0, groups: NDArray[np.intp] | None = None) -> Embeddings:
    """Class centres that are the same for every seed, with noise around them, and with a shift per group, if any."""
    of_class = (np.arange(n) if groups is None else groups) % 3
    random = np.random.default_rng(seed)
    vectors = 0.6 * np.random.default_rng(99).standard_normal((3, 16))[of_class] + noise * random.standard_normal(
        (n, 16)
    )
    if groups is not None:
        vectors += random.standard_normal((groups.max() + 1, 16))[groups]
    ids = tuple(f"{place}.png" for place in range(n))
    return Embeddings(vectors.astype(np.float32), f"{seed:016x}", ids, tuple(NAMES[of_class].tolist()))


def test_the_better_of_two_models_is_kept_whichever_comes_first() -> None:
    noisy, clear = embeddings(2.0), embeddings(0.3, seed=1)
    up, down = jepakit.compare(noisy, clear), jepakit.compare(clear, noisy)
    assert (up.verdict.word, down.verdict.word) == ("better", "worse")
    assert up.verdict.reason.endswith("; keep the second")
    assert down.verdict.reason.endswith("; keep the first")
    assert up.verdict.difference == pytest.approx(-(down.verdict.difference or 0))
    assert (up.n_train, up.n_held_out) == (90, 90)
    assert up.before == down.after


def test_images_are_told_by_their_names_not_by_their_order() -> None:
    one, other = embeddings(2.0, 36), embeddings(1.0, 36, seed=1)
    order = np.random.default_rng(0).permutation(len(other))
    assert jepakit.compare(one, other[order]) == jepakit.compare(one[order], other) == jepakit.compare(one, other)
    scenes = np.array([f"scene {place // 2}" for place in range(len(one))])
    assert jepakit.compare(one[order], other, groups=scenes[order]) == jepakit.compare(one, other, groups=scenes)


def test_no_image_is_judged_by_probes_that_it_was_fitted_on() -> None:
    noise = np.random.default_rng(0).standard_normal((60, 64)).astype(np.float32)
    labels = NAMES[np.random.default_rng(1).permutation(60) % 2]
    scores = cross_measure(noise, labels).scores
    assert max(scores.linear, scores.knn) < 0.7, "in so many dimensions those fitted on would all be right"
    pairs = np.arange(60) // 2
    twins, of_pair = noise[pairs], labels[pairs]
    assert cross_measure(twins, of_pair).scores.linear > 0.8, "the twin was fitted on"
    assert cross_measure(twins, of_pair, groups=pairs).scores.linear < 0.7


@pytest.mark.slow
def test_chance_is_seldom_called_a_difference() -> None:
    words = [
        jepakit.compare(embeddings(1.5, seed=2 * seed), embeddings(1.5, seed=2 * seed + 1)).verdict.word
        for seed in range(20)
    ]
    assert words.count("better") + words.count("worse") <= 3


def test_groups_are_counted_as_wholes() -> None:
    groups = np.arange(120) // 10
    before, after = embeddings(2.0, 120, groups=groups), embeddings(1.0, 120, seed=1, groups=groups)
    alone, together = jepakit.compare(before, after), jepakit.compare(before, after, groups=groups)
    assert "interval over 12 groups" in together.verdict.reason
    assert together.after != alone.after
    assert width(together) > width(alone)


def test_the_tiles_of_an_image_are_one_group_by_themselves() -> None:
    groups = np.arange(120) // 10
    before, after = embeddings(2.0, 120, groups=groups), embeddings(1.0, 120, seed=1, groups=groups)
    ids = tuple(f"{group}.tif#{64 * (place % 10)},0,64,64" for place, group in enumerate(groups))
    tiles = [Embeddings(each.vectors, each.model_id, ids, each.labels) for each in (before, after)]
    assert jepakit.compare(*tiles) == jepakit.compare(before, after, groups=groups)


def width(comparison: jepakit.Comparison) -> float:
    assert comparison.verdict.low is not None
    assert comparison.verdict.high is not None
    return comparison.verdict.high - comparison.verdict.low


def test_copies_of_an_image_are_one_group_with_it() -> None:
    noise = np.random.default_rng(0).standard_normal((60, 64)).astype(np.float32)
    labels = tuple(NAMES[np.random.default_rng(1).permutation(60) % 2].tolist())
    ids = tuple(f"{place:03d}.png" for place in range(120))
    one, other = (Embeddings(np.tile(noise * sign, (2, 1)), f"{7:016x}", ids, labels * 2) for sign in (1, -1))
    found = jepakit.compare(one, other)
    assert found.before is not None
    assert max(found.before.linear, found.before.knn) < 0.7, "the copy was fitted on"
    assert found.verdict.reason.startswith("copies of an image count as one with it (60 images); ")
    assert found == jepakit.compare(one, other, groups=[str(place) for place in range(120)])
    scenes = [str(place % 60 // 2) for place in range(120)]
    assert (
        jepakit.compare(one, other, groups=scenes).before
        == cross_measure(one.vectors, labels * 2, groups=scenes).scores
    )


@pytest.mark.parametrize("labels", [["ant"] * 8 + ["bee"] * 2, ["ant"] * 10, ["ant"]])
def test_two_classes_of_few_images_tell_nothing(labels: list[str]) -> None:
    vectors = np.random.default_rng(0).standard_normal((len(labels), 4)).astype(np.float32)
    few = Embeddings(vectors, "a", tuple(map(str, range(len(labels)))), tuple(labels))
    assert jepakit.compare(few, few).verdict.word == "cannot tell"


def bees_in_one_fold() -> list[str]:
    """The labels of three images in each of 20 groups: the only bees lie in groups that are held out together."""
    groups = np.repeat(np.arange(20), 3)
    fold = assign_folds(groups, np.zeros(60, np.intp), 5, np.random.default_rng(0))
    return ["bee" if is_bee else "ant" for is_bee in (fold == 0) & (np.arange(60) % 3 == 0)]


@pytest.mark.parametrize(
    ("labels", "groups", "reason"),
    [
        (["ant", "bee"] * 20, ["scene"] * 40, "label images of more groups"),
        (["ant"] * 40, ["scene"] * 40, "only class 'ant' is held out"),
        (bees_in_one_fold(), [f"{place // 3:02d}" for place in range(60)], "a single class is left to fit on"),
    ],
)
def test_where_no_probe_can_be_fitted_there_are_no_scores(labels: list[str], groups: list[str], reason: str) -> None:
    """All images lie in one group, or are of one class, or a class lies in one fold."""
    vectors = np.random.default_rng(0).standard_normal((len(labels), 4)).astype(np.float32)
    one = Embeddings(vectors, "a", tuple(f"{place:03d}" for place in range(len(labels))), tuple(labels))
    judged = jepakit.compare(one, one, groups=groups)
    assert (judged.before, judged.after, judged.verdict.word) == (None, None, "cannot tell")
    assert (judged.verdict.difference, judged.verdict.low) == (None, None)
    assert reason in judged.verdict.reason
    assert str(judged) == str(judged.verdict)


def test_few_groups_that_mix_the_classes_are_measured() -> None:
    """Three plates of three classes each, on each of which another one is the commonest."""
    plates = np.repeat(["p", "q", "r"], 40)
    targets = np.concatenate([np.repeat(np.roll([0, 1, 2], plate), [16, 12, 12]) for plate in range(3)])
    noise = np.random.default_rng(0).standard_normal((120, 20)).astype(np.float32)
    ids, labels = tuple(f"{place:03d}" for place in range(120)), tuple("abc"[target] for target in targets)
    good = Embeddings((noise + 3 * np.eye(20)[targets]).astype(np.float32), "g" * 16, ids, labels)
    judged = jepakit.compare(good, Embeddings(noise, "n" * 16, ids, labels), groups=plates)
    assert judged.before is not None
    assert judged.after is not None
    assert judged.before.linear > 0.9
    assert judged.after.linear < 0.6
    assert judged.verdict.difference is not None
    assert judged.verdict.difference < -0.3


def test_a_class_that_no_fold_but_its_own_has_costs_no_verdict() -> None:
    groups = np.array(
        [*np.arange(60) // 2, 0, 5, 10]
    )  # three images of a third class, in groups that are held out together
    few = embeddings(0.5, 63)
    labels = (*(NAMES[groups[:60] % 2].tolist()), "cat", "cat", "cat")
    both = Embeddings(few.vectors, few.model_id, few.ids, labels)
    assert jepakit.compare(both, both, groups=groups).verdict.difference == 0


def test_only_the_same_labelled_images_can_be_compared() -> None:
    known = embeddings(1.0)
    with pytest.raises(DataError, match=r"not embeddings of the same images: 88.png, 89.png are in only one of them"):
        jepakit.compare(known, known[:88])
    with pytest.raises(DataError, match=r"91 and 90 embeddings are of 90 images, some of them twice"):
        jepakit.compare(known[[*range(90), 0]], known)
    with pytest.raises(DataError, match=r"90 and 91 embeddings are of 90 images, some of them twice"):
        jepakit.compare(known, known[[*range(90), 0]])
    with pytest.raises(DataError, match=r"not embeddings of the same images: 88.png, 89.png are in only one of them"):
        jepakit.compare(known[:88], known)
    twice = known[[*range(90), 0]]
    with pytest.raises(DataError, match=r"91 and 91 embeddings are of 90 images, some of them twice"):
        jepakit.compare(twice, twice)
    with pytest.raises(DataError, match="no embeddings to compare"):
        jepakit.compare(known[:0], known)
    nameless = Embeddings(known.vectors, known.model_id, known.ids)
    with pytest.raises(DataError, match="the second embeddings have no labels"):
        jepakit.compare(known, nameless)
    with pytest.raises(DataError, match="the first embeddings have no labels"):
        jepakit.compare(nameless, known)
    assert known.labels is not None
    other = Embeddings(known.vectors, known.model_id, known.ids, ("bee", *known.labels[1:]))
    with pytest.raises(DataError, match=r"0.png is labelled 'ant' in the first embeddings and 'bee' in the second"):
        jepakit.compare(known, other)
    with pytest.raises(DataError, match="90 images, but groups of shape"):
        jepakit.compare(known, known, groups=["a"])


def test_files_are_compared_in_the_shell(tmp_path: Path) -> None:
    groups = np.arange(90) // 5
    embeddings(2.0, groups=groups).save(tmp_path / "a.npz")
    embeddings(0.3, seed=1, groups=groups).save(tmp_path / "b.npz")
    (tmp_path / "groups.csv").write_text(
        "path,group\n" + "".join(f"{n}.png,{group}\n" for n, group in enumerate(groups))
    )
    files = [str(tmp_path / "a.npz"), str(tmp_path / "b.npz")]
    told = CliRunner().invoke(app, ["compare", *files])
    assert told.exit_code == 0, told.output
    assert told.output.splitlines()[0].split() == ["a.npz", "b.npz", "(on", "90", "images)"]
    assert "; keep b.npz" in told.output
    found = json.loads(
        CliRunner().invoke(app, ["compare", *files, "--group", str(tmp_path / "groups.csv"), "--json"]).output
    )
    assert "over 18 groups" in found["verdict"]["reason"]
    for option in (["--images", "scans"], ["--labels", "labels.csv"]):
        ignored = CliRunner().invoke(app, ["compare", *files, *option])
        assert isinstance(ignored.exception, ConfigError)
        assert "hold embeddings and labels: leave them out" in str(ignored.exception)


def test_bundles_are_compared_on_images(
    tmp_path: Path, image_folder: Callable[..., Path], exported: Callable[..., Path]
) -> None:
    images = image_folder(per_class=10)
    bundles = [str(exported(image_size=64))] * 2
    told = CliRunner().invoke(app, ["compare", *bundles, "--images", str(images)])
    assert told.exit_code == 0, told.output
    assert "+0.0 points" in told.output
    assert "first  second" in told.stdout.splitlines()[0], "two of one name"
    names = [path.relative_to(images) for path in sorted(images.rglob("*.png"))]
    rows = [f"{name},{name.parts[0]},{place // 2}" for place, name in enumerate(names)]
    (images / "manifest.csv").write_text("\n".join(["path,label,group", *rows]))
    for option, groups in (([], 5), (["--group", "none"], None)):
        grouped = CliRunner().invoke(
            app, ["compare", *bundles, "--images", str(images / "manifest.csv"), "--json", *option]
        )
        assert json.loads(grouped.stdout)["verdict"]["n_groups"] == groups
    for arguments in ([bundles[0], str(tmp_path / "nothing")], [bundles[0], str(tmp_path / "nothing.npz")]):
        gone = CliRunner().invoke(app, ["compare", *arguments, "--images", str(tmp_path / "no images")])
        assert "nothing" in str(gone.exception), "both are opened before an image is embedded"
    missing = CliRunner().invoke(app, ["compare", *bundles])
    assert isinstance(missing.exception, ConfigError)
    assert "with --images" in str(missing.exception)


def test_what_are_no_embeddings_are_refused() -> None:
    known = embeddings(1.0)
    for pair in (("bundles/a", known), (known, "b.npz")):
        with pytest.raises(
            DataError, match=r"is of type str: give embeddings, from load\(BUNDLE\).embed\(IMAGES\) or Embeddings.load"
        ):
            jepakit.compare(*pair)
