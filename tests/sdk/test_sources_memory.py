"""Images in memory: sequences and datasets are indexed late, labels come with them, and the digest knows them."""

from __future__ import annotations

import io
import pickle
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from PIL import Image
from tests.files import encoded
from torch.utils.data import Subset, random_split
from torchvision.datasets import FakeData

from jepakit.errors import DataError, ImageError
from jepakit.readers import open_raster
from jepakit.sources import gather, list_images
from jepakit_training.data.scan import scan


def array(seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (9, 10, 3), dtype=np.uint8)


def png(seed: int = 0) -> bytes:
    return encoded(Image.fromarray(array(seed)), "PNG")


class Dataset:
    """(image, label) by number, as torchvision's datasets give them; `asked` remembers which were decoded."""

    def __init__(self, labels: list[Any], *, broken: int | None = None) -> None:
        self.labels_by_place, self.broken = labels, broken
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.labels_by_place)

    def __getitem__(self, place: int) -> tuple[Any, Any]:
        self.asked.append(place)
        if place == self.broken:
            raise OSError("image file is truncated")
        return Image.fromarray(array(place)), self.labels_by_place[place]


class Described(Dataset):
    def __init__(self, targets: Any, classes: Any) -> None:
        super().__init__(list(range(len(targets))))
        self.targets, self.classes = targets, classes


def test_a_sequence_of_every_kind_of_image_is_listed_without_decoding() -> None:
    images = [array(), Image.fromarray(array()), png(), bytearray(png()), memoryview(png())]
    listed = list_images(images)
    assert listed.ids == ("0", "1", "2", "3", "4")
    assert listed.in_memory
    assert (listed.labels, listed.groups, listed.held_out, listed.strata()) == (None, None, None, ("",) * 5)
    assert listed[0].data is images[0]
    assert listed[1].data is images[1]
    assert [ref.data for ref in listed][2:] == [png()] * 3


