"""Probes against scikit-learn, inside scikit-learn, and on disk."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from enum import Enum, StrEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sklearn
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from sklearn.base import clone, is_classifier
from sklearn.datasets import load_digits
from sklearn.feature_selection import RFE, SelectFromModel
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, log_loss
from sklearn.model_selection import GridSearchCV, LeaveOneOut, cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from jepakit import (
    Comparison,
    DryRun,
    Embeddings,
    Inspection,
    KNNProbe,
    LinearProbe,
    Sweep,
    Verdict,
    load_probe,
)
from jepakit._groups import assign_folds
from jepakit.errors import ConfigError, DataError, InputError, SpaceError
from jepakit.probes import ProbeReport, knn, linear
from jepakit.probes.linear import C_GRID
from jepakit.probes.logistic import cross_entropy, fit_logistic, softmax

Floats = NDArray[np.float64]

DIGITS, DIGIT_LABELS = load_digits(return_X_y=True)
DIGITS = DIGITS[:, DIGITS.std(axis=0) > 0]
TRAIN, TEST = slice(0, 1000), slice(1000, None)
SPACE, OTHER_SPACE = "0123456789abcdef", "fedcba9876543210"

PROBES = [LinearProbe(C=1.0), KNNProbe(k=5)]


def blobs(
    n: int = 90, classes: int = 3, dim: int = 6, noise: float = 1.0, seed: int = 0
) -> tuple[Floats, NDArray[np.intp]]:
    random = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    return 2 * random.standard_normal((classes, dim))[labels] + noise * random.standard_normal((n, dim)), labels


def embeddings(model_id: str = SPACE, dim: int = 6, *, labelled: bool = True) -> Embeddings:
    vectors, labels = blobs(dim=dim)
    names = tuple(f"class {label}" for label in labels) if labelled else None
    return Embeddings(vectors.astype(np.float32), model_id, tuple(map(str, range(len(labels)))), names)


# Against scikit-learn


@pytest.mark.parametrize("C", [0.01, 0.1, 1.0])
def test_the_linear_probe_is_scikit_learns_logistic_regression(C: float) -> None:
    ours = LinearProbe(C=C).fit(DIGITS[TRAIN], DIGIT_LABELS[TRAIN])
    scaler = StandardScaler().fit(DIGITS[TRAIN])
    theirs = LogisticRegression(C=C, tol=1e-8, max_iter=5000).fit(scaler.transform(DIGITS[TRAIN]), DIGIT_LABELS[TRAIN])
    # The bias is free up to a number common to all classes.
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=0.01)
    np.testing.assert_allclose(
        ours.intercept_ - ours.intercept_.mean(), theirs.intercept_ - theirs.intercept_.mean(), atol=0.05
    )
    test = scaler.transform(DIGITS[TEST])
    np.testing.assert_allclose(ours.predict_proba(DIGITS[TEST]), theirs.predict_proba(test), atol=0.03)
    assert (ours.predict(DIGITS[TEST]) == theirs.predict(test)).mean() > 0.998


@pytest.mark.parametrize("huge", [1e6, 1.7e9])
def test_one_huge_number_beside_an_embedding_hides_none_of_it(huge: float) -> None:
    random = np.random.default_rng(0)
    targets = np.arange(200) % 2
    vectors = random.normal(size=(200, 16))
    vectors[:, 0] += 4 * targets
    vectors = np.column_stack([vectors, random.uniform(huge, 1.1 * huge, 200)])
    assert LinearProbe().fit(vectors[:100], targets[:100]).score(vectors[100:], targets[100:]) > 0.9


def test_scikit_learn_finds_the_numbers_that_tell_classes_apart() -> None:
    random = np.random.default_rng(0)
    vectors, names = random.normal(size=(90, 8)), np.repeat(["a", "b", "c"], 30)
    vectors[:30, 6] += 3
    vectors[30:60, 7] += 3
    assert RFE(LinearProbe(C=1.0), n_features_to_select=2).fit(vectors, names).get_support(indices=True).tolist() == [
        6,
        7,
    ]
    assert SelectFromModel(LinearProbe(C=1.0)).fit(vectors, names).get_support(indices=True).tolist() == [6, 7]


@pytest.mark.parametrize("probe", [LinearProbe(C=1.0), KNNProbe()], ids=repr)
def test_a_fitted_probe_tells_scikit_learn_how_many_numbers_it_takes(probe: LinearProbe | KNNProbe) -> None:
    assert make_pipeline(clone(probe)).fit(DIGITS[TRAIN], DIGIT_LABELS[TRAIN]).n_features_in_ == DIGITS.shape[1]
    assert not hasattr(clone(probe), "n_features_in_")


def test_two_classes_are_scikit_learns_too() -> None:
    two = DIGIT_LABELS < 2
    scaled = StandardScaler().fit_transform(DIGITS[two])
    theirs = LogisticRegression(C=0.01, tol=1e-8, max_iter=5000).fit(scaled, DIGIT_LABELS[two])
    ours = LinearProbe(C=0.01).fit(DIGITS[two], DIGIT_LABELS[two])
    np.testing.assert_allclose(ours.predict_proba(DIGITS[two]), theirs.predict_proba(scaled), atol=0.005)


def test_the_linear_probe_sees_no_scale_and_no_offset() -> None:
    vectors, labels = blobs()
    plain = LinearProbe(C=1.0).fit(vectors, labels)
    stretched = LinearProbe(C=1.0).fit(1000 * vectors - 77, labels)
    np.testing.assert_allclose(stretched.predict_proba(1000 * vectors - 77), plain.predict_proba(vectors), atol=1e-3)


def test_a_number_that_never_changes_does_no_harm() -> None:
    vectors, labels = blobs()
    constant = np.column_stack([vectors, np.full(len(vectors), 3.0)])
    expected = LinearProbe(C=1.0).fit(vectors, labels).predict_proba(vectors)
    np.testing.assert_allclose(LinearProbe(C=1.0).fit(constant, labels).predict_proba(constant), expected, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-20, 1e6])
def test_a_k_nn_sees_no_scale(scale: float) -> None:
    plain, scaled = (
        KNNProbe().fit(DIGITS[:500], DIGIT_LABELS[:500]),
        KNNProbe().fit(scale * DIGITS[:500], DIGIT_LABELS[:500]),
    )
    np.testing.assert_allclose(scaled.predict_proba(scale * DIGITS[500:]), plain.predict_proba(DIGITS[500:]), atol=1e-4)


@pytest.mark.parametrize("C", [1.0, None])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_numbers_that_change_by_rounding_alone_carry_no_weight(scale: float, C: float | None) -> None:
    """On another provider they are rounded otherwise, by far more than they vary on this one."""
    vectors, labels = blobs(n=300)
    random = np.random.default_rng(1)
    jitter = random.standard_normal((len(vectors), 100))
    here = np.column_stack([vectors, 0.1 + 1e-8 * jitter[:, :50], 1e-9 * jitter[:, 50:]])
    there = np.column_stack([vectors, 0.1 + 1e-5 * jitter[:, :50], 1e-6 * jitter[:, 50:]])
    probe = LinearProbe(C=C).fit(scale * here, labels)
    expected = probe.predict_proba(scale * here)
    np.testing.assert_allclose(probe.predict_proba(scale * there), expected, atol=1e-3)
    np.testing.assert_allclose(expected, LinearProbe(C=probe.C_).fit(vectors, labels).predict_proba(vectors), atol=1e-2)


@pytest.mark.parametrize("classes", [2, 3])
def test_balanced_classes_count_as_in_scikit_learn(classes: int) -> None:
    vectors, labels = blobs(n=300, classes=classes, noise=4.0)
    rare = np.concatenate([np.flatnonzero(labels > 0), np.flatnonzero(labels == 0)[:9]])
    vectors, labels = vectors[rare], labels[rare]
    scaled = StandardScaler().fit_transform(vectors)
    theirs = LogisticRegression(C=0.1, tol=1e-8, max_iter=5000, class_weight="balanced").fit(scaled, labels)
    ours = LinearProbe(C=0.1, class_weight="balanced").fit(vectors, labels)
    np.testing.assert_allclose(ours.predict_proba(vectors), theirs.predict_proba(scaled), atol=0.005)
    plain = LinearProbe(C=0.1).fit(vectors, labels)
    assert ours.evaluate(vectors, labels).per_class["0"] > plain.evaluate(vectors, labels).per_class["0"] + 0.2


def test_balanced_classes_count_so_in_the_choice_of_c_too() -> None:
    """With the strongest penalty a rare class is found only where it counts as much as the others."""
    random = np.random.default_rng(0)
    labels = (np.arange(300) % 20 == 0).astype(np.intp)
    vectors = random.standard_normal((300, 64)) + 0.2 * labels[:, None]
    assert LinearProbe(class_weight="balanced").fit(vectors, labels).C_ < LinearProbe().fit(vectors, labels).C_


@pytest.mark.parametrize("k", [1, 5, 20])
def test_the_knn_probe_is_scikit_learns_with_the_weights_of_dino(k: int) -> None:
    def weights(cosine_distance: Floats) -> Floats:
        return np.asarray(np.exp(-cosine_distance / 0.07))

    theirs = KNeighborsClassifier(k, metric="cosine", weights=weights).fit(DIGITS[TRAIN], DIGIT_LABELS[TRAIN])
    ours = KNNProbe(k=k).fit(DIGITS[TRAIN], DIGIT_LABELS[TRAIN])
    test = DIGITS[1000:1400]
    np.testing.assert_allclose(ours.predict_proba(test), theirs.predict_proba(test), atol=1e-3)
    assert (ours.predict(test) == theirs.predict(test)).all()


def test_fewer_vectors_than_k_all_vote() -> None:
    probe = KNNProbe(k=20).fit([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]], ["a", "a", "b"])
    assert probe.predict([[1.0, 0.05], [0.1, 1.0]]).tolist() == ["a", "b"]


def test_knn_is_the_same_however_many_queries_come_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, labels = blobs()
    probe = KNNProbe(k=3).fit(vectors, labels)
    many = np.tile(vectors, (25, 1))
    alike = np.tile(probe.predict_proba(vectors), (25, 1))
    np.testing.assert_allclose(probe.predict_proba(many), alike, rtol=1e-6)
    monkeypatch.setattr(knn, "_PAIRS", 7 * len(vectors))  # as among so many vectors that few fit at a time
    np.testing.assert_allclose(probe.predict_proba(many), alike, rtol=1e-6)


@pytest.mark.parametrize("probe", PROBES, ids=repr)
def test_probabilities_add_up_to_one_and_no_vectors_give_none(probe: LinearProbe | KNNProbe) -> None:
    vectors, labels = blobs()
    probabilities = clone(probe).fit(vectors, labels).predict_proba(vectors)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    assert clone(probe).fit(vectors, labels).predict_proba(vectors[:0]).shape == (0, 3)


# The choice of C


def folds_of(
    targets: NDArray[np.intp], groups: NDArray[np.intp] | None = None, *, n_folds: int, seed: int
) -> list[NDArray[np.bool_]]:
    """The held-out vectors of each fold, as the choice of C assigns them."""
    alone = np.arange(len(targets))
    fold_of = assign_folds(alone if groups is None else groups, targets, n_folds, np.random.default_rng(seed))
    return [fold_of == fold for fold in range(n_folds)]


def choice_by_scikit_learn(vectors: Floats, labels: NDArray[np.intp], n_folds: int) -> float:
    """The C with the best balanced accuracy over all folds together; of several, the one of least cross-entropy."""
    predicted, missed = np.empty((len(C_GRID), len(labels)), int), np.zeros(len(C_GRID))
    for held_out in folds_of(labels, n_folds=n_folds, seed=0):
        scaler = StandardScaler().fit(vectors[~held_out])
        for i, C in enumerate(C_GRID):
            model = LogisticRegression(C=C, tol=1e-8, max_iter=5000).fit(
                scaler.transform(vectors[~held_out]), labels[~held_out]
            )
            test, truth = scaler.transform(vectors[held_out]), labels[held_out]
            predicted[i, held_out] = model.predict(test)
            missed[i] += log_loss(truth, model.predict_proba(test), normalize=False, labels=model.classes_)
    scores = [round(balanced_accuracy_score(labels, row), 9) for row in predicted]
    return min(zip(scores, missed, C_GRID, strict=True), key=lambda row: (-row[0], row[1]))[2]


@pytest.mark.parametrize(("noise", "n"), [(0.5, 90), (6.0, 90), (16.0, 120)])
def test_c_is_chosen_by_cross_validation(noise: float, n: int) -> None:
    vectors, labels = blobs(n=n, dim=30, noise=noise)
    probe = LinearProbe().fit(vectors, labels)
    assert choice_by_scikit_learn(vectors, labels, 5) == probe.C_
    assert probe.C is None, "hyper-parameters stay as they were given"


def test_of_equally_good_choices_of_c_the_one_of_the_best_probabilities_is_taken() -> None:
    vectors, labels = blobs(n=200, classes=10, dim=30, noise=0.5)
    probe = LinearProbe().fit(vectors, labels)
    assert choice_by_scikit_learn(vectors, labels, 5) == probe.C_
    assert probe.score(vectors, labels) == 1
    assert probe.predict_proba(vectors).max(axis=1).mean() > 0.95, "with C = 0.001 it is right too, and 0.3 at most"


def test_a_class_that_a_fold_was_not_fitted_on_has_no_say_in_the_choice_of_c(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, labels = blobs(n=90, dim=30, classes=2, noise=6.0)
    labels[0] = 2
    chosen = LinearProbe().fit(vectors, labels).C_

    calls: list[Floats] = []

    def favouring_the_last(logits: Floats, targets: NDArray[np.intp]) -> Floats:
        """So low for that class that it alone would decide."""
        calls.append(logits)
        missed: Floats = cross_entropy(logits, targets) - 1e6 * len(calls) * (targets == 2)
        return missed

    monkeypatch.setattr(linear, "cross_entropy", favouring_the_last)
    assert LinearProbe().fit(vectors, labels).C_ == chosen != C_GRID[-1]
    assert calls


def test_a_class_of_two_images_lies_in_two_of_five_folds() -> None:
    vectors, labels = blobs(n=90, dim=30, noise=6.0, classes=2)
    two = [*range(0, 90, 2), 1, 3]
    assert choice_by_scikit_learn(vectors[two], labels[two], 5) == LinearProbe().fit(vectors[two], labels[two]).C_


def test_the_middle_of_the_grid_where_not_two_classes_have_two_images() -> None:
    vectors, labels = blobs(n=90, dim=30, noise=6.0, classes=2)
    one = [*range(0, 90, 2), 1]
    assert LinearProbe().fit(vectors[one], labels[one]).C_ == 1.0
    assert LinearProbe().fit(vectors[:2], labels[:2]).C_ == 1.0


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("grouped", [False, True])
def test_a_rare_class_does_not_stop_the_choice_for_all(members: int, grouped: bool) -> None:
    random = np.random.default_rng(0)
    labels = np.arange(400) % 2
    vectors = random.standard_normal((400, 50))
    vectors[:, 0] += 0.7 * labels
    groups = (np.arange(400) // 2).astype(str) if grouped else None
    assert LinearProbe().fit(vectors, labels, groups=groups).C_ <= 0.01
    labels[: 2 * members : 2] = 2
    assert LinearProbe().fit(vectors, labels, groups=groups).C_ <= 0.1, "without folds it would be 1"


def test_groups_that_are_mostly_of_one_class_still_make_folds() -> None:
    """Nine of ten vectors in each group are of one class: no group counts as of the other, which is in them all."""
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 10)
    labels = (np.arange(400) % 10 == 0).astype(np.intp)
    vectors = random.standard_normal((400, 50))
    vectors[:, 0] += labels
    assert LinearProbe().fit(vectors, labels, groups=groups).C_ == 10.0, "without folds it would be 1"


def test_c_is_chosen_so_that_a_rare_class_counts_as_much_as_a_common_one() -> None:
    """The strongest penalty is right on 19 of 20 vectors, and never on the rare class."""
    random = np.random.default_rng(0)
    labels = (np.arange(300) % 20 == 0).astype(np.intp)
    vectors = random.standard_normal((300, 64)) + 0.2 * labels[:, None]
    probe = LinearProbe().fit(vectors, labels)
    assert probe.C_ == choice_by_scikit_learn(vectors, labels, 5) == 1.0
    assert set(LinearProbe(C=C_GRID[0]).fit(vectors, labels).predict(vectors)) == {0}


def test_a_given_c_is_taken_as_it_is() -> None:
    vectors, labels = blobs()
    assert LinearProbe(C=0.37).fit(vectors, labels).C_ == 0.37


def test_folds_share_out_every_class_evenly_and_every_vector_once() -> None:
    targets = np.repeat([0, 1, 2], [50, 13, 7])
    folds = folds_of(targets, n_folds=5, seed=3)
    assert (np.sum(folds, axis=0) == 1).all()
    for target in range(3):
        counts = [(targets[fold] == target).sum() for fold in folds]
        assert max(counts) - min(counts) <= 1
    again, other = folds_of(targets, n_folds=5, seed=3), folds_of(targets, n_folds=5, seed=4)
    np.testing.assert_array_equal(folds, again)
    assert (np.array(folds) != np.array(other)).any()


def test_a_group_is_in_one_fold_and_every_fold_has_groups_of_every_class() -> None:
    groups = np.random.default_rng(0).permutation(np.arange(120) % 24)
    targets = (groups % 3 == 0).astype(np.intp)  # 8 and 16 groups
    folds = folds_of(targets, groups, n_folds=5, seed=3)
    assert (np.sum(folds, axis=0) == 1).all()
    assert sorted(len(np.unique(groups[fold])) for fold in folds) == [4, 5, 5, 5, 5]
    for fold in folds:
        assert not set(groups[fold]) & set(groups[~fold])
        assert set(targets[fold]) == {0, 1}


def test_few_groups_that_mix_the_classes_lie_in_different_folds() -> None:
    """Three plates of three classes each, on each of which another one is the commonest."""
    plates = np.repeat([0, 1, 2], 100)
    targets = np.concatenate([np.repeat(np.roll([0, 1, 2], plate), [40, 30, 30]) for plate in range(3)])
    assert len({tuple(fold) for fold in folds_of(targets, plates, n_folds=5, seed=0) if fold.any()}) == 3
    vectors = np.random.default_rng(0).standard_normal((300, 20)) + 3 * np.eye(20)[targets]
    probe = LinearProbe().fit(vectors, targets, groups=plates)
    assert probe.cv_balanced_accuracy_ is not None
    assert probe.cv_balanced_accuracy_ > 0.9


def test_there_are_no_more_folds_than_the_commonest_class_has_groups() -> None:
    assert assign_folds(np.arange(5), np.array([0, 0, 0, 1, 1]), 5).tolist() == [0, 1, 2, 0, 1]


def test_folds_of_groups_of_one_vector_each_are_those_without_groups() -> None:
    targets = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [50, 13, 7]))
    plain, grouped = (folds_of(targets, groups, n_folds=5, seed=3) for groups in (None, np.arange(70)))
    np.testing.assert_array_equal(plain, grouped)


def test_c_is_chosen_by_groups_where_siblings_would_give_the_answer_away() -> None:
    """Twins with a label by chance: known by heart with any C, but told by nothing in a group not seen."""
    random = np.random.default_rng(2)
    groups, labels = np.repeat(np.arange(60), 4), np.repeat(random.permutation(np.arange(60) % 2), 4)
    vectors = np.repeat(random.standard_normal((60, 100)), 4, axis=0) + 0.01 * random.standard_normal((240, 100))
    vectors[:, 0] += 0.7 * labels
    alone, by_group = LinearProbe().fit(vectors, labels), LinearProbe().fit(vectors, labels, groups=groups.astype(str))
    assert (alone.C_, by_group.C_) == (10.0, 0.001)


def test_a_class_of_one_group_gives_the_middle_of_the_grid() -> None:
    vectors, labels = blobs(n=90, dim=30, noise=6.0, classes=2)
    groups = np.where(labels == 1, 0, 1 + np.arange(90) % 10)
    assert LinearProbe().fit(vectors, labels, groups=groups).C_ == 1.0


def test_groups_of_another_number_are_refused_and_leave_the_probe_as_it_was() -> None:
    vectors, labels = blobs(classes=2)
    probe = LinearProbe()
    with pytest.raises(DataError, match=rf"{len(labels)} images, but groups of shape \[3\]"):
        probe.fit(vectors, labels, groups=["a", "b", "c"])
    with pytest.raises(DataError, match="is not fitted"):
        probe.predict(vectors)


# Inside scikit-learn


@pytest.mark.parametrize("probe", [*PROBES, LinearProbe(seed=4, class_weight="balanced"), KNNProbe()], ids=repr)
def test_scikit_learn_can_clone_it(probe: LinearProbe | KNNProbe) -> None:
    copy = clone(probe)
    assert copy is not probe
    assert copy.get_params() == probe.get_params()
    assert is_classifier(probe)
    assert repr(copy) == repr(probe)


@pytest.mark.parametrize("probe", PROBES, ids=repr)
def test_cross_val_score_and_pipelines_work(probe: LinearProbe | KNNProbe) -> None:
    vectors, labels = blobs()
    names = np.array(["ant", "bee", "cat"])[labels]
    assert cross_val_score(probe, vectors, names, cv=3, error_score="raise").mean() > 0.9
    assert make_pipeline(FunctionTransformer(), clone(probe)).fit(vectors, names).score(vectors, names) > 0.9


@pytest.mark.parametrize("probe", PROBES, ids=repr)
def test_scikit_learn_before_1_6_takes_it_for_a_classifier(probe: LinearProbe | KNNProbe) -> None:
    """It asks for this name, and otherwise neither shuffles nor stratifies its folds."""
    assert probe._estimator_type == "classifier"


@pytest.mark.parametrize("probe", PROBES, ids=repr)
def test_pipelines_and_searches_work_with_metadata_routing(probe: LinearProbe | KNNProbe) -> None:
    vectors, labels = blobs()
    with sklearn.config_context(enable_metadata_routing=True):
        pipeline = make_pipeline(StandardScaler(), clone(probe))
        assert pipeline.fit(vectors, labels).score(vectors, labels) > 0.9
        grid = {"class_weight": [None, "balanced"]}
        assert GridSearchCV(clone(probe), grid, cv=3, error_score="raise").fit(vectors, labels).best_score_ > 0.9


@pytest.mark.parametrize("probe", PROBES, ids=repr)
def test_columns_in_another_order_are_refused(probe: LinearProbe | KNNProbe, tmp_path: Path) -> None:
    vectors, labels = blobs()
    frame = pd.DataFrame(vectors, columns=[f"f{place}" for place in range(vectors.shape[1])])
    fitted = clone(probe).fit(frame, labels)
    assert fitted.feature_names_in_.tolist() == frame.columns.tolist()
    assert fitted.score(frame, labels) == fitted.score(vectors, labels)
    for other in (frame.iloc[:, ::-1], frame.rename(columns={"f0": "g0"})):
        with pytest.raises(DataError, match=r"column 0 is '.*', but 'f0' in the vectors that this probe was fitted on"):
            fitted.predict(other)
    fitted.save(tmp_path / "p.safetensors")
    with pytest.raises(DataError, match="column 0 is"):
        load_probe(tmp_path / "p.safetensors").predict(frame.iloc[:, ::-1])
    assert not hasattr(fitted.fit(vectors, labels), "feature_names_in_")
    fitted.predict(frame.iloc[:, ::-1])


def test_grid_search_works_and_its_winner_can_be_saved(tmp_path: Path) -> None:
    vectors, labels = blobs()
    search = GridSearchCV(KNNProbe(), {"k": np.arange(1, 8, 3)}, cv=3, error_score="raise").fit(vectors, labels)
    search.best_estimator_.save(tmp_path / "knn.safetensors")
    assert load_probe(tmp_path / "knn.safetensors").get_params() == {
        "k": search.best_params_["k"], "class_weight": None,
    }  # fmt: skip


def test_balanced_votes_of_neighbours_count_by_how_rare_their_class_is() -> None:
    vectors = np.array([[1.0, 0.0]] * 9 + [[1.0, 0.001]])
    labels = ["common"] * 9 + ["rare"]
    plain, balanced = (KNNProbe(class_weight=weight).fit(vectors, labels) for weight in (None, "balanced"))
    np.testing.assert_allclose(plain.predict_proba([[1.0, 0.0005]])[0], [0.9, 0.1], atol=1e-5)
    np.testing.assert_allclose(balanced.predict_proba([[1.0, 0.0005]])[0], [0.5, 0.5], atol=1e-5)
    with pytest.raises(ConfigError, match="class_weight = 'even': give 'balanced' or None"):
        KNNProbe(class_weight="even").fit(vectors, labels)  # type: ignore[arg-type]


def test_parameters_are_set_by_name_and_typos_refused() -> None:
    assert LinearProbe().set_params(C=3.0, seed=2).get_params() == {"C": 3.0, "seed": 2, "class_weight": None}
    with pytest.raises(ConfigError, match="LinearProbe has no parameter 'c'; it has C, seed, class_weight"):
        LinearProbe().set_params(c=3.0)


@pytest.mark.parametrize("probe", PROBES, ids=repr)
def test_fit_returns_the_probe_itself(probe: LinearProbe | KNNProbe) -> None:
    copy = clone(probe)
    assert copy.fit(*blobs()) is copy


# Labels and reports


@pytest.mark.parametrize(
    "names", [["b", "a"], [7, -3], [True, False], [2.0, 0.0]], ids=lambda names: type(names[0]).__name__
)
@pytest.mark.parametrize("probe", PROBES, ids=repr)
def test_classes_keep_their_type_also_on_disk(tmp_path: Path, probe: LinearProbe | KNNProbe, names: list[Any]) -> None:
    vectors, labels = blobs(classes=2)
    y = np.array(names)[labels]
    fitted = clone(probe).fit(vectors, y)
    assert fitted.classes_.tolist() == sorted(names)
    assert fitted.predict(vectors).dtype == y.dtype
    fitted.save(tmp_path / "p.safetensors")
    np.testing.assert_array_equal(load_probe(tmp_path / "p.safetensors").predict(vectors), fitted.predict(vectors))
    assert load_probe(tmp_path / "p.safetensors").classes_.dtype.kind == y.dtype.kind


@pytest.mark.parametrize("dtype", ["u1", "i2", "u8", ">i4", "f4", "?"])
def test_numbers_of_classes_keep_their_dtype_on_disk(tmp_path: Path, dtype: str) -> None:
    classes = np.array([0, 2**63 + 1 if dtype == "u8" else 1], dtype)
    KNNProbe(k=1).fit([[1.0], [-1.0]], classes).save(tmp_path / "p.safetensors")
    loaded = load_probe(tmp_path / "p.safetensors").classes_
    assert loaded.dtype == dtype
    np.testing.assert_array_equal(loaded, classes)


def test_a_report_is_whole_only_if_nothing_is_wrong_and_names_harm_no_terminal() -> None:
    name = "a\x1b[31m\nb"
    report = ProbeReport(0.9999, 0.9999, {name: 2999 / 3000}, 3000, n_per_class={name: 3000})
    assert str(report).splitlines() == [
        "accuracy 99.9%   balanced 99.9%   on 3000 images", r"  a\x1b[31m\x0ab   99.9%  (2999 of 3000)",
    ]  # fmt: skip


def test_a_report_tells_accuracy_from_balanced_accuracy() -> None:
    probe = LinearProbe(C=1.0).fit([[-1.0], [-1.1], [1.0], [1.1]], ["no", "no", "yes", "yes"])
    report = probe.evaluate([[-1.05], [-1.05], [-1.05], [-1.05]], ["no", "no", "no", "yes"])
    assert report == ProbeReport(
        accuracy=0.75, balanced_accuracy=0.5, per_class={"no": 1.0, "yes": 0.0}, n=4, n_per_class={"no": 3, "yes": 1}
    )
    assert str(report).splitlines() == [
        "accuracy 75.0%   balanced 50.0%   on 4 images", "  no   100.0%  (3 of 3)", "  yes    0.0%  (0 of 1)",
    ]  # fmt: skip
    assert probe.score([[-1.0], [1.0]], ["no", "no"]) == 0.5


def test_labels_come_with_embeddings_or_are_passed() -> None:
    vectors, labels = blobs()
    assert LinearProbe(C=1.0).fit(embeddings()).score(embeddings()) > 0.9
    passed = LinearProbe(C=1.0).fit(embeddings(), labels)
    assert passed.classes_.tolist() == [0, 1, 2], "labels that are passed count"
    with pytest.raises(DataError, match="no labels: embed a folder"):
        LinearProbe().fit(embeddings(labelled=False))
    with pytest.raises(DataError, match="no labels"):
        LinearProbe().fit(vectors)


# What is refused


@pytest.mark.parametrize("probe", PROBES, ids=repr)
def test_a_probe_that_is_not_fitted_says_so(tmp_path: Path, probe: LinearProbe | KNNProbe) -> None:
    calls: list[Callable[[], object]] = [
        lambda: clone(probe).predict([[1.0]]),
        lambda: clone(probe).predict_proba([[1.0]]),
        lambda: clone(probe).evaluate([[1.0]], ["a"]),
        lambda: clone(probe).save(tmp_path / "p.safetensors"),
    ]
    for call in calls:
        with pytest.raises(DataError, match="is not fitted: call fit first"):
            call()
    assert not (tmp_path / "p.safetensors").exists()


@pytest.mark.parametrize("probe", PROBES, ids=repr)
def test_one_class_is_refused_and_the_probe_stays_unfitted(probe: LinearProbe | KNNProbe) -> None:
    copy = clone(probe)
    with pytest.raises(DataError, match=r"needs two classes or more, the labels hold \['cat'\]"):
        copy.fit([[1.0], [2.0]], ["cat", "cat"])
    with pytest.raises(DataError, match="is not fitted"):
        copy.predict([[1.0]])


@pytest.mark.parametrize("probe", PROBES, ids=repr)
def test_a_refused_second_fit_leaves_the_first_one_standing(probe: LinearProbe | KNNProbe) -> None:
    copy = clone(probe).fit(embeddings())
    before = copy.predict(embeddings())
    one_class = Embeddings(np.ones((2, 6), np.float32), OTHER_SPACE, ("0", "1"), ("cat", "cat"))
    with pytest.raises(DataError):
        copy.fit(one_class)
    assert copy.predict(embeddings()).tolist() == before.tolist()
    with pytest.raises(SpaceError):
        copy.predict(embeddings(OTHER_SPACE))


def test_a_second_fit_whose_groups_are_refused_leaves_the_first_one_standing() -> None:
    probe = LinearProbe(C=1.0).fit(embeddings())
    with pytest.raises(DataError, match="but groups of shape"):
        probe.fit(embeddings(OTHER_SPACE), groups=["a"])
    assert probe.model_id_ == SPACE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jepakit.probes.linear.fit_logistic", np.linalg.inv)  # which fails
        with pytest.raises(TypeError):
            probe.fit(embeddings(OTHER_SPACE))
    assert probe.model_id_ == SPACE


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("probe", PROBES, ids=repr)
def test_numbers_that_are_not_finite_are_refused(probe: LinearProbe | KNNProbe, bad: float) -> None:
    vectors, labels = blobs()
    fitted = clone(probe).fit(vectors, labels)
    vectors[3, 2] = bad
    with pytest.raises(DataError, match="NaN or infinite"):
        clone(probe).fit(vectors, labels)
    with pytest.raises(DataError, match="NaN or infinite"):
        fitted.predict(vectors)


@pytest.mark.parametrize(
    ("tensor", "cause"),
    [
        (torch.ones(2, 1, dtype=torch.bfloat16), "BFloat16"),
        (torch.ones(2, 1, device="meta"), r"Use Tensor\.cpu\(\)"),
        (torch.ones(2, 1, requires_grad=True), r"Use tensor\.detach\(\)"),
    ],
    ids=["half precision", "on another device", "with a gradient"],
)
def test_a_tensor_that_numpy_cannot_read_is_refused_with_the_cause(tensor: torch.Tensor, cause: str) -> None:
    with pytest.raises(DataError, match=rf"the vectors are not an array of numbers: give one \[N, D\] \(.*{cause}"):
        KNNProbe().fit(tensor, ["a", "b"])
    with pytest.raises(
        DataError, match=rf"the labels cannot be read as an array: give one label for each vector \(.*{cause}"
    ):
        KNNProbe().fit(np.ones((2, 1)), tensor[:, 0])
    with pytest.raises(DataError, match=rf"vectors of type Tensor: give floats \[N, D\] \(.*{cause}"):
        Embeddings(tensor, SPACE, ["a", "b"])


@pytest.mark.parametrize(
    ("X", "y", "message"),
    [
        ([1.0, 2.0], ["a", "b"], r"the vectors are an array of shape \[2\]: give one \[N, D\]"),
        (np.ones((2, 2, 2)), ["a", "b"], r"shape \[2, 2, 2\]"),
        (5, ["a", "b"], r"are an array of shape \[\]"),
        ([[1, 2], [3]], ["a", "b"], r"the vectors are not an array of numbers: give one \[N, D\]"),
        (
            [[1.0], [2.0]],
            [["a"], ["b", "c"]],
            "the labels are lists of different lengths: give one label for each of 2",
        ),
        ([[1.0], [2.0]], ["a"], r"2 vectors, but labels of shape \[1\]"),
        ([[1.0], [2.0]], [["a"], ["b"]], r"labels of shape \[2, 1\]"),
        (np.ones((0, 3)), [], "two classes or more"),
    ],
)
@pytest.mark.parametrize("probe", PROBES, ids=repr)
def test_arrays_of_another_shape_are_refused(probe: LinearProbe | KNNProbe, X: Any, y: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        clone(probe).fit(X, y)


def test_groups_that_are_lists_of_different_lengths_are_refused() -> None:
    with pytest.raises(DataError, match="the groups are lists of different lengths: give a name for each of 2 images"):
        LinearProbe().fit([[1.0], [2.0]], ["a", "b"], groups=[["x"], ["y", "z"]])


@pytest.mark.parametrize(
    "probe",
    [
        LinearProbe(C=0.0),
        LinearProbe(C=-1.0),
        LinearProbe(C=float("nan")),
        LinearProbe(C="1"),  # type: ignore[arg-type]
        LinearProbe(seed=-1),
        LinearProbe(seed=0.5),  # type: ignore[arg-type]
        LinearProbe(seed=None),  # type: ignore[arg-type]
        LinearProbe(class_weight="balance"),  # type: ignore[arg-type]
        KNNProbe(k=0),
        KNNProbe(k=-1),
        KNNProbe(k=2.5),  # type: ignore[arg-type]
        KNNProbe(k="5"),  # type: ignore[arg-type]
    ],
    ids=repr,
)
def test_parameters_without_meaning_are_refused_by_fit(probe: LinearProbe | KNNProbe) -> None:
    with pytest.raises(InputError):
        probe.fit(*blobs())


@pytest.mark.parametrize(
    "bad",
    [None, float("nan"), b"cat", datetime.date(2026, 1, 1), np.datetime64("2026-01-01", "ns"), 1j],
    ids=lambda bad: type(bad).__name__,
)
def test_labels_that_are_neither_text_nor_numbers_are_refused_by_name(bad: Any) -> None:
    for labels in (np.array([bad, "dog"], object), [bad, bad]):
        with pytest.raises(DataError, match=r"label .* of vector 0 is neither text nor a number"):
            KNNProbe().fit([[1.0], [2.0]], labels)


@pytest.mark.parametrize("kind", [list, np.array, lambda values: np.array(values, object), pd.Series])
def test_measurements_are_no_classes(kind: Callable[[list[float]], Any]) -> None:
    for probe in (LinearProbe(), KNNProbe(k=1)):
        with pytest.raises(DataError, match=r"label .*0\.5\)? of vector 1 is a measurement, not a class"):
            probe.fit([[1.0], [2.0], [3.0]], kind([1.0, 0.5, 2.0]))


def test_measurements_of_a_table_are_no_classes() -> None:
    vectors, labels = np.eye(40), [f"{place / 8:.3f}" for place in range(40)]
    with pytest.raises(
        DataError, match=r"40 labels, of which 40 differ, such as '0\.125', are measurements, not classes"
    ):
        LinearProbe().fit(vectors, labels)
    probe = KNNProbe(k=1).fit(vectors, ["0.5", "1.0"] * 20)
    assert probe.score(vectors[:1], ["0.5"]) == 1, "classes may be called so"
    KNNProbe(k=1).fit(vectors[:12], labels[:12])
    for names in ([*labels[:39], "none"], [*labels[:39], "inf"], [*map(str, range(39)), "0.5"]):
        KNNProbe(k=1).fit(vectors, names)


def test_members_of_an_enum_are_the_text_that_they_are_or_are_refused(tmp_path: Path) -> None:
    """In an array, numpy calls them by their names, cut to the length of the longest text."""

    class Defect(str, Enum):  # noqa: UP042 (as many have)
        CRACK_IN = "crack_in"
        CRACK_ON = "crack_on"

    given = [Defect.CRACK_IN, Defect.CRACK_ON] * 2
    for labels in (given, np.array(given, object)):
        with pytest.raises(DataError, match=r"label .* of vector 0 is a member of an enum.*: give its text"):
            KNNProbe(k=1).fit(np.eye(4), labels)
    Whole = StrEnum("Whole", ["CRACK", "OK"])
    assert KNNProbe(k=1).fit(np.eye(4), [Whole.CRACK, Whole.OK] * 2).classes_.tolist() == ["crack", "ok"]
    Embeddings(np.eye(4), "0123456789abcdef", [*map(str, range(4))], given).save(tmp_path / "e.npz")
    assert Embeddings.load(tmp_path / "e.npz").labels == ("crack_in", "crack_on") * 2


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_a_missing_label_or_group_among_text_is_no_class_of_its_own(missing: Any) -> None:
    with pytest.raises(DataError, match="of vector 1 is neither text nor a number"):
        KNNProbe().fit([[1.0], [2.0]], ["dog", missing])
    with pytest.raises(DataError, match=r"image 1 has no group"):
        LinearProbe().fit([[1.0], [2.0]] * 4, ["cat", "dog"] * 4, groups=["a", missing] * 4)


def test_a_number_of_neighbours_that_is_set_after_the_fit_is_checked_too() -> None:
    probe = KNNProbe(k=2).fit([[1.0], [2.0]], ["cat", "dog"]).set_params(k=0)
    with pytest.raises(ConfigError, match="k = 0: give a whole number of neighbours"):
        probe.predict([[1.0]])


def test_numbers_in_a_list_may_be_of_any_library() -> None:
    assert KNNProbe(k=1).fit([[1.0], [-1.0]], [torch.tensor(0), torch.tensor(1)]).classes_.tolist() == [0, 1]


def test_texts_in_an_array_of_objects_are_classes_like_any(tmp_path: Path) -> None:
    probe = KNNProbe(k=1).fit([[1.0], [-1.0]], np.array(["cat", "dog"], object))
    probe.save(tmp_path / "p.safetensors")
    assert load_probe(tmp_path / "p.safetensors").predict([[1.0]]).tolist() == ["cat"]


def test_labels_of_which_the_probe_knows_some_are_told() -> None:
    probe = KNNProbe(k=1).fit(np.eye(4, dtype=np.float32), ["cat", "dog"] * 2)
    report = probe.evaluate(np.eye(4, dtype=np.float32)[:3], ["cat", "Cat", "cat"])
    assert (report.unknown, report.accuracy) == (("Cat",), 2 / 3)
    assert "1 of these 3 images are of classes that the probe does not know, and count as wrong: Cat" in str(report)


@pytest.mark.parametrize(
    ("fitted", "given", "told"),
    [
        ([0, 1], ["0", "1"], "'0', '1', its classes are 0, 1"),
        (["cat", "dog"], ["Cat", "Cat"], "'Cat', its classes are 'cat', 'dog'"),
    ],
)
def test_labels_of_which_the_probe_knows_none_are_refused(fitted: list[Any], given: list[Any], told: str) -> None:
    probe = KNNProbe(k=1).fit([[1.0], [-1.0]], fitted)
    with pytest.raises(DataError, match=f"none of the labels is a class of this probe: the labels are {told}"):
        probe.evaluate([[1.0], [-1.0]], given)
    assert probe.score([[1.0], [-1.0]], [fitted[0], type(fitted[0])(7)]) == 0.5, "one that it knows is enough"


@pytest.mark.parametrize(("fitted", "given"), [([0, 1], ["0", "1"]), (["0", "1"], [0, 1])], ids=["numbers", "text"])
def test_the_score_of_text_for_numbers_is_refused(fitted: list[Any], given: list[Any]) -> None:
    probe = KNNProbe(k=1).fit([[1.0], [-1.0]], fitted)
    with pytest.raises(DataError, match="none of the labels is a class of this probe"):
        probe.score([[1.0], [-1.0]], given)


@pytest.mark.parametrize("probe", PROBES, ids=repr)
def test_a_fold_of_classes_it_was_not_fitted_on_scores_nothing(probe: LinearProbe | KNNProbe) -> None:
    vectors, labels = blobs(n=30)
    names = np.array(["ant", "bee", "cat"])[labels]
    labels[0], names[0] = 9, "yak"
    for y in (labels, names):
        scores = cross_val_score(probe, vectors, y, cv=LeaveOneOut(), error_score="raise")
        assert scores[0] == 0
        assert set(scores) <= {0, 1}
        assert scores.mean() > 0.8


@pytest.mark.parametrize("probe", PROBES, ids=repr)
def test_judging_on_no_images_at_all_is_refused(probe: LinearProbe | KNNProbe) -> None:
    vectors, labels = blobs()
    with pytest.raises(DataError):
        clone(probe).fit(vectors, labels).evaluate(vectors[:0], labels[:0])


@pytest.mark.parametrize("probe", PROBES, ids=repr)
def test_vectors_of_another_space_are_refused_by_both_names(probe: LinearProbe | KNNProbe) -> None:
    fitted = clone(probe).fit(embeddings())
    assert fitted.model_id_ == SPACE
    for call in (fitted.predict, fitted.predict_proba, fitted.evaluate, fitted.score):
        with pytest.raises(SpaceError, match=f"{SPACE}, these are of {OTHER_SPACE}: fit it again"):
            call(embeddings(OTHER_SPACE))


@pytest.mark.parametrize("probe", PROBES, ids=repr)
def test_vectors_of_another_length_are_refused(probe: LinearProbe | KNNProbe) -> None:
    fitted = clone(probe).fit(embeddings())
    with pytest.raises(SpaceError, match="takes vectors of 6 numbers, these have 7"):
        fitted.predict(embeddings(dim=7))
    with pytest.raises(SpaceError, match="takes vectors of 6 numbers, these have 5"):
        fitted.predict(np.ones((1, 5)))


@pytest.mark.parametrize("probe", PROBES, ids=repr)
def test_plain_arrays_have_no_space_to_check(probe: LinearProbe | KNNProbe) -> None:
    fitted = clone(probe).fit(embeddings())
    assert fitted.predict(embeddings().vectors).tolist() == fitted.predict(embeddings()).tolist()
    plain = clone(probe).fit(*blobs())
    assert plain.model_id_ is None
    assert len(plain.predict(embeddings())) == 90


# On disk


@pytest.mark.parametrize("probe", [*PROBES, LinearProbe(seed=3, class_weight="balanced")], ids=repr)
def test_a_probe_comes_back_as_it_was_saved(tmp_path: Path, probe: LinearProbe | KNNProbe) -> None:
    fitted = clone(probe).fit(embeddings())
    path = tmp_path / "deep" / "probe.safetensors"
    fitted.save(path)
    assert path.stat().st_mode & 0o777 == 0o644
    for loaded in (load_probe(str(path)), type(probe).load(path)):
        assert type(loaded) is type(probe)
        assert loaded.get_params() == probe.get_params()
        assert loaded.model_id_ == SPACE
        np.testing.assert_array_equal(loaded.classes_, fitted.classes_)
        np.testing.assert_array_equal(loaded.predict_proba(embeddings()), fitted.predict_proba(embeddings()))
        with pytest.raises(SpaceError):
            loaded.predict(embeddings(OTHER_SPACE))


def test_the_chosen_c_survives_the_disk(tmp_path: Path) -> None:
    fitted = LinearProbe().fit(embeddings())
    fitted.save(tmp_path / "p.safetensors")
    loaded = LinearProbe.load(tmp_path / "p.safetensors")
    assert (loaded.C, loaded.C_) == (None, fitted.C_)


def test_the_same_images_give_the_same_probe_in_any_order(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    labels = ["a", "b", "c"] * 20
    whole = Embeddings(random.standard_normal((60, 8)).astype(np.float32), SPACE, map(str, range(60)), labels)
    files = []
    for number in range(4):
        files.append(tmp_path / str(number))
        LinearProbe().fit(whole[random.permutation(60)]).save(files[-1])
    assert len({file.read_bytes() for file in files}) == 1


def test_the_same_probe_is_the_same_file(tmp_path: Path) -> None:
    for kind in (LinearProbe, KNNProbe):
        files = {tmp_path / str(number) for number in range(5)}
        for file in files:
            kind().fit(embeddings()).save(file)
        assert len({file.read_bytes() for file in files}) == 1


def test_a_probe_of_the_other_kind_is_refused(tmp_path: Path) -> None:
    KNNProbe().fit(embeddings()).save(tmp_path / "p.safetensors")
    with pytest.raises(DataError, match=r"p\.safetensors holds a KNNProbe, not a LinearProbe"):
        LinearProbe.load(tmp_path / "p.safetensors")


def test_a_missing_probe_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"p\.safetensors does not exist: make it with probe\.save"):
        load_probe(tmp_path / "p.safetensors")


@pytest.mark.parametrize(
    "data", [b"", b"garbage that is long enough", b"PK\x03\x04" * 9], ids=["empty", "garbage", "zip"]
)
def test_a_file_of_something_else_is_refused_by_name(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "p.safetensors").write_bytes(data)
    with pytest.raises(DataError, match=r"p\.safetensors is not a saved probe"):
        load_probe(tmp_path / "p.safetensors")


HEADER = {"kind": "knn", "params": {"k": 5}, "classes": ["a", "b"], "classes_dtype": None, "model_id": None}
ARRAYS = {
    "vectors": np.eye(2, dtype=np.float32),
    "targets": np.array([0, 1]),
    "fitted_on": np.empty(0, np.uint64),
}


def written(path: Path, header: Any, arrays: dict[str, Any] = ARRAYS) -> None:
    save_file(arrays, path, metadata={"jepakit_probe": json.dumps(header)})


@pytest.mark.parametrize(
    "header",
    [
        {"kind": []},
        {"params": 7},
        {"params": []},
        {"classes": {}},
        {"classes": [1, 300], "classes_dtype": "|u1"},
        {"classes_dtype": "<U3"},
        {"classes_dtype": "other"},
        {"model_id": 7},
    ],
    ids=str,
)
def test_a_header_that_is_no_probes_is_refused_by_name(tmp_path: Path, header: dict[str, Any]) -> None:
    written(tmp_path / "good", HEADER)
    assert load_probe(tmp_path / "good").predict([[1.0, 0.0]]).tolist() == ["a"]
    for number, bad in enumerate(({**HEADER, **header}, [], "probe")):
        written(tmp_path / f"{number} bad", bad)
        with pytest.raises(DataError, match="bad is not a saved probe"):
            load_probe(tmp_path / f"{number} bad")
    for text in ("{", "[" * 100_000):
        save_file(ARRAYS, tmp_path / "bad", metadata={"jepakit_probe": text})
        with pytest.raises(DataError, match="bad is not a saved probe"):
            load_probe(tmp_path / "bad")


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ({"kind": "forest"}, "a probe of kind 'forest'"),
        ({"params": {"k": 5, "metric": "cosine"}}, "a KNNProbe with the parameter 'metric'"),
        ({"params": {"k": 5, "class_weight": "sqrt"}}, "a KNNProbe with class_weight = 'sqrt'"),
        ({"temperature": 2.0}, "a KNNProbe with 'temperature'"),
    ],
)
def test_a_probe_of_a_later_version_is_told_from_another_file(
    tmp_path: Path, header: dict[str, Any], told: str
) -> None:
    written(tmp_path / "new", {**HEADER, **header})
    with pytest.raises(DataError, match=f"new holds {told}, unknown to this jepakit: upgrade jepakit"):
        load_probe(tmp_path / "new")


def test_a_probe_of_an_earlier_version_is_told_from_another_file(tmp_path: Path) -> None:
    save_file({"coef": np.zeros((2, 2))}, tmp_path / "p.safetensors", metadata={"jepakit_probe": "linear"})
    with pytest.raises(DataError, match="is not a saved probe of this version of jepakit"):
        load_probe(tmp_path / "p.safetensors")


def test_arrays_of_a_later_version_are_told_too(tmp_path: Path) -> None:
    written(tmp_path / "new", HEADER, {**ARRAYS, "calibration": np.ones(2)})
    with pytest.raises(DataError, match="new holds a KNNProbe with 'calibration', unknown to this jepakit"):
        load_probe(tmp_path / "new")


@pytest.mark.parametrize(
    "arrays",
    [
        {"vectors": ARRAYS["vectors"], "fitted_on": ARRAYS["fitted_on"]},
        {**ARRAYS, "targets": np.array([0, 1, 1])},
        {**ARRAYS, "targets": np.array([0, 7])},
        {**ARRAYS, "vectors": np.ones(2, np.float32)},
    ],
    ids=["no targets", "too many targets", "targets beyond the classes", "one vector"],
)
def test_arrays_that_do_not_fit_together_are_refused_by_name(tmp_path: Path, arrays: dict[str, Any]) -> None:
    written(tmp_path / "bad", HEADER, arrays)
    with pytest.raises(DataError, match="bad is not a saved probe"):
        load_probe(tmp_path / "bad")


def test_a_saved_probe_is_plain_safetensors_with_a_readable_header(tmp_path: Path) -> None:
    LinearProbe(C=2.0).fit(embeddings()).save(tmp_path / "p.safetensors")
    data = (tmp_path / "p.safetensors").read_bytes()
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    header = json.loads(metadata["jepakit_probe"])
    assert header["kind"] == "linear"
    assert header["params"] == {"C": 2.0, "seed": 0, "class_weight": None}
    assert header["classes"] == ["class 0", "class 1", "class 2"]
    assert header["model_id"] == SPACE


def test_a_fold_is_standardised_by_the_vectors_inside_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    means = []

    def noting(vectors: Floats, *args: Any, **options: Any) -> Any:
        means.append(np.abs(vectors.mean(axis=0)).max())
        return fit_logistic(vectors, *args, **options)

    monkeypatch.setattr(linear, "fit_logistic", noting)
    LinearProbe().fit(np.random.default_rng(0).standard_normal((60, 8)), np.repeat(["ant", "bee"], 30))
    assert len(means) == 5 * len(C_GRID) + 1
    assert max(means) < 1e-9


@pytest.mark.parametrize("probe", PROBES, ids=repr)
def test_images_that_a_probe_was_fitted_on_are_told_when_it_is_judged_by_them(probe: Any, tmp_path: Path) -> None:
    vectors, labels = blobs(60, seed=3)
    fitted = clone(probe).fit(vectors[:40], labels[:40])
    fitted.save(tmp_path / "p.safetensors")
    for judged in (fitted, load_probe(tmp_path / "p.safetensors")):
        assert judged.evaluate(vectors[:50], labels[:50]).n_fitted_on == 40
        assert "fitted on the vectors of 40 of these 50 images, so new ones will do worse" in str(
            judged.evaluate(vectors[:50], labels[:50])
        )
        report = judged.evaluate(vectors[40:], labels[40:])
        assert report.n_fitted_on == 0
        assert "warning" not in str(report)


def test_a_probe_knows_how_it_did_in_cross_validation(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    labels = np.repeat(["ant", "bee"], 100)
    vectors = random.standard_normal((200, 5)) + 1.0 * (labels == "ant")[:, None]
    probe = LinearProbe().fit(vectors, labels)
    new = random.standard_normal((2000, 5)) + np.repeat([1.0, 0.0], 1000)[:, None]
    on_new = probe.evaluate(new, np.repeat(["ant", "bee"], 1000)).balanced_accuracy
    assert probe.cv_balanced_accuracy_ == pytest.approx(on_new, abs=0.05)
    probe.save(tmp_path / "p.safetensors")
    assert LinearProbe.load(tmp_path / "p.safetensors").cv_balanced_accuracy_ == probe.cv_balanced_accuracy_
    assert LinearProbe(C=1.0).fit(vectors, labels).cv_balanced_accuracy_ is None


def test_a_class_that_no_fold_could_know_does_not_count_in_cross_validation() -> None:
    labels = np.repeat(["a", "b", "c"], 30)
    vectors = 10 * np.eye(3)[np.repeat([0, 1, 2], 30)] + np.random.default_rng(0).standard_normal((90, 3))
    groups = [f"{label}{0 if label == 'c' else number % 10}" for number, label in enumerate(labels)]
    assert LinearProbe().fit(vectors, labels, groups=groups).cv_balanced_accuracy_ == 1


def test_digests_of_double_precision_tell_what_single_would_not() -> None:
    vectors = np.array([[1e8 + place, 0.0] for place in range(20)])
    probe = KNNProbe(k=1).fit(vectors[:10], ["a", "b"] * 5)
    assert probe.evaluate(vectors[10:], ["a", "b"] * 5).n_fitted_on == 0
    assert (np.diff(probe.fitted_on_.astype(object)) > 0).all(), "and their order tells nothing of the images'"


@pytest.mark.parametrize("kind", [Comparison, DryRun, Inspection, ProbeReport, Sweep, Verdict])
def test_a_notebook_shows_what_print_does(kind: type) -> None:
    """IPython asks the first class in the MRO that defines `_repr_pretty_` or `__repr__` itself."""
    asked = next(one for one in kind.__mro__ if vars(one).keys() & {"_repr_pretty_", "__repr__"})
    shown: list[str] = []
    report = ProbeReport(0.5, 0.5, {"cat": 0.5}, n=2, n_fitted_on=2)
    vars(asked)["_repr_pretty_"](report, SimpleNamespace(text=shown.append), cycle=False)
    assert shown == [str(report)]


def test_large_logits_do_not_overflow() -> None:
    logits = np.array([[5000.0, 0.0], [0.0, 5000.0], [-5000.0, -5000.0]])
    np.testing.assert_array_equal(softmax(logits), [[1, 0], [0, 1], [0.5, 0.5]])
    np.testing.assert_allclose(cross_entropy(logits, np.array([0, 0, 1])), [0, 5000, np.log(2)])


def test_a_fit_goes_on_from_where_it_starts() -> None:
    vectors, targets = np.random.default_rng(0).standard_normal((40, 3)), np.arange(40) % 4
    near = fit_logistic(vectors, targets, 1.0, importance=np.ones(40)) + 1e-9
    again = fit_logistic(vectors, targets, 1.0, importance=np.ones(40), start=near)
    np.testing.assert_array_equal(again, near)
