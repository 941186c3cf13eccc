"""`Embeddings.nearest`, in Python and on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics.pairwise import cosine_similarity
from typer.testing import CliRunner

from jepakit import Embeddings, _vectors
from jepakit.cli import app
from jepakit.errors import ConfigError, DataError, SpaceError

SPACE = "0123456789abcdef"
RANDOM = np.random.default_rng(0)


def embeddings(vectors: NDArray[Any], prefix: str = "", model_id: str = SPACE) -> Embeddings:
    return Embeddings(vectors.astype(np.float32), model_id, tuple(f"{prefix}{place}" for place in range(len(vectors))))


@pytest.mark.parametrize("k", [1, 5, 40])
def test_the_most_similar_vectors_come_first(k: int) -> None:
    index, queries = RANDOM.standard_normal((40, 7)), 100 * RANDOM.standard_normal((9, 7))
    places, cosines = embeddings(index).nearest(embeddings(queries), k)
    expected = cosine_similarity(queries, index)
    assert places.dtype == np.int64
    assert cosines.dtype == np.float32
    np.testing.assert_array_equal(places, np.argsort(-expected, axis=1)[:, :k])
    np.testing.assert_allclose(cosines, -np.sort(-expected, axis=1)[:, :k], atol=1e-6)


def test_the_same_vectors_are_told_by_place_however_many_are_compared_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    few = RANDOM.standard_normal((11, 384))
    index, queries = embeddings(np.tile(few, (23, 1))), embeddings(few)
    places, cosines = index.nearest(queries, 50)
    np.testing.assert_array_equal(places[:, :23], np.arange(11)[:, None] + 11 * np.arange(23))
    monkeypatch.setattr(_vectors, "_QUERIES", 3)
    monkeypatch.setattr(_vectors, "AT_A_TIME", 7)
    in_blocks = index.nearest(queries, 50)
    np.testing.assert_array_equal(in_blocks[0], places)
    np.testing.assert_allclose(in_blocks[1], cosines, atol=1e-6)


def test_no_queries_have_no_neighbours_and_zeros_are_like_nothing() -> None:
    index = embeddings(np.array([[0.0, 0.0], [-1.0, 0.0]]))
    assert [part.shape for part in index.nearest(index[:0], 2)] == [(0, 2), (0, 2)]
    places, cosines = index.nearest(embeddings(np.array([[2.0, 0.0]])), 2)
    assert (places.tolist(), cosines.tolist()) == ([[0, 1]], [[0.0, -1.0]])


def test_in_no_vectors_there_is_nothing_to_find() -> None:
    index = embeddings(np.eye(3))
    with pytest.raises(DataError, match="there are no vectors to search: embed some images first"):
        index[:0].nearest(index)


@pytest.mark.parametrize("k", [0, -1, 4, 2.0, True, "2", None])
def test_a_k_that_there_is_not_is_refused(k: Any) -> None:
    index = embeddings(np.eye(3))
    with pytest.raises(ConfigError, match=r"k = .*: give a whole number, 1 to 3, which is how many vectors there are"):
        index.nearest(index, k)
    assert index.nearest(index, np.int32(3))[0].shape == (3, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("queries", [embeddings(np.eye(3), model_id="f" * 16), embeddings(np.eye(4))], ids=repr)
def test_vectors_of_another_model_are_not_compared(queries: Embeddings) -> None:
    with pytest.raises(SpaceError, match=r"these are vectors of model 0123456789abcdef \(3 numbers\), the queries of"):
        embeddings(np.eye(3)).nearest(queries, 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_vectors_that_are_not_finite_have_no_neighbours(bad: float) -> None:
    sound, damaged = embeddings(np.eye(3)), embeddings(np.where(np.eye(3), [[1.0, bad, 1.0]], 0.0), "q")
    for index, queries in ((sound, damaged), (damaged, sound), (damaged, None)):
        with pytest.raises(
            DataError, match="1 vector with NaN or infinite numbers, the first that of q1: leave them out"
        ):
            index.nearest(queries, 1)


def test_the_command_line_prints_a_line_for_each_neighbour(tmp_path: Path) -> None:
    embeddings(np.array([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]]), "known").save(tmp_path / "known.npz")
    embeddings(np.array([[3.0, 0.0], [0.0, 1.0]]), "new").save(tmp_path / "new.npz")
    command = ["nearest", str(tmp_path / "new.npz"), str(tmp_path / "known.npz"), "-k"]
    done = CliRunner().invoke(app, [*command, "2"])
    assert done.output.splitlines() == [
        "new0\t1\tknown0\t1.0000", "new0\t2\tknown1\t0.7071", "new1\t1\tknown1\t0.7071", "new1\t2\tknown0\t0.0000",
    ]  # fmt: skip
    assert isinstance(CliRunner().invoke(app, [*command, "9"]).exception, ConfigError)


def test_without_queries_each_finds_the_others() -> None:
    vectors = np.array([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.1], [1.0, 0.0], [1.0, 0.0]])
    places, cosines = embeddings(vectors).nearest(k=2)
    np.testing.assert_array_equal(places, [[3, 4], [0, 3], [1, 0], [0, 4], [0, 3]])
    np.testing.assert_allclose(cosines[:2], [[1, 1], [0.5**0.5] * 2], atol=1e-6)
    same = embeddings(np.ones((6, 2))).nearest(k=2)[0]
    assert not (same == np.arange(6)[:, None]).any(), "nor where more are equal to it than are asked for"
    for k in (0, 5, True):
        with pytest.raises(ConfigError, match="give a whole number, 1 to 4, which is how many others there are"):
            embeddings(vectors).nearest(k=k)


def test_one_vector_has_no_others() -> None:
    with pytest.raises(DataError, match="1 vector only: there are no others to find"):
        embeddings(np.ones((1, 2))).nearest()


def test_the_command_line_takes_one_file_too(tmp_path: Path) -> None:
    embeddings(np.array([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]]), "im").save(tmp_path / "e.npz")
    done = CliRunner().invoke(app, ["nearest", str(tmp_path / "e.npz"), "-k", "1"])
    assert done.output.splitlines() == ["im0\t1\tim1\t0.7071", "im1\t1\tim0\t0.7071", "im2\t1\tim1\t-0.7071"]


@pytest.mark.parametrize(
    "queries", [np.eye(3, dtype=np.float32), 5, "more.npz"], ids=lambda given: type(given).__name__
)
def test_queries_that_are_no_embeddings_are_refused(queries: Any) -> None:
    with pytest.raises(DataError, match=f"queries of type {type(queries).__name__}: give embeddings"):
        embeddings(np.eye(3)).nearest(queries)