def test_files_are_not_in_memory(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(png())
    assert not list_images(tmp_path).in_memory
    assert not list_images([tmp_path / "1.png"]).in_memory


def test_a_stack_and_a_generator_are_listed() -> None:
    stack = np.stack([array(0), array(1)])
    listed = list_images(stack)
    np.testing.assert_array_equal(listed[1].data, array(1))
    assert len(list_images(array(place) for place in range(3))) == 3


def test_a_column_of_a_table_keeps_its_own_order(tmp_path: Path) -> None:
    """A pandas Series numbers its rows by their names: `series[0]` is the row that was first before a shuffle."""
    paths = [str(tmp_path / f"{place}.png") for place in range(3)]
    for path in paths:
        Path(path).write_bytes(png())
    shuffled = pd.Series(paths)[[2, 0, 1]]
    assert gather(shuffled).ids == (paths[2], paths[0], paths[1])
    assert gather(shuffled[1:]).ids == (paths[0], paths[1])
    images = pd.Series([array(0), array(1)])[::-1]
    np.testing.assert_array_equal(gather(images)[0].data, array(1))
    with pytest.raises(DataError, match=r"images of type DataFrame: give its column of paths, or zip\(frame\['path'\]"):
        gather(shuffled.to_frame())


@pytest.mark.parametrize("kind", [np.array, pd.Index, lambda paths: pd.Series(paths).array, pd.Series, tuple])
def test_paths_in_any_kind_of_array_keep_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Callable[[list[str]], Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).write_bytes(png())
    paths = ["./a.png", f"{tmp_path}//b.png", "~/c.png"]
    listed = gather(kind(paths))
    assert listed.ids == tuple(paths)
    assert not listed.in_memory
    assert all(isinstance(ref.data, Path) and ref.data.is_file() for ref in listed)
    with pytest.raises(DataError, match=r"the list names ~/c\.png more than once"):
        list_images(kind([f"{tmp_path}/c.png", *paths]))


def test_files_of_a_list_that_are_gone_are_left_out_where_some_may_be(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    files = [str(tmp_path / "a.png"), str(tmp_path / "gone.png")]
    for listed in (files, [(file, "cat") for file in files]):
        with pytest.raises(DataError, match=r"gone\.png does not exist \(1 of 2 files are missing\)"):
            gather(listed)
        found = gather(listed, most_skipped=0.5)
        assert found.ids == tuple(files)
        with pytest.raises(ImageError, match=r"gone\.png: cannot be read \(No such file"):
            open_raster(found[1].data)


def test_what_has_a_length_and_no_first_item_is_told() -> None:
    class Named(list[Any]):
        def __getitem__(self, place: Any) -> Any:
            raise KeyError(place)

    with pytest.raises(DataError, match=r"the Named has no item 0 \(KeyError: 0\): give a list"):
        gather(Named([array(0)]))


def test_a_callers_dataset_is_asked_by_one_thread_at_a_time() -> None:
    class Unsafe(Dataset):
        inside = 0

        def __getitem__(self, place: int) -> Any:
            assert self.inside == 0, "two threads at once"
            self.inside += 1
            time.sleep(0.002)
            self.inside -= 1
            return super().__getitem__(place)

    listed = list_images(Unsafe([0, 1] * 10), "none")
    assert not scan(listed, progress=False).unreadable
    assert len(list_images(Unsafe([0, 1] * 10), "none", tile=8)) >= 20


def test_a_dataset_is_indexed_only_when_an_image_is_asked_for() -> None:
    dataset = Dataset([0, 1] * 5)
    listed = list_images(dataset, "none")
    assert dataset.asked == [0], "the first item tells what kind of dataset it is"
    assert listed.labels is None
    np.testing.assert_array_equal(np.asarray(listed[7].data), array(7))
    assert dataset.asked == [0, 7]


def test_targets_and_classes_label_a_dataset_without_decoding_it() -> None:
    for targets in ([1, 0, 1], np.array([1, 0, 1]), torch.tensor([1, 0, 1])):
        dataset = Described(targets, ["cat", "dog"])
        listed = list_images(dataset)
        assert listed.labels == ("dog", "cat", "dog")
        assert dataset.asked == [0]
        assert listed.note == "labels: 2 classes from the Described"


def test_names_of_classes_may_be_an_array() -> None:
    assert list_images(Described([1, 0], np.array(["cat", "dog"]))).labels == ("dog", "cat")


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_a_subset_has_the_labels_of_its_dataset_without_decoding_it(kind: Callable[[list[int]], Any]) -> None:
    dataset: Any = Described(kind([1, 0, 1, 2]), ["cat", "dog", "elk"])
    places: Any = np.array([3, 0, 1])
    part = Subset(dataset, places)
    assert list_images(part).labels == ("elk", "dog", "cat")
    assert dataset.asked == [3]
    assert list_images(Subset(part, [2, 0])).labels == ("cat", "elk")
    assert dataset.asked == [3, 1]
    for each in random_split(dataset, [2, 2]):
        assert set(list_images(each).labels or ()) <= {"cat", "dog", "elk"}


def test_a_subset_that_gives_other_labels_keeps_them() -> None:
    class Renamed(Subset[Any]):
        def __getitem__(self, place: int) -> Any:
            return self.dataset[self.indices[place]][0], "all"

        def __getitems__(self, places: list[int]) -> Any:
            return [self[place] for place in places]

    dataset: Any = Described([1, 0], ["cat", "dog"])
    assert list_images(Renamed(dataset, [0, 1])).labels == ("all", "all")
    dataset.target_transform = str
    assert list_images(Subset(dataset, [1, 0])).labels == ("1", "0"), "those of its items"
    plain: Any = Dataset([5, 6])
    assert list_images(Subset(plain, [1])).labels == ("6",)


@pytest.mark.parametrize(
    ("made_of", "expected"),
    [({0: "other", 1: "tumour", 2: "tumour"}, ("other", "tumour", "tumour")), ({0: 0, 1: 1, 2: 1}, ("0", "1", "1"))],
    ids=["names", "numbers, which the dataset's classes do not name"],
)
def test_labels_of_a_dataset_that_transforms_its_targets_are_those_of_its_items(
    made_of: dict[int, Any], expected: tuple[str, ...]
) -> None:
    class Transformed(Described):
        target_transform = staticmethod(made_of.get)

        def __getitem__(self, place: int) -> tuple[Any, Any]:
            image, _ = super().__getitem__(place)
            return image, self.target_transform(self.targets[place])

    assert list_images(Transformed([0, 2, 1], ["fat", "stroma", "core"])).labels == expected


@pytest.mark.parametrize(
    ("labels", "expected"),
    [([3, 4, 3], ("3", "4", "3")), (["a", np.str_("b"), "a"], ("a", "b", "a")), ([np.int64(1), torch.tensor(2), 3], ("1", "2", "3"))],
)  # fmt: skip
def test_labels_without_targets_are_read_by_going_through_once(labels: list[Any], expected: tuple[str, ...]) -> None:
    assert list_images(Dataset(labels)).labels == expected
    assert list_images([(array(), label) for label in labels]).labels == expected
    assert gather(Dataset(labels)).labels == expected


def test_targets_that_are_no_classes_give_no_labels_and_decode_nothing() -> None:
    dataset = Dataset([{"boxes": []}, {"boxes": []}])
    listed = list_images(dataset)
    assert listed.labels is None
    assert "targets of type dict are no classes" in listed.note
    assert dataset.asked == [0]


@pytest.mark.parametrize(
    "missing", [None, "", float("nan"), np.float32("nan"), pd.NA], ids=["None", "empty", "NaN", "float32", "NA"]
)
@pytest.mark.parametrize("place", [0, 2])
def test_an_image_without_a_label_costs_the_others_none(missing: Any, place: int) -> None:
    targets: list[Any] = ["cat", "dog", "cat"]
    targets[place] = missing
    listed = list_images(list(zip([array()] * 3, targets, strict=True)))
    assert listed.labels == tuple(None if target is missing else target for target in targets)
    assert "2 of 3 images are labelled" in listed.note
    masked = np.ma.masked_array([1, 0, 2], [False, True, False])
    assert list_images(list(zip([array()] * 3, masked, strict=True))).labels == ("1", None, "2")
    numbers = pd.Series([1, None, 2])  # whole numbers become floats where one is missing
    assert list_images(list(zip([array()] * 3, numbers, strict=True))).labels == ("1", None, "2")
    assert "the list gives no target" in list_images([(array(), missing)] * 3).note
    assert "targets of type ndarray are no classes" in list_images([(array(), "cat"), (array(), np.eye(3))]).note


def test_files_with_labels_in_a_list_are_files_of_that_name(tmp_path: Path) -> None:
    for name in "abc":
        Image.fromarray(array()).save(tmp_path / f"{name}.png")
    pairs = [(tmp_path / f"{name}.png", label) for name, label in zip("abc", [0, None, 1], strict=True)]
    listed = list_images(pairs)
    assert listed.ids == tuple(path.as_posix() for path, _ in pairs)
    assert listed.labels == ("0", None, "1")
    assert not listed.store.in_memory
    assert gather(pairs, "none").labels is None
    with pytest.raises(DataError, match=r"a\.png more than once: give each image once"):
        list_images([*pairs, (f"{tmp_path}/./a.png", 1)])
    with pytest.raises(DataError, match=r"b\.png does not exist"):
        list_images([(tmp_path / "a.png", 0), (tmp_path / "nowhere" / "b.png", 1)])
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "a.png", "a.png")
    with pytest.raises(DataError, match=r"a\.tar is an archive, and has a label beside it"):
        list_images([(tmp_path / "a.tar", 0)])


def test_a_torchvision_dataset_is_taken_as_it_is() -> None:
    listed = list_images(FakeData(size=6, image_size=(3, 16, 16), num_classes=3))
    assert len(listed) == len(listed.labels or ()) == 6
    assert isinstance(listed[5].data, Image.Image)


def test_rows_by_name_are_refused_with_the_way_out() -> None:
    rows: dict[str, Any] = {
        "id": [7, 8],
        "picture": [Image.fromarray(array(place)) for place in range(2)],
        "label": [1, 0],
    }

    class Rows:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, which: Any) -> Any:
            return rows[which] if isinstance(which, str) else {name: column[which] for name, column in rows.items()}

    data = Rows()
    with pytest.raises(
        DataError, match=r"dict \('id', 'picture', 'label'\): give .* zip\(data\['picture'\], data\['la"
    ):
        list_images(data)
    assert list_images(zip(data["picture"], data["label"], strict=True)).labels == ("1", "0")
    with pytest.raises(DataError, match=r"dict \('image'\): give its columns, such as zip\(data\['image'\]"):
        list_images([{"image": {"bytes": png()}}])


