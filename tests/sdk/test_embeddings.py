"""`Embeddings` on disk: no pickle, nothing lost, and no other file taken for them."""

from __future__ import annotations

import dataclasses
import datetime
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from typer.testing import CliRunner

import jepakit
from jepakit import Embeddings
from jepakit.cli import app
from jepakit.embeddings import is_embeddings
from jepakit.errors import ConfigError, DataError, InputError, SpaceError, WriteError

VECTORS = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
IDS = ("cat/1.png", "café/ü 2.png", "dog/3.png")
MODEL_ID = "0123456789abcdef"


def make(labels: tuple[str, ...] | None = ("cat", "café", "dog")) -> Embeddings:
    return Embeddings(VECTORS, MODEL_ID, IDS, labels)


def arrays(**changes: Any) -> dict[str, Any]:
    """What `make(None).save` writes, with changes."""
    ids = [name.encode() for name in IDS]
    packed = {"ids": np.frombuffer(b"".join(ids), np.uint8), "ids_ends": np.cumsum(list(map(len, ids)))}
    return {"vectors": VECTORS, "model_id": np.array(MODEL_ID), **packed, **changes}


@pytest.mark.parametrize("labels", [None, ("cat", "café", "dog")])
@pytest.mark.parametrize("name", ["deep/er/train.npz", "no-suffix"])
def test_embeddings_come_back_as_they_were_saved(tmp_path: Path, labels: tuple[str, ...] | None, name: str) -> None:
    saved = make(labels)
    saved.save(tmp_path / name)
    loaded = Embeddings.load(str(tmp_path / name))
    np.testing.assert_array_equal(loaded.vectors, saved.vectors)
    assert loaded.vectors.dtype == np.float32
    assert (loaded.model_id, loaded.ids, loaded.labels) == (MODEL_ID, IDS, labels)
    assert len(loaded) == 3
    assert [file.name for file in (tmp_path / name).parent.iterdir()] == [Path(name).name]


@pytest.mark.parametrize(("labels", "words"), [(None, "no labels"), (("cat", "café", "cat"), "labels of 2 classes")])
def test_shown_they_take_one_line(labels: tuple[str, ...] | None, words: str) -> None:
    assert repr(make(labels)) == f"<Embeddings: 3 vectors of 5 numbers, model_id='{MODEL_ID}', {words}>"


def test_they_are_equal_to_themselves_alone_and_can_be_keys() -> None:
    one, other = make(), make()
    assert one == one
    assert one != other
    assert {one: 1}[one] == 1


@pytest.mark.parametrize(
    ("which", "places"),
    [
        (slice(2), [0, 1]),
        (slice(None, None, -1), [2, 1, 0]),
        (np.array([True, False, True]), [0, 2]),
        ([False, False, True], [2]),
        (np.array([2, 0, 2]), [2, 0, 2]),
        ([-1], [2]),
        ([], []),
        ((2, 0), [2, 0]),
        ((True, False, True), [0, 2]),
    ],
)
@pytest.mark.parametrize("labels", [None, ("cat", "café", "dog")])
def test_a_part_keeps_vectors_ids_and_labels_together(
    which: Any, places: list[int], labels: tuple[str, ...] | None
) -> None:
    part = make(labels)[which]
    np.testing.assert_array_equal(part.vectors, VECTORS[places])
    assert part.ids == tuple(IDS[place] for place in places)
    assert part.labels == (None if labels is None else tuple(labels[place] for place in places))
    assert part.model_id == MODEL_ID


@pytest.mark.parametrize("which", [[3], [0.5], np.array([True, False]), (0, 3)], ids=repr)
def test_a_part_that_is_not_there_is_refused(which: Any) -> None:
    with pytest.raises(DataError, match="of 3 embeddings, take a slice, a mask of 3, or places below 3"):
        make()[which]


@pytest.mark.parametrize("which", [1, np.int64(1), None, [[0, 1]]], ids=repr)
def test_one_place_is_no_part(which: Any) -> None:
    with pytest.raises(TypeError, match=r"for one vector use `.vectors\[place\]`"):
        make()[which]
    with pytest.raises(TypeError, match="for one vector"):
        list(make())  # type: ignore[call-overload]


