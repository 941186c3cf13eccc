"""What is measured of a run, on made-up features: groups kept together, and files that are gone at the end."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import jepakit
from jepakit.backbones.backbone import build
from jepakit.bundles.comparison import Scores
from jepakit.bundles.manifest import Preprocess
from jepakit.config import AdaptConfig
from jepakit.errors import DataError, MissingExtraError, TrainingError
from jepakit.evaluation.evaluate import Measurement
from jepakit.run import Run
from jepakit.sources import ImageList, list_images
from jepakit_training import loop, measuring
from jepakit_training.holdout import MeasuringSet
from jepakit_training.measuring import Features, Measuring, extract, measure_vectors, pick_pooling

SPEC = Preprocess(
    size=64, resize_to=64, resize="shorter", interpolation="bicubic", bands=3, dtype="uint8", mean=(0.5,) * 3,
    std=(0.5,) * 3,
)  # fmt: skip

NONE = np.empty(0, np.uint64)


def siblings(n_groups: int, per_group: int) -> MeasuringSet:
    """Two classes, groups of one class each, two of three groups to fit on."""
    groups = np.repeat(np.arange(n_groups), per_group)
    labels = np.array(["a", "b"])[groups // 3 % 2]
    return MeasuringSet(np.arange(len(groups)), groups % 3 < 2, np.ones(len(groups), bool), labels, groups.astype(str))


def test_the_pooling_is_chosen_by_groups_that_the_probes_have_not_seen() -> None:
    """One pooling knows each group by heart, the other tells the classes apart, less than always."""
    images, random = siblings(36, 10), np.random.default_rng(0)
    assert images.groups is not None
    assert images.labels is not None
    by_heart = random.standard_normal((36, 64))[images.groups.astype(int)]
    telling = np.where(images.labels == "a", 1.0, -1.0)[:, None] + 1.5 * random.standard_normal((360, 1))
    features = Features(
        {"head": by_heart.astype(np.float32), "stages": telling.astype(np.float32)}, np.ones(360, bool), [], NONE
    )
    assert pick_pooling(features, images, "none") == "stages"
    images.groups = None
    assert pick_pooling(features, images, "none") == "head"


def test_the_pooling_is_chosen_by_the_scores_that_the_verdict_speaks_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pooling knows the common class alone, as 9 of 10 images are of it; the other tells the rare one too."""
    images = siblings(120, 1)
    images = replace(images, labels=np.where(np.arange(120) % 10 == 0, "rare", "common"), groups=None)
    knows_common = Scores(linear=0.9, linear_balanced=0.5, knn=0.9, knn_balanced=0.5)
    knows_both = Scores(linear=0.85, linear_balanced=0.85, knn=0.85, knn_balanced=0.85)

    def measured(vectors: NDArray[np.float32], part: MeasuringSet) -> Measurement:
        scores = knows_both if vectors.shape[1] == 2 else knows_common
        return Measurement(scores, np.arange((~part.is_fit).sum()) < round(scores.linear * (~part.is_fit).sum()))

    monkeypatch.setattr(measuring, "measure_vectors", measured)
    nothing = np.zeros((120, 2), np.float32)
    features = Features({"head": nothing[:, :1], "stages": nothing}, np.ones(120, bool), [], NONE)
    assert pick_pooling(features, images, "none") == "stages"


@pytest.mark.parametrize("n_groups", [3, 6])
def test_where_groups_are_too_few_to_tell_the_first_pooling_is_taken(n_groups: int) -> None:
    images = siblings(n_groups, 10)
    nothing = np.zeros((len(images.indices), 2), np.float32)
    assert (
        pick_pooling(Features({"head": nothing, "stages": nothing}, np.ones(1, bool), [], NONE), images, "none")
        == "head"
    )


def test_thirds_are_the_same_without_groups_and_with_groups_of_one_image_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = siblings(12, 6)
    parts: list[NDArray[np.bool_]] = []

    def noting(vectors: NDArray[np.float32], part: MeasuringSet) -> Measurement:
        parts.append(part.is_fit)
        return measure_vectors(vectors, part)

    monkeypatch.setattr(measuring, "measure_vectors", noting)
    noise = np.random.default_rng(0).standard_normal((72, 4)).astype(np.float32)
    features = Features({"head": noise, "stages": noise}, np.ones(72, bool), [], NONE)
    images.groups = np.random.default_rng(1).permutation(72).astype(str)
    pick_pooling(features, images, "none")
    images.groups = None
    pick_pooling(features, images, "none")
    np.testing.assert_array_equal(parts[:6], parts[6:])
    assert images.labels is not None
    labels = images.labels[images.is_fit]
    assert [np.unique(labels[~part], return_counts=True)[1].tolist() for part in parts[:3]] == [[8, 8]] * 3