def test_a_column_of_arrow_is_a_list(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{place}.png") for place in range(2)]
    for path in paths:
        Path(path).write_bytes(png())
    for column in (pa.array(paths), pa.chunked_array([paths[:1], paths[1:]])):
        assert gather(column).ids == tuple(paths)
    assert gather(pa.array([png(0), png(1)]))[1].data == png(1)


def test_tensors_are_refused_with_the_way_out() -> None:
    with pytest.raises(DataError, match="of type Tensor: leave ToTensor out of its transform"):
        list_images([torch.zeros(3, 9, 9)])


def test_an_item_that_fails_or_is_no_image_is_an_image_error_with_its_place() -> None:
    listed = list_images(Dataset([0, 1, 2], broken=1), "none")
    with pytest.raises(
        ImageError, match=r"image 1 cannot be read from the Dataset \(OSError: image file is truncated\)"
    ):
        listed[1]
    with pytest.raises(ImageError, match="image 1 is of type int: give an array"):
        list_images([array(), 7])[1]
    assert listed.digest()


def test_paths_among_images_keep_their_names(tmp_path: Path) -> None:
    listed = gather([array(), f"{tmp_path}/x.png"])
    assert listed.ids == ("0", f"{tmp_path}/x.png")
    assert listed[1].data == tmp_path / "x.png"


@pytest.mark.parametrize("wrong", [7, None, {"a.png": array()}, {"a.png"}, np.zeros(5)], ids=repr)
def test_what_is_no_source_is_refused_with_what_would_be(wrong: Any) -> None:
    for take in (list_images, gather):
        with pytest.raises(
            DataError, match=rf"images of type {type(wrong).__name__}: give a folder of images.*, a list of image files"
        ):
            take(wrong)


def test_an_open_file_is_no_list_of_lines(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    with (tmp_path / "a.png").open("rb") as file:
        for opened in (file, io.BytesIO(png())):
            for take in (list_images, gather):
                with pytest.raises(DataError, match=r"give an open file's path, or its bytes \(\.read\(\)\)"):
                    take(opened)


@pytest.mark.parametrize(
    ("wrong", "told"), [("", "images = '': give a folder"), ("A" * 400, "images = 'A{200}': File name too long; give")]
)
def test_a_text_that_can_be_no_path_is_refused(wrong: str, told: str) -> None:
    for take in (list_images, gather):
        with pytest.raises(DataError, match=told):
            take(wrong)


def test_a_stack_of_grey_images_is_told_which_shape_is_wanted() -> None:
    with pytest.raises(DataError, match=r"ndarray, \[5, 9, 9\]: give \[N, H, W, C\] .*or a list of arrays"):
        list_images(np.zeros((5, 9, 9), np.uint8))


def test_one_image_is_no_list_but_can_be_gathered() -> None:
    for image in (array(), Image.fromarray(array()), png()):
        with pytest.raises(DataError, match="images of type"):
            list_images(image)
        assert gather(image)[0].data is image


def test_groups_by_folder_make_no_sense_in_memory() -> None:
    with pytest.raises(DataError, match="are in no folders"):
        list_images([array()], group="folder")


def test_the_digest_knows_count_and_content() -> None:
    same = [list_images(images).digest() for images in ([array(0), array(1)], np.stack([array(0), array(1)]))]
    assert same[0] == same[1]
    others = [[array(0)], [array(0), array(2)], [png(0), png(1)], [array(1), array(0)], [array(0), array(1)[:, ::-1]]]
    assert len({same[0], *(list_images(images).digest() for images in others)}) == 1 + len(others)


def test_the_digest_samples_a_long_dataset() -> None:
    dataset = Dataset(list(range(3000)))
    list_images(dataset, "none").digest()
    assert len(dataset.asked) == 257


def test_a_list_in_memory_can_be_pickled() -> None:
    listed = list_images([array(0), png(1)])
    again = pickle.loads(pickle.dumps(listed))
    assert again.digest() == listed.digest()


def test_a_target_below_zero_is_not_named_by_the_last_class() -> None:
    assert list_images(Described([-1, 0, 1], ["cat", "dog"])).labels == ("-1", "cat", "dog")


def test_targets_of_another_number_than_the_images_are_not_believed() -> None:
    class Half(Described):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, place: int) -> tuple[Any, Any]:
            return array(place), self.targets[place + 2]

    assert list_images(Half([0, 0, 1, 1], ["cat", "dog"])).labels == ("dog", "dog")