@pytest.mark.parametrize("dtype", [None, np.float64])
def test_as_an_array_they_are_their_vectors(dtype: type | None) -> None:
    made = make()
    np.testing.assert_array_equal(np.asarray(made, dtype), VECTORS)
    assert np.asarray(made, dtype).dtype == (dtype or np.float32)
    assert np.asarray(made) is made.vectors
    assert not np.shares_memory(np.array(made, dtype), made.vectors)
    assert KNeighborsClassifier(1).fit(made, made.labels).predict(made).tolist() == list(made.labels or ())


def test_scikit_learn_takes_their_rows_with_their_ids() -> None:
    assert make().shape == VECTORS.shape
    train, test = train_test_split(make(), random_state=0, test_size=1)
    assert {*train.ids, *test.ids} == set(IDS)
    assert (len(train), len(test)) == (2, 1)


@pytest.mark.parametrize("labels", [None, ("cat", "café", "dog")])
def test_parts_are_joined_in_their_order(labels: tuple[str, ...] | None) -> None:
    whole = make(labels)
    joined = Embeddings.concatenate(whole[places] for places in ([2], [0, 1], [], [2]))
    np.testing.assert_array_equal(joined.vectors, VECTORS[[2, 0, 1, 2]])
    assert (joined.model_id, joined.ids) == (MODEL_ID, (IDS[2], *IDS))
    assert joined.labels == (None if labels is None else (labels[2], *labels))


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ([], "give a list of one or more embeddings"),
        (make(), "give a list of one or more embeddings"),
        ([make(), "test.npz"], "part 1 is of type str: give embeddings"),
        ([make(), make(None)], "part 0 has labels, part 1 has none: give it labels"),
        ([make(None), make()], "part 1 has labels, part 0 has none: give it labels"),
    ],
)
def test_what_cannot_be_joined_is_refused(parts: Any, told: str) -> None:
    with pytest.raises(DataError, match=told):
        Embeddings.concatenate(parts)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (Embeddings(VECTORS, "f" * 16, IDS), r"ffffffffffffffff \(5\)"),
        (Embeddings(VECTORS[:, :4], MODEL_ID, IDS), rf"{MODEL_ID} \(4\)"),
    ],
    ids=["model", "length"],
)
def test_vectors_of_two_models_are_never_joined(other: Embeddings, told: str) -> None:
    with pytest.raises(SpaceError, match=rf"part 0 holds vectors of model {MODEL_ID} \(5 numbers\), part 2 of {told}"):
        Embeddings.concatenate([make(None), make(None), other])


def test_no_images_are_embeddings_too(tmp_path: Path) -> None:
    Embeddings(np.zeros((0, 5), np.float32), MODEL_ID, ()).save(tmp_path / "e.npz")
    loaded = Embeddings.load(tmp_path / "e.npz")
    assert (loaded.vectors.shape, loaded.ids, len(loaded)) == ((0, 5), (), 0)


def test_saving_replaces_an_older_file_at_once(tmp_path: Path) -> None:
    make().save(tmp_path / "e.npz")
    Embeddings(VECTORS[:1], MODEL_ID, IDS[:1]).save(tmp_path / "e.npz")
    assert len(Embeddings.load(tmp_path / "e.npz")) == 1


def test_a_saved_file_holds_no_pickle(tmp_path: Path) -> None:
    make().save(tmp_path / "e.npz")
    with np.load(tmp_path / "e.npz", allow_pickle=False) as stored:
        kinds = {name: stored[name].dtype.str[1:] for name in stored}
    text = {"ids": "u1", "ids_ends": "i8", "labels": "u1", "labels_ends": "i8"}
    assert kinds == {"vectors": "f4", "model_id": "U16", **text}