def test_the_verdict_is_over_the_groups_of_the_source(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, table = image_folder(), tmp_path / "groups.csv"
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    table.write_text(
        "\n".join(["path,group", *(f"{name},{name[:8]} {number % 12 // 3}" for number, name in enumerate(names))])
    )
    settings: dict[str, Any] = {
        "backbone": "test_vit", "weights": "random", "image_size": 64, "steps": 1, "batch_size": 8, "workers": 0,
        "labels": "folder", "held_out": 0.4,
    }  # fmt: skip
    grouped = jepakit.adapt(folder, out=tmp_path / "grouped", group=str(table), **settings)
    assert "have fewer: 'texture0' (" in grouped.verdict.reason
    assert "images of more groups" in grouped.verdict.reason
    table.write_text("\n".join(["path,group", *(f"{name},all" for name in names)]))
    alone = jepakit.adapt(folder, out=tmp_path / "alone", group=str(table), **settings)
    caveat, _, reason = alone.verdict.reason.partition("; ")
    assert caveat == (
        "optimistic, as all images are one group, which cannot be held out whole: held-out images have siblings in training"
    )
    assert "group" not in reason
    assert alone.verdict.low is not None


def test_copies_of_images_to_fit_on_are_counted_among_the_held_out(
    image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder, table = image_folder(), tmp_path / "split.csv"
    rows = ["path,label,split"]
    for number, path in enumerate(sorted(folder.rglob("*.png"))):
        rows.append(f"{path},{path.parent.name},{'test' if number % 3 else 'train'}")
        if number % 7 == 1:
            rows.append(f"{shutil.copy(path, tmp_path / f'{number}.png')},{path.parent.name},train")
    table.write_text("\n".join(rows))
    run = jepakit.adapt(
        table, out=tmp_path / "run", backbone="test_vit", weights="random", image_size=64, steps=1, batch_size=8,
        workers=0,
    )  # fmt: skip
    assert run.verdict.reason.startswith("3 of 18 held-out images are also among those that probes are fitted on")


def test_a_class_of_one_patient_is_named_where_the_other_class_alone_is_held_out(
    image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder, table = image_folder(), tmp_path / "patients.csv"
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    patients = [number // 2 if name.startswith("texture0") else "only" for number, name in enumerate(names)]
    table.write_text(
        "\n".join(["path,group", *(f"{name},{patient}" for name, patient in zip(names, patients, strict=True))])
    )
    run = jepakit.adapt(
        folder, out=tmp_path / "run", backbone="test_vit", weights="random", image_size=64, steps=1, batch_size=8,
        workers=0, labels="folder", group=str(table), held_out=0.4,
    )  # fmt: skip
    assert run.verdict.word == "cannot tell"
    assert "only class 'texture0' is held out" in run.verdict.reason
    assert "have fewer: 'texture1' (0): label images of more groups" in run.verdict.reason


def test_images_without_a_label_centre_the_embedding_and_are_never_probed() -> None:
    """They would turn every probe's answer: their vectors lie far out, under a third label."""
    images, random = siblings(36, 10), np.random.default_rng(0)
    assert images.labels is not None
    telling = np.where(images.labels == "a", 1.0, -1.0)[:, None] + 0.1 * random.standard_normal((360, 2))
    images.is_labelled[::2] = ~images.is_fit[::2]
    images.labels = np.where(images.is_labelled, images.labels, "")
    telling[~images.is_labelled] += 100
    vectors = telling.astype(np.float32)
    measured = measure_vectors(vectors, images)
    assert measured.scores.linear == measured.scores.knn == 1
    assert measured.right.shape == (2, int((~images.is_fit).sum()))
    noise = random.standard_normal((360, 2)).astype(np.float32)
    assert (
        pick_pooling(Features({"head": noise, "stages": vectors}, np.ones(360, bool), [], NONE), images, "none")
        == "stages"
    )


def labels_for(folder: Path, file: Path, *columns: str, of: Callable[[int], Sequence[str]]) -> Path:
    """A manifest of the images in class folders, with what `of` returns for each image's number within its class."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    rows = (",".join([f"{folder}/{name}", name[:8], *of(int(name[-7:-4]))]) for name in names)
    file.write_text("\n".join([",".join(["path", "label", *columns]), *rows]))
    return file


def test_a_set_that_is_labelled_in_part_has_a_verdict(
    image_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = image_folder(per_class=30)
    table = labels_for(folder, tmp_path / "labels.csv", of=lambda _: [])
    header, *rows = table.read_text().splitlines()
    table.write_text("\n".join([header, *rows[:15], *rows[30:45]]))
    settings: dict[str, Any] = {
        "backbone": "test_vit", "weights": "random", "image_size": 64, "steps": 1, "batch_size": 8, "workers": 0,
    }  # fmt: skip
    run = jepakit.adapt(folder, out=tmp_path / "run", labels=str(table), **settings)
    told = capsys.readouterr().err
    assert "30 of 60 images are labelled" in told
    assert "54 images train, 6 held out" in told
    assert (run.comparison.n_train, run.comparison.n_held_out) == (24, 6)
    assert run.verdict.low is not None
    assert jepakit.adapt(folder, out=tmp_path / "run", labels=str(table), **settings).comparison == run.comparison
    table.write_text("\n".join([header, *rows[:14], *rows[30:45]]))
    with pytest.raises(DataError, match=r"are not those .* labels or groups were"):
        jepakit.adapt(folder, out=tmp_path / "run", labels=str(table), **settings)


@pytest.mark.parametrize(("labelled", "named"), [("train", "held out"), ("test", "to fit probes on")])
def test_labels_on_one_side_of_the_split_alone_give_no_verdict(
    image_folder: Callable[..., Path], tmp_path: Path, labelled: str, named: str
) -> None:
    folder, manifest = image_folder(), tmp_path / "m.csv"
    labels_for(folder, manifest, "split", of=lambda number: ["test" if number % 4 == 0 else "train"])
    rows = (row.split(",") for row in manifest.read_text().splitlines())
    kept = ([path, label if split in (labelled, "split") else "", split] for path, label, split in rows)
    manifest.write_text("\n".join(map(",".join, kept)))
    run = jepakit.adapt(
        manifest, out=tmp_path / "run", backbone="test_vit", weights="random", image_size=64, steps=1, batch_size=8, workers=0,
    )  # fmt: skip
    assert run.verdict.word == "cannot tell"
    assert run.verdict.reason.startswith(f"none of the images {named} is labelled (")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_missing_extra_is_raised_as_it_is_and_not_as_a_traceback_of_a_loader(
    monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    def missing(*_: Any) -> Any:
        raise MissingExtraError("DICOM files need jepakit[dicom]")

    monkeypatch.setattr(measuring, "preprocess", missing)
    images = list_images([np.zeros((64, 64, 3), np.uint8)] * 2, "none")
    with pytest.raises(MissingExtraError, match=r"^DICOM files need jepakit\[dicom\]$"):
        extract(
            build("test_vit", {}), images, np.arange(2), SPEC, ("head",),
            device=torch.device("cpu"), workers=workers, what="measure", progress=False,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("does", "told"),
    [
        (lambda *_: os.kill(os.getpid(), signal.SIGKILL), "a loader's process was ended from outside"),
        (lambda *_: time.sleep(60), "the loader's processes delivered no batch for 1 s"),
    ],
    ids=["killed", "hangs"],
)
def test_a_loader_that_dies_or_hangs_while_measuring_is_told(
    monkeypatch: pytest.MonkeyPatch, does: Callable[..., Any], told: str
) -> None:
    monkeypatch.setattr(measuring, "preprocess", does)
    monkeypatch.setattr(measuring, "PATIENCE_S", 1)
    images = list_images([np.zeros((64, 64, 3), np.uint8)] * 2, "none")
    with pytest.raises(TrainingError, match=told):
        extract(
            build("test_vit", {}), images, np.arange(2), SPEC, ("head",),
            device=torch.device("cpu"), workers=1, what="measure", progress=False,
        )  # fmt: skip


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_lost_or_replaced_while_training_is_named_and_the_same_command_goes_on_with_it(
    image_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    replaced: bool,
) -> None:
    folder = image_folder()
    file = folder / "texture1" / "003.png"
    content, train = file.read_bytes(), loop._train

    def and_lose_it(*args: Any) -> None:
        train(*args)
        file.write_bytes((folder / "texture0" / "003.png").read_bytes() if replaced else content[:60])

    def adapt() -> Run:
        return jepakit.adapt(
            folder,
            out=tmp_path / "run",
            backbone="test_vit",
            weights="random",
            image_size=64,
            steps=2,
            batch_size=8,
            workers=0,
        )

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_train", and_lose_it)
        with pytest.raises(
            DataError, match=r"^1 image measured before training .* the first: texture1/003.png.*same command"
        ):
            adapt()
    if replaced:  # with all of them replaced before it goes on
        kept = {name: name.read_bytes() for name in folder.rglob("*.png")}
        for name in kept:
            Image.effect_noise((80, 72), 60).convert("RGB").save(name)
        monkeypatch.setattr(
            ImageList,
            "digest",
            lambda _: jepakit.open_bundle(tmp_path / "run" / "start").manifest.provenance.data_digest,
        )
        with pytest.raises(DataError, match="was started with other images: what was measured on them has changed"):
            adapt()
        for name, was in kept.items():
            name.write_bytes(was)
    file.write_bytes(content)
    run = adapt()
    assert "resuming from step 2" in capsys.readouterr().err
    assert run.comparison.n_train + run.comparison.n_held_out == 28


class Flickering:
    """A dataset that gives another image each time."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, place: int) -> NDArray[np.uint8]:
        return np.random.default_rng().integers(0, 255, (72, 72, 3), np.uint8)


def test_a_dataset_may_give_another_image_each_time(tmp_path: Path) -> None:
    run = jepakit.adapt(
        Flickering(), out=tmp_path / "run", backbone="test_vit", weights="random", image_size=64, steps=1, batch_size=8, workers=0,
    )  # fmt: skip
    assert run.finished


def test_the_verdict_says_that_not_all_classes_were_measured(tmp_path: Path) -> None:
    for number in range(22 * 9):
        picture = np.random.default_rng(number).integers(0, 255, (64, 64, 3), np.uint8)
        path = tmp_path / "images" / f"class {number % 22:02}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    run = jepakit.adapt(
        tmp_path / "images", out=tmp_path / "run", backbone="test_vit", weights="random", image_size=64, steps=1, batch_size=8,
        workers=0, labels="folder", measure_on=20,
    )  # fmt: skip
    assert run.comparison.n_held_out == 18
    assert run.comparison.verdict.reason.startswith("measured on 6 of 22 classes (measure_on = 20); ")


IS_FIT = np.arange(40) < 30


def test_held_out_images_have_no_say_in_the_centre() -> None:
    raw = np.random.default_rng(0).standard_normal((40, 4)).astype(np.float32) + 100 * ~IS_FIT[:, None]
    measuring = object.__new__(Measuring)
    measuring.images = MeasuringSet(np.arange(40), IS_FIT, IS_FIT, None, None)
    measuring._config = AdaptConfig(images="x")
    embedding = measuring._measured(Features({"head": raw}, np.ones(40, bool), [], NONE), "head").embedding
    assert embedding.center is not None
    np.testing.assert_allclose(embedding.center, raw[:30].mean(axis=0), atol=1e-5)


def test_probes_are_told_the_groups_they_are_fitted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}
    monkeypatch.setattr(measuring, "measure", lambda *_, **groups: told.update(groups))
    labels, groups = np.tile(["a", "b"], 20), np.repeat([f"g{number}" for number in range(20)], 2)
    images = MeasuringSet(np.arange(40), IS_FIT, np.ones(40, bool), labels, groups)
    measure_vectors(np.zeros((40, 4), np.float32), images)
    assert told["train_groups"].tolist() == groups[:30].tolist()


def test_probes_are_told_the_groups_they_are_judged_by(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}
    monkeypatch.setattr(measuring, "measure", lambda *_, **groups: told.update(groups))
    images = siblings(30, 6)
    assert images.groups is not None
    measure_vectors(np.zeros((180, 4), np.float32), images)
    assert told["held_out_groups"].tolist() == images.groups[~images.is_fit].tolist()