@pytest.mark.parametrize("labels", [None, ("cat", "café", "dog")])
def test_files_of_earlier_versions_are_read(tmp_path: Path, labels: tuple[str, ...] | None) -> None:
    texts: dict[str, Any] = {"ids": np.array(IDS), **({} if labels is None else {"labels": np.array(labels)})}
    np.savez(tmp_path / "e.npz", vectors=VECTORS, model_id=np.array(MODEL_ID), **texts)
    loaded = Embeddings.load(tmp_path / "e.npz")
    assert (loaded.ids, loaded.labels) == (IDS, labels)
    assert is_embeddings(str(tmp_path / "e.npz"))


@pytest.mark.parametrize(
    "names",
    [("", "a", ""), ("caf\udce9.png", "\ud83d", "\ude00"), ("a\0", "\0", "😀" * 300)],
    ids=["empty", "surrogates", "nulls"],
)
def test_names_of_any_characters_come_back(tmp_path: Path, names: tuple[str, ...]) -> None:
    Embeddings(VECTORS, MODEL_ID, names, names).save(tmp_path / "e.npz")
    loaded = Embeddings.load(tmp_path / "e.npz")
    assert (loaded.ids, loaded.labels) == (names, names)
    assert is_embeddings(str(tmp_path / "e.npz"))


@pytest.mark.parametrize(("place", "value"), [(6, 100), (9, 8)], ids=["version", "encoding"])
def test_a_damaged_archive_is_no_file_of_embeddings_but_one_that_its_reader_names(
    tmp_path: Path, place: int, value: int
) -> None:
    np.savez(tmp_path / "d.npz", café=np.zeros((32, 32, 3), np.uint8))
    data = bytearray((tmp_path / "d.npz").read_bytes())
    entry = data.rfind(b"PK\x01\x02")
    data[entry + place] = value
    data[data.rfind("\u00e9".encode())] = 255
    (tmp_path / "d.npz").write_bytes(data)
    assert not is_embeddings(str(tmp_path / "d.npz"))


def test_one_long_name_among_many_takes_its_own_room_alone(tmp_path: Path) -> None:
    ids = ("long/" * 400, *map(str, range(9_999)))
    Embeddings(np.zeros((10_000, 1), np.float32), MODEL_ID, ids, ids).save(tmp_path / "e.npz")
    assert (tmp_path / "e.npz").stat().st_size < 500_000


@pytest.mark.parametrize(
    ("vectors", "ids", "labels"),
    [
        (VECTORS, IDS[:2], None),
        (VECTORS, IDS, ("cat", "dog")),
        (VECTORS, (), None),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(
    vectors: Any, ids: tuple[str, ...], labels: tuple[str, ...] | None
) -> None:
    with pytest.raises(DataError, match=r"do not fit together: vectors \["):
        Embeddings(vectors, MODEL_ID, ids, labels)


@pytest.mark.parametrize("vectors", [VECTORS[0], VECTORS[None], np.zeros((), np.float32), VECTORS.astype(int)])
def test_vectors_are_rows_of_floats(vectors: Any) -> None:
    with pytest.raises(DataError, match=r"vectors \[.*\] of (float|int)\d+: give floats \[N, D\]"):
        Embeddings(vectors, MODEL_ID, IDS)
    with pytest.raises(DataError, match="ids = None: give one for each vector"):
        Embeddings(VECTORS, MODEL_ID, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [list, np.array, lambda names: pd.Series(names, index=[7, 8, 0])])
def test_ids_and_labels_of_any_kind_are_taken_by_position(kind: Callable[[Any], Any]) -> None:
    found = Embeddings(VECTORS, MODEL_ID, kind(IDS), kind(("cat", "café", "dog")))
    assert (found.ids, found.labels) == (IDS, ("cat", "café", "dog"))
    assert (found[[0, 2]].ids, found[[0, 2]].labels) == ((IDS[0], IDS[2]), ("cat", "dog"))
    assert dataclasses.replace(found, labels=kind(("a", "b", "a"))).labels == ("a", "b", "a")


def test_vectors_and_ids_of_other_kinds_become_plain_ones(tmp_path: Path) -> None:
    for vectors in ([[1.0, 2.0]] * 3, np.ones((3, 2), np.float64), torch.ones(3, 2, dtype=torch.float16)):
        found = Embeddings(vectors, MODEL_ID, (Path("a/b.png"), np.int64(7), "c"))
        assert found.vectors.dtype == np.float32
        assert found.ids == ("a/b.png", "7", "c")
        found.save(tmp_path / "e.npz")
        np.testing.assert_array_equal(Embeddings.load(tmp_path / "e.npz").vectors, found.vectors)


@pytest.mark.parametrize(
    ("model_id", "ids", "labels", "told"),
    [
        (None, IDS, None, r"model_id = None: give the text"),
        (7, IDS, None, r"model_id = 7: give the text"),
        (MODEL_ID, "abc", None, r"ids = 'abc': give one for each vector"),
        (MODEL_ID, IDS, "abc", r"labels = 'abc': give one for each vector"),
        (MODEL_ID, (None, *IDS[1:]), None, r"id None: an id is the name of an image"),
    ],
)
def test_what_names_neither_model_nor_images_is_refused(model_id: Any, ids: Any, labels: Any, told: str) -> None:
    with pytest.raises(DataError, match=told):
        Embeddings(VECTORS, model_id, ids, labels)


@pytest.mark.parametrize(
    "vectors", [[[1.0], [1.0, 2.0], [3.0]], torch.ones(3, 2, device="meta")], ids=["ragged", "meta"]
)
def test_vectors_that_are_no_array_are_refused(vectors: Any) -> None:
    with pytest.raises(DataError, match=r"vectors of type (list|Tensor): give floats \[N, D\]"):
        Embeddings(vectors, MODEL_ID, IDS)


def test_a_file_that_inflates_beyond_all_measure_is_refused_before_it_does(tmp_path: Path) -> None:
    file = tmp_path / "e.npz"
    np.savez_compressed(
        file, vectors=np.zeros((1 << 20, 8), np.float32), model_id=np.array(MODEL_ID), ids=np.array(IDS)
    )
    assert is_embeddings(str(file))
    with pytest.raises(
        DataError, match=r"e.npz is not a file of embeddings: its .* bytes inflate to 33,5.*, over 100 times"
    ):
        Embeddings.load(file)


@pytest.mark.parametrize("label", [None, b"cat", datetime.date(2026, 1, 1), 1], ids=repr)
def test_labels_that_are_not_text_are_refused(label: Any) -> None:
    with pytest.raises(DataError, match=r"labels\[1\] = .*: a label is the name of a class"):
        make(("cat", label, "dog"))


@pytest.mark.parametrize(
    "command",
    [["embed", "images", "--bundle", "no-bundle"], ["probe", "fit", "no-embeddings.npz"]],
    ids=["embed", "probe fit"],
)
def test_a_file_that_cannot_be_written_is_told_before_the_work(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file" / "out"):
        with pytest.raises(ConfigError, match=r"--out|name another place"):
            CliRunner().invoke(app, [*command, "--out", str(out)], catch_exceptions=False)
    with pytest.raises(InputError, match="no-"):
        CliRunner().invoke(app, [*command, "--out", str(tmp_path / "new" / "out")], catch_exceptions=False)
    assert list((tmp_path / "new").iterdir()) == []


def test_embeddings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().model_id = "other"  # type: ignore[misc]


def test_a_missing_file_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"e\.npz does not exist: make it with `jepakit embed"):
        Embeddings.load(tmp_path / "e.npz")


@pytest.mark.parametrize(
    "data",
    [b"", b"garbage", b"PK\x03\x04", pickle.dumps({"vectors": [1]}), b"\x93NUMPY\x01\x00"],
    ids=lambda data: repr(data[:6]),
)
def test_a_file_of_something_else_is_refused_by_name(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "e.npz").write_bytes(data)
    with pytest.raises(DataError, match=r"e\.npz is not a file of embeddings"):
        Embeddings.load(tmp_path / "e.npz")


def test_a_folder_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a file of embeddings"):
        Embeddings.load(tmp_path)


def test_a_single_array_is_refused_by_name(tmp_path: Path) -> None:
    np.save(tmp_path / "e.npy", VECTORS)
    with pytest.raises(DataError, match=r"e\.npy is not a file of embeddings"):
        Embeddings.load(tmp_path / "e.npy")


@pytest.mark.parametrize(
    "changes",
    [
        {"vectors": VECTORS.astype(object)},
        {"ids": np.array([{"a": 1}] * 3, dtype=object)},
        {"labels": np.array([None] * 3, dtype=object), "labels_ends": np.arange(1, 4)},
        {"vectors": np.array([["a", "b"]] * 3)},
        {"vectors": np.float32(1)},
        {"vectors": VECTORS[0]},
        {"ids": np.array(1)},
        {"ids": np.zeros(2, np.uint8), "ids_ends": np.array([1, 2])},
        *(
            {"ids": np.zeros(9, np.uint8), "ids_ends": np.array(ends)}
            for ends in ([1, 2], [4, 2, 9], [1, 2, 3], [1.0, 2, 9])
        ),
        {"ids": np.full(9, 0xFF, np.uint8), "ids_ends": np.array([3, 6, 9])},
        {"ids": np.array(IDS)},
    ],
    ids=[
        "object vectors",
        "object ids",
        "object labels",
        "text",
        "one number",
        "one vector",
        "one id",
        "too few ids",
        "too few ends",
        "ends that go back",
        "ends before the end",
        "ends of no whole number",
        "no UTF-8",
        "ends of text",
    ],
)
def test_arrays_that_are_no_embeddings_are_refused_by_name(tmp_path: Path, changes: dict[str, Any]) -> None:
    np.savez(tmp_path / "e.npz", **arrays(**changes))
    with pytest.raises(DataError, match=r"e\.npz is not a file of embeddings"):
        Embeddings.load(tmp_path / "e.npz")


def test_ids_do_not_take_embeddings() -> None:
    for which in ([IDS[0]], IDS[0], np.array(IDS), pd.Index(IDS), pd.Series(IDS)):
        with pytest.raises(DataError, match="by place, not by id: give a mask"):
            make()[which]  # type: ignore[index]


def test_a_pickle_in_the_file_is_never_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "sprung",)

    np.savez(tmp_path / "e.npz", **arrays(ids=np.array([Trap()] * 3, dtype=object)))
    with pytest.raises(DataError):
        Embeddings.load(tmp_path / "e.npz")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("missing", ["vectors", "model_id", "ids"])
def test_a_missing_part_is_refused_by_name(tmp_path: Path, missing: str) -> None:
    np.savez(tmp_path / "e.npz", **{name: value for name, value in arrays().items() if name != missing})
    with pytest.raises(DataError, match=missing):
        Embeddings.load(tmp_path / "e.npz")


def test_a_damaged_file_is_refused_and_never_another_error(tmp_path: Path) -> None:
    make().save(tmp_path / "e.npz")
    whole = (tmp_path / "e.npz").read_bytes()
    for position in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[position] ^= 0x55
        (tmp_path / "e.npz").write_bytes(damaged)
        try:
            loaded = Embeddings.load(tmp_path / "e.npz")
        except DataError:
            continue
        np.testing.assert_array_equal(loaded.vectors, VECTORS)
        assert loaded.ids == IDS


def test_a_place_that_cannot_be_written_is_named_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file" / "e.npz", tmp_path):
        with pytest.raises(WriteError, match=rf"^{place} cannot be written \("):
            make().save(place)
        with pytest.raises(WriteError, match=rf"^{place} cannot be written \("):
            jepakit.KNNProbe().fit(VECTORS, ["a", "b", "b"]).save(place)
    with pytest.raises(ConfigError, match="path = None: give a path"):
        make().save(None)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_path_is_no_embeddings() -> None:
    with pytest.raises(DataError, match=r"'train.npz' is a path: give Embeddings.load\('train.npz'\)"):
        jepakit.LinearProbe().fit("train.npz")
