"""Which images a folder, glob or list stands for, in which order, with which labels."""

from __future__ import annotations

import io
import os
import re
import tarfile
import threading
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.files import encoded, touch

from jepakit._messages import counted
from jepakit.embeddings import Embeddings
from jepakit.errors import DataError, InputError
from jepakit.readers import open_raster
from jepakit.sources import ImageList, files, gather, list_images
from jepakit.sources.files import SUFFIXES
from jepakit.sources.labels import MAX_CLASSES, MIN_IMAGES_PER_CLASS
from jepakit.sources.store import SAMPLE_BYTES


def classes(root: Path, counts: dict[str, int]) -> Path:
    return touch(root, *(f"{name}/{i:03}.png" for name, count in counts.items() for i in range(count)))


def paths(images: ImageList) -> list[Any]:
    return [ref.data for ref in images]


def png(size: int = 10) -> bytes:
    return encoded(Image.new("RGB", (size, size), "red"), "PNG")


# Folders, globs, lists


def test_a_folder_is_read_recursively_in_the_order_of_its_names(tmp_path: Path) -> None:
    touch(tmp_path, "b/2.png", "b/10.png", "a.png", "b/c/d/1.jpg", "A.PNG")
    listed = list_images(tmp_path)
    assert listed.ids == ("A.PNG", "a.png", "b/10.png", "b/2.png", "b/c/d/1.jpg")
    assert paths(listed) == [tmp_path / name for name in listed.ids]
    assert [ref.name for ref in listed] == list(listed.ids)
    assert len(listed) == 5


def test_a_tilde_is_the_home_folder_in_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    touch(tmp_path, "scans/a.png", "scans/b.png")
    (tmp_path / "table.csv").write_text("path,label\nscans/a.png,cat\nscans/b.png,dog\n")
    (tmp_path / "labels.csv").write_text("path,label\na.png,cat\nb.png,dog\n")
    files = [tmp_path / "scans/a.png", tmp_path / "scans/b.png"]
    for source in (
        "~/scans",
        Path("~/scans"),
        "~/scans/*.png",
        ["~/scans/a.png", Path("~/scans/b.png")],
        "~/table.csv",
    ):
        assert paths(list_images(source)) == files
    assert list_images("~/scans", "~/labels.csv").labels == ("cat", "dog")
    assert gather([np.zeros((9, 9), np.uint8), "~/scans/a.png"])[1].data == files[0]


@pytest.mark.parametrize("as_given", [str, Path])
def test_a_folder_can_be_text_or_a_path(tmp_path: Path, as_given: type[Any]) -> None:
    assert list_images(as_given(touch(tmp_path, "a.png"))).ids == ("a.png",)


def test_only_images_are_listed_whatever_the_case_of_their_suffix(tmp_path: Path) -> None:
    images = (
        "a.JPG",
        "b.jpeg",
        "c.Png",
        "d.webp",
        "e.BMP",
        "f.tif",
        "g.TIFF",
        "h.dcm",
        "i.npy",
        "j.NPZ",
        "k.svs",
        "l.ndpi",
        "m.scn",
        "n.jpe",
        "o.jfif",
        "p.dicom",
        "q.ima",
    )
    touch(tmp_path, *images, "notes.txt", "png", "m.gif", "n.png.txt", "labels.csv")
    assert list_images(tmp_path, group="none").ids == images
    assert {Path(name).suffix.lower() for name in images} == SUFFIXES


def test_what_is_no_file_is_passed_over(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert list_images(tmp_path).ids == ("a.png",)
    assert list_images(f"{tmp_path}/*.png").ids == (f"{tmp_path}/a.png",)


def test_hidden_files_and_folders_are_passed_over(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", ".b.png", ".cache/c.png", "d/.e.png", "d/._f.jpg", "d/g.png")
    assert list_images(tmp_path).ids == ("a.png", "d/g.png")
    assert [Path(name).name for name in list_images(f"{tmp_path}/**/*.png").ids] == ["a.png", "g.png"]


def test_bundles_among_the_images_are_passed_over_and_other_manifests_are_not(tmp_path: Path) -> None:
    classes(tmp_path, {"cat": 10, "dog": 10})
    touch(tmp_path, "cat/manifest.json")
    before = list_images(tmp_path)
    touch(tmp_path, *(f"bundles/a/{name}" for name in ("manifest.json", "weights.safetensors", "golden.npz")))
    after = list_images(tmp_path)
    assert (after.ids, after.labels, after.digest()) == (before.ids, before.labels, before.digest())
    assert len(set(after.labels or ())) == 2


def test_runs_and_the_cache_among_the_images_are_passed_over_and_a_file_of_settings_hides_nothing(
    tmp_path: Path,
) -> None:
    classes(tmp_path, {"cat": 10, "dog": 10})
    touch(tmp_path, "config.toml", "cat/config.toml", "cat/environment.json")
    everywhere = f"{tmp_path}/**/*"
    before, matching = list_images(tmp_path), list_images(everywhere)
    run = ("config.toml", "environment.json", "metrics.jsonl", "neighbours.png")
    touch(tmp_path, *(f"{folder}/{name}" for folder in ("run", "cat/sweep/lamb=0.1") for name in run))
    touch(tmp_path, *(f"cache/{name}" for name in ("1.jepakit.npy", "2.jepakit.npy", ".used_bytes")))
    after = list_images(tmp_path)
    assert (after.ids, after.labels, after.digest()) == (before.ids, before.labels, before.digest())
    assert after.note == before.note
    assert list_images(everywhere).ids == matching.ids
    assert list_images(f"{tmp_path}/run/*.png").ids == (f"{tmp_path}/run/neighbours.png",), "named by the user"


@pytest.mark.parametrize("name", ["@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"])
def test_folders_that_systems_keep_are_passed_over_and_told(tmp_path: Path, name: str) -> None:
    classes(tmp_path, {"cat": 10, "dog": 10})
    before, matching = list_images(tmp_path), list_images(f"{tmp_path}/**/*.png")
    touch(tmp_path, f"{name}/1.png", f"cat/{name}/000.png/thumb.png")
    after = list_images(tmp_path)
    assert (after.ids, after.digest()) == (before.ids, before.digest())
    told = "2 system folders passed over"
    assert told in after.note
    found = list_images(f"{tmp_path}/**/*.png")
    assert found.ids == matching.ids
    assert told in found.note
    assert len(list_images(f"{tmp_path}/{name}/*.png")) == 1, "named by the user"
    for listed in archived(tmp_path):
        assert len(listed) == 20


def archived(folder: Path) -> list[ImageList]:
    """The images of the folder's files in a ZIP and in a tar."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    with zipfile.ZipFile(folder / "a.zip", "w") as unpacked, tarfile.open(folder / "a.tar", "w") as tar:
        for name in names:
            unpacked.write(folder / name, name)
            tar.add(folder / name, name)
    return [list_images(folder / "a.zip"), list_images(folder / "a.tar")]


def test_embeddings_that_were_saved_among_the_images_are_passed_over(tmp_path: Path) -> None:
    classes(tmp_path, {"cat": 10, "dog": 10})
    np.savez(tmp_path / "cat" / "scan.npz", pixels=np.zeros((9, 9, 3), np.uint8))
    before = list_images(tmp_path)
    assert "cat/scan.npz" in before.ids
    Embeddings(np.zeros((1, 2), np.float32), "0" * 16, ("a.png",)).save(tmp_path / "vectors.npz")
    after = list_images(tmp_path)
    assert (after.ids, after.labels) == (before.ids, before.labels)
    assert not any(name.endswith("vectors.npz") for name in list_images(f"{tmp_path}/**").ids)


def test_several_files_are_asked_at_once_whether_they_are_embeddings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = threading.Barrier(2)
    monkeypatch.setattr("jepakit.sources.files.is_embeddings", lambda path: bool(two.wait(10) < 0))
    touch(tmp_path, "a.npz", "b.npz")
    assert list_images(tmp_path).ids == ("a.npz", "b.npz")
    assert len(list_images(f"{tmp_path}/*").ids) == 2


def test_a_hidden_folder_that_is_named_is_read(tmp_path: Path) -> None:
    touch(tmp_path, ".data/a.png")
    assert list_images(tmp_path / ".data").ids == ("a.png",)


def test_the_folder_one_is_in_has_a_name_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.png")
    monkeypatch.chdir(tmp_path)
    for name in (".", "./", Path()):
        assert list_images(name).ids == ("a.png",)


def test_a_folder_named_like_an_image_is_still_a_folder(tmp_path: Path) -> None:
    touch(tmp_path, "set.png/a.png")
    assert list_images(tmp_path).ids == ("set.png/a.png",)
    assert list_images(f"{tmp_path}/**").ids == (f"{tmp_path}/set.png/a.png",)


def test_a_link_back_to_a_parent_folder_does_not_repeat_images(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.png")
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    assert list_images(tmp_path).ids == ("a/1.png",)


def test_a_linked_folder_is_followed(tmp_path: Path) -> None:
    touch(tmp_path, "store/1.png", "set/2.png")
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "store")
    assert list_images(tmp_path / "set").ids == ("2.png", "linked/1.png")


def test_two_folders_of_one_number_are_two_where_no_link_leads_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "a/1.png", "b/2.png", "b/deep/3.png")
    same, stat = (tmp_path / "a").stat(), os.stat
    of_one_number = {str(tmp_path / name) + "/" for name in ("a", "b", "b/deep")}
    monkeypatch.setattr(os, "stat", lambda path, **how: same if path in of_one_number else stat(path, **how))
    assert list_images(tmp_path).ids == ("a/1.png", "b/2.png")


def link(root: Path, links: dict[str, str]) -> Path:
    for name, target in links.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(target)
    return root


@pytest.mark.parametrize(
    "links",
    [
        {"z": "y"},
        {"a": "y"},
        {"x/again": "../y"},
        {"z/deeper": "../y", "b": "z"},
        {"z": "y", "a": "y", "y/again": "../x"},
        {f"z/{i:03}.png": f"../y/{i:03}.png" for i in range(12)},
        {f"a/{i:03}.png": f"../z/{i}.png" for i in range(12)} | {f"z/{i}.png": f"../y/{i:03}.png" for i in range(12)},
        {f"b/{i:03}.png": f"../a/{i:03}.png" for i in range(12)} | {"a": "y"},
    ],
    ids=["folder", "earlier name", "inside", "deeper", "several", "files", "links to links", "through a linked folder"],
)
def test_what_links_lead_to_is_listed_once_under_its_own_name(tmp_path: Path, links: dict[str, str]) -> None:
    link(classes(tmp_path, {"x": 12, "y": 12}), links)
    for listed in (list_images(tmp_path), gather(tmp_path)):
        assert listed.ids == tuple(f"{folder}/{i:03}.png" for folder in "xy" for i in range(12))
        assert listed.labels == ("x",) * 12 + ("y",) * 12
        assert f"{counted(len(links), 'link')} passed over: what they lead to is listed already" in listed.note


def test_what_several_links_lead_to_is_listed_under_the_first(tmp_path: Path) -> None:
    touch(tmp_path, "store/x/1.png", "store/2.png")
    links = {"d": "../store", "c/x": "../../store/x", "b/2.png": "../../store/2.png", "a": "../store/x"}
    link(tmp_path / "set", links)
    assert list_images(tmp_path / "set").ids == ("a/1.png", "d/2.png")


def test_the_order_is_that_of_the_names_whether_links_or_not(tmp_path: Path) -> None:
    touch(tmp_path, "store/2.png", "store/1.png", "set/b/1.png", "set/d/1.png", "set/c-.png", "set/c0.png")
    link(tmp_path / "set", {"c": "../store", "a": "../store/gone"})
    assert list_images(tmp_path / "set").ids == ("b/1.png", "c/1.png", "c/2.png", "c-.png", "c0.png", "d/1.png")


def test_images_that_are_links_to_files_of_other_names_are_images(tmp_path: Path) -> None:
    """As in a cache of Hugging Face, whose files have no suffix and lie beside their names."""
    touch(tmp_path, "blobs/1f", "blobs/2e", "blobs/.3d.png")
    link(tmp_path, {f"snapshot/{i}.png": f"../blobs/{blob}" for i, blob in enumerate(["1f", "2e", "2e", ".3d.png"])})
    assert list_images(tmp_path).ids == ("snapshot/0.png", "snapshot/1.png", "snapshot/3.png")


def test_a_link_leads_where_python_says_whatever_folders_it_passes(tmp_path: Path) -> None:
    touch(tmp_path, "far/store/x/1.png", "far/2.png", "set/3.png")
    inside = {
        "up": "../far/store",
        "a.png": "up/x/1.png",
        "b.png": "up/../2.png",
        "c.png": "./b.png",
        "d.png": "/dev/null",
    }
    link(tmp_path / "set", inside | {"e.png": str(tmp_path / "set" / "up" / "x" / ".." / "x" / "1.png")})
    for folder in (f"{tmp_path}/set", os.path.relpath(tmp_path / "set"), f"{tmp_path}/set/up/../../set/"):
        resolve = files._resolver()
        for name in ("a.png", "b.png", "c.png", "d.png", "e.png", "3.png", "up", "up/x/1.png"):
            assert resolve(f"{folder}/{name}") == os.path.realpath(f"{folder}/{name}")


def test_each_folder_that_links_pass_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, *(f"store/md5/{number % 4}/{number}" for number in range(40)))
    link(tmp_path, {f"set/{number}.png": f"../store/md5/{number % 4}/{number}" for number in range(40)})
    listing, asked = files.walk(str(tmp_path / "set")), []

    def noting(function: Callable[[str], Any]) -> Callable[[str], Any]:
        def noted(path: str) -> Any:
            asked.append(path)
            return function(path)

        return noted

    monkeypatch.setattr(os, "lstat", noting(os.lstat))
    monkeypatch.setattr(os, "readlink", noting(os.readlink))
    assert len(listing.once(listing.names)) == 40
    monkeypatch.undo()
    about_links = [path for path in asked if path.endswith(".png") or Path(path).parent.parent.name == "md5"]
    assert len(about_links) == 2 * 40
    assert len(asked) <= 2 * 40 + 4 + 2 * len(tmp_path.parts) + 4


def test_a_shard_that_links_lead_to_is_listed_once(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("1.png", b"x")
    listed = list_images(link(tmp_path, {"a.zip": "b.zip"}))
    assert listed.ids == ("b.zip/1.png",)
    assert "1 link passed over" in listed.note


def test_an_image_whose_link_leads_nowhere_is_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    link(tmp_path, {"b.png": "gone/1.png", "c.dcm": "gone/2.dcm"})
    listed = list_images(tmp_path)
    assert listed.ids == ("a.png", "b.png", "c.dcm")
    assert listed.digest()
    with pytest.raises(InputError, match=r"b\.png.*No such file"):
        open_raster(listed[1].data, name=listed[1].name)


def test_other_links_that_lead_nowhere_are_told(tmp_path: Path) -> None:
    link(tmp_path, {"cat": "/nowhere/cat", "dog": "/nowhere/dog", "null": os.devnull})
    told = "2 links to nowhere passed over (cat first)"
    with pytest.raises(DataError, match=rf"holds no images .*; {re.escape(told)}"):
        list_images(tmp_path)
    touch(tmp_path, "a.png")
    assert list_images(tmp_path).note.endswith(told)


def test_a_glob_lists_matching_images_sorted(tmp_path: Path) -> None:
    touch(tmp_path, "b/2.png", "a/1.png", "a/1.jpg", "a/1.txt", "3.png")
    listed = list_images(f"{tmp_path}/*/*")
    assert paths(listed) == [tmp_path / "a/1.jpg", tmp_path / "a/1.png", tmp_path / "b/2.png"]
    assert listed.labels is None
    assert [path.name for path in paths(list_images(f"{tmp_path}/**/*.png"))] == ["3.png", "1.png", "2.png"]


def test_a_glob_that_goes_round_a_loop_of_links_lists_each_image_once(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.png", "a/b/2.png")
    (tmp_path / "a/b/back").symlink_to(tmp_path / "a")
    listed = list_images(f"{tmp_path}/**/*.png")
    assert paths(listed) == [tmp_path / "a/1.png", tmp_path / "a/b/2.png"]
    assert "links passed over: what they lead to is listed already" in listed.note


def test_a_file_whose_name_looks_like_a_glob_is_itself(tmp_path: Path) -> None:
    touch(tmp_path, "scan[1].png", "scan1.png")
    assert list_images(tmp_path / "scan[1].png").ids == ("scan[1].png",)


def test_a_single_file_is_named_by_its_name(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png")
    listed = list_images(tmp_path / "a.png")
    assert (listed.ids, listed.labels) == (("a.png",), None)


def test_a_list_keeps_its_order(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png", "c.png")
    names = [f"{tmp_path}/{name}.png" for name in "cab"]
    listed = list_images(names)
    assert listed.ids == tuple(names)
    assert listed.labels is None
    assert "list of files" in listed.note


@pytest.mark.parametrize("source", ["nowhere", "nowhere/a.png"])
def test_a_missing_source_is_named(tmp_path: Path, source: str) -> None:
    with pytest.raises(DataError, match=rf"{source} does not exist: give a folder"):
        list_images(tmp_path / source)


def test_a_file_listed_twice_is_no_two_images_to_train_on(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png")
    twice = [tmp_path / "a.png", tmp_path / "b.png", os.path.relpath(tmp_path / "a.png")]
    with pytest.raises(DataError, match=r"a\.png more than once: give each image once"):
        list_images(twice)
    assert len(gather(twice)) == 3, "embedded as often as asked"


def test_missing_files_of_a_list_are_counted(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    with pytest.raises(DataError, match=r"\*\.png is not a file: give a glob by itself, not in a list \(1 of 1 files"):
        list_images([tmp_path / "*.png"])
    with pytest.raises(DataError, match=r"x\.png does not exist \(2 of 3 files are missing\)"):
        list_images([tmp_path / "a.png", tmp_path / "x.png", tmp_path / "y.png"])


def test_a_source_without_images_says_what_was_looked_for(tmp_path: Path) -> None:
    touch(tmp_path, "notes.txt")
    for source in (tmp_path, f"{tmp_path}/*.png"):
        with pytest.raises(DataError, match=r"holds no images \(looked for \.bmp, \.dcm, \.dicom, \.ima, \.jfif"):
            list_images(source)
    with pytest.raises(DataError):
        list_images([])


# Labels


@pytest.mark.parametrize(
    ("counts", "labelled", "note"),
    [
        ({"cat": 10, "dog": 12}, True, "2 folders are classes (cat, dog)"),
        ({"cat": 10, "dog": 9}, False, "no labels: the folder dog holds 9 images (classes have 10 or more; labels folder takes any number)"),
        ({"cat": 30}, False, "1 first-level folder ("),
        ({f"c{i:02}": MIN_IMAGES_PER_CLASS for i in range(MAX_CLASSES)}, True, "50 folders are classes (c00, c01, c02, c03, c04, c05 and 44 more)"),
        ({f"c{i:02}": MIN_IMAGES_PER_CLASS for i in range(MAX_CLASSES + 1)}, False, "51 first-level folders"),
    ],
)  # fmt: skip
def test_auto_takes_folders_as_classes_only_if_they_look_like_it(
    tmp_path: Path, counts: dict[str, int], labelled: bool, note: str
) -> None:
    listed = list_images(classes(tmp_path, counts))
    assert note in listed.note
    if labelled:
        assert listed.labels == tuple(name.split("/")[0] for name in listed.ids)
    else:
        assert listed.labels is None
        assert listed.note.startswith("no labels")


def test_auto_gives_no_labels_when_an_image_lies_outside_the_folders(tmp_path: Path) -> None:
    touch(classes(tmp_path, {"cat": 10, "dog": 10}), "stray.png")
    listed = list_images(tmp_path)
    assert listed.labels is None
    assert "outside class folders" in listed.note


def test_deeper_folders_belong_to_the_class_of_the_first_level(tmp_path: Path) -> None:
    touch(tmp_path, "cat/x/1.png", "cat/2.png", "dog/y/z/3.png")
    assert list_images(tmp_path, "folder").labels == ("cat", "cat", "dog")


def test_folder_takes_folders_as_classes_whatever_their_number(tmp_path: Path) -> None:
    assert list_images(classes(tmp_path / "few", {"cat": 1}), "folder").labels == ("cat",)
    many = {f"c{i}": 1 for i in range(MAX_CLASSES + 1)}
    assert len(set(list_images(classes(tmp_path / "many", many), "folder").labels or ())) == MAX_CLASSES + 1


def test_folder_names_the_image_that_has_no_class(tmp_path: Path) -> None:
    touch(tmp_path, "cat/1.png", "stray.png")
    with pytest.raises(DataError, match=r"stray\.png is in no class folder"):
        list_images(tmp_path, "folder")


def test_none_gives_no_labels(tmp_path: Path) -> None:
    listed = list_images(classes(tmp_path, {"cat": 10, "dog": 10}), "none")
    assert (listed.labels, listed.note) == (None, "no labels, as requested")


@pytest.mark.parametrize(
    "names",
    [
        ("train", "test"), ("Training", "VAL"), ("train", "valid", "test"), ("train2017", "val2017"), ("train", "test", "dev"),
        ("images_train", "images_test"), ("fold1", "fold2", "fold3"), ("trainA", "testA"),
        ("holdout", "train_images"), ("training_set", "test_set"),
    ],
)  # fmt: skip
def test_folders_named_like_splits_are_not_taken_for_classes(tmp_path: Path, names: Sequence[str]) -> None:
    classes(tmp_path, dict.fromkeys(names, 10))
    with pytest.raises(DataError, match="look like splits, not classes"):
        list_images(tmp_path)
    assert list_images(tmp_path, "none").labels is None


@pytest.mark.parametrize("names", [("train", "test"), ("Training", "VAL"), ("train", "valid", "test")])
def test_the_usual_splits_are_no_classes_even_by_order(tmp_path: Path, names: Sequence[str]) -> None:
    classes(tmp_path, dict.fromkeys(names, 10))
    with pytest.raises(DataError, match="look like splits, not classes"):
        list_images(tmp_path, "folder")


@pytest.mark.parametrize("names", [("train", "test", "ground_truth"), ("train", "val", "extra")])
def test_several_splits_beside_other_folders_are_classes_only_by_order(tmp_path: Path, names: Sequence[str]) -> None:
    classes(tmp_path, dict.fromkeys(names, 10))
    with pytest.raises(DataError, match=r"look like splits, not classes: .*, or labels folder if they are classes"):
        list_images(tmp_path)
    assert set(list_images(tmp_path, "folder").labels or ()) == set(names)


@pytest.mark.parametrize(
    "names",
    [
        ("ground", "water"), ("labeled", "unlabeled"), ("猫_test", "犬_test"), ("test", "control"), ("bullet train", "steam train"), ("mask", "no_mask"), ("with_mask", "without_mask"), ("fold", "label"),
        ("skin fold", "wrist fold"), ("label", "cap", "scratch"), ("left", "right"), ("valid", "invalid"), ("1", "2"), ("good", "thumb"), ("patient1", "control1"),
    ],
)  # fmt: skip
def test_classes_may_have_a_name_that_is_usual_for_something_else(tmp_path: Path, names: Sequence[str]) -> None:
    listed = list_images(classes(tmp_path, dict.fromkeys(names, 10)))
    assert set(listed.labels or ()) == set(names)
    assert "warning" not in listed.note


@pytest.mark.parametrize(
    ("pictures", "beside"),
    [
        (("images",), "masks"), (("originals",), "thumbnails"), (("JPEGImages",), "SegmentationClass"), (("leftImg8bit",), "gtFine"),
        (("train",), "train_masks"), (("Training",), "masks"), (("cat", "dog"), "ground_truth"), (("cat", "dog"), "thumbnails"), (("raw", "Dogs"), "labels"),
    ],
)  # fmt: skip
def test_folders_of_what_belongs_to_other_images_are_no_classes(
    tmp_path: Path, pictures: Sequence[str], beside: str
) -> None:
    classes(tmp_path, dict.fromkeys([*pictures, beside], 10))
    listed, warning = list_images(tmp_path), f"warning: 10 files in {beside} count as images, too"
    assert listed.labels is None
    assert listed.note.startswith(
        f"no labels: what lies in {beside} seems to belong to the images beside it (masks, thumbnails)"
    )
    assert warning in listed.note
    assert warning in list_images(tmp_path, "none").note
    assert gather(tmp_path).labels is None
    assert set(list_images(tmp_path, "folder").labels or ()) == {*pictures, beside}
    assert "warning" not in list_images(tmp_path, "folder").note


@pytest.mark.parametrize(
    "names", [("patient1", "patient2"), ("sub-01", "sub-02"), ("Slide_7", "case 3"), ("B03", "P24")]
)
@pytest.mark.parametrize("around", ["", "cohort"])
def test_folders_of_patients_are_no_classes(tmp_path: Path, names: Sequence[str], around: str) -> None:
    folder = classes(tmp_path / around, dict.fromkeys(names, 10))
    listed, told = list_images(tmp_path), "and the other folders seem to hold one patient, slide or scene each"
    assert listed.labels is None
    assert f"no labels: {min(names)} {told}" in listed.note
    assert gather(folder).labels is None
    assert set(list_images(folder, "folder").labels or ()) == set(names)


@pytest.mark.parametrize("around", ["dataset", "train", "a/b c"])
def test_a_lone_folder_around_the_classes_is_passed_through(tmp_path: Path, around: str) -> None:
    classes(tmp_path / around, {"cat": 10, "dog": 12})
    touch(tmp_path, f"{around}/dog/deeper/1.png")
    assert (
        set(list_images(tmp_path, "folder").labels or ())
        == set(gather(tmp_path).labels or ())
        == {around.split("/")[0]}
    )
    for listed in (list_images(tmp_path), *archived(tmp_path)[:1]):
        assert (listed.labels or ()).count("cat") == 10
        assert (listed.labels or ()).count("dog") == 13
        assert f"2 folders in {around} are classes (cat, dog)" in listed.note
        assert "give …/" not in listed.note
    told = f"1 folder is the only class ({around.split('/')[0]}); if the folders in it are the classes, give …/{around} (a ZIP: unpacked)"
    assert told in gather(tmp_path).note
    assert "give …/" not in gather(tmp_path / around).note


def test_splits_in_a_lone_folder_are_no_classes(tmp_path: Path) -> None:
    classes(tmp_path / "set", {"train": 10, "test": 10})
    with pytest.raises(DataError, match="the folders test, train look like splits"):
        list_images(tmp_path)


# The digest


def test_the_digest_stays_while_the_data_stays(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b/c.png")
    before = list_images(tmp_path).digest()
    assert before == list_images(str(tmp_path)).digest()
    moved = tmp_path.parent / f"{tmp_path.name}-moved"
    tmp_path.rename(moved)
    assert list_images(moved).digest() == before


def test_the_digest_changes_with_a_name_a_size_or_the_number_of_files(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png")
    seen = {list_images(tmp_path).digest()}
    touch(tmp_path, "c.png")
    seen.add(list_images(tmp_path).digest())
    (tmp_path / "c.png").write_bytes(b"longer than before")
    seen.add(list_images(tmp_path).digest())
    (tmp_path / "c.png").rename(tmp_path / "d.png")
    seen.add(list_images(tmp_path).digest())
    (tmp_path / "d.png").unlink()
    seen.add(list_images(tmp_path).digest())
    assert len(seen) == 4, "without the third file it is the first digest again"


def test_the_digest_changes_with_the_size_beyond_the_first_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(bytes(SAMPLE_BYTES))
    before = list_images(tmp_path).digest()
    (tmp_path / "a.png").write_bytes(bytes(SAMPLE_BYTES + 1))
    assert list_images(tmp_path).digest() != before


def test_names_that_are_not_utf_8_have_a_digest(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")).write_bytes(b"x")
    assert len(list_images(tmp_path).digest()) == 16


# gather


def test_gather_takes_a_folder_with_its_classes(tmp_path: Path) -> None:
    classes(tmp_path, {"cat": 1, "dog": 2})
    gathered = gather(tmp_path, "folder")
    assert gathered.ids == ("cat/000.png", "dog/000.png", "dog/001.png")
    assert gathered.labels == ("cat", "dog", "dog")
    assert paths(gathered) == [tmp_path / name for name in gathered.ids]
    assert gather(str(tmp_path), "none").labels is None
    assert gather(tmp_path).labels == ("cat", "dog", "dog"), "for embedding, however few"


def test_gather_does_without_labels_when_images_lie_outside_class_folders(tmp_path: Path) -> None:
    touch(tmp_path, "cat/1.png", "stray.png")
    listed = gather(tmp_path)
    assert listed.labels is None
    assert "images lie outside class folders (1 of 2, stray.png first)" in listed.note
    assert gather(tmp_path / "cat" / "1.png").labels is None
    assert gather(f"{tmp_path}/*/*.png").labels is None


@pytest.mark.parametrize("door", [gather, list_images])
def test_labels_asked_of_folders_come_from_folders_or_are_refused(tmp_path: Path, door: Callable[..., Any]) -> None:
    touch(tmp_path, "cat/1.png", "stray.png")
    array = np.zeros((10, 12, 3), np.uint8)
    for source, told in [
        (tmp_path, r"stray\.png is in no class folder: move it into one, or use labels none"),
        (f"{tmp_path}/*/*.png", "labels = 'folder', but a glob has no class folders: give the folder that holds them"),
        (tmp_path / "cat" / "1.png", "a single file has no class folders"),
        ([tmp_path / "cat" / "1.png"], "a list of files has no class folders"),
        ([array, array], "a sequence in memory has no class folders"),
        ([(array, "cat")], "a sequence in memory has no class folders"),
    ]:
        with pytest.raises(DataError, match=told):
            door(source, "folder")


def test_gather_tells_what_it_left_out_if_it_is_to_tell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touch(tmp_path, "cat/1.png", "dog/2.png", "dog/3.heic", "stray.png")
    gather(tmp_path)
    assert capsys.readouterr().err == ""
    gather(tmp_path, progress=True)
    assert capsys.readouterr().err == (
        "no labels: images lie outside class folders (1 of 3, stray.png first); "
        "1 .heic file passed over: HEIC and AVIF are not read, save them as JPEG or PNG\n"
    )


def test_gather_says_nothing_of_labels_that_no_one_expects(tmp_path: Path) -> None:
    touch(tmp_path, "cat/1.png")
    for source in (tmp_path / "cat" / "1.png", [tmp_path / "cat" / "1.png"], png(), [png()]):
        assert gather(source).note == ""
    assert gather(tmp_path, "none").note == ""
    assert gather(f"{tmp_path}/*/*.png").note == "no labels: a glob has no class folders"


def test_gather_takes_a_manifests_own_labels_or_none_and_its_folders_only_if_asked(tmp_path: Path) -> None:
    touch(tmp_path, "cat/1.png", "dog/2.png")
    labelled, bare = tmp_path / "labelled.csv", tmp_path / "bare.csv"
    labelled.write_text("path,label\ncat/1.png,sick\ndog/2.png,well\n")
    bare.write_text("path\ncat/1.png\ndog/2.png\n")
    assert gather(labelled).labels == ("sick", "well")
    assert gather(bare).labels is None
    assert gather(labelled, "none").labels is None
    assert gather(labelled, "folder").labels == ("cat", "dog")


def test_gather_takes_the_labels_of_a_dataset_and_invents_none_for_images_in_memory() -> None:
    assert gather([(png(), "sick"), (png(), "well")]).labels == ("sick", "well")
    assert gather([png(), png()]).labels is None


def test_gather_takes_the_labels_of_shards(tmp_path: Path) -> None:
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w") as tar:
        for name, data in {"x/1.png": png(), "x/1.cls": b"7", "x/2.png": png(), "x/2.json": b'{"label": 8}'}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    assert gather(shard).labels == ("7", "8")


def test_gather_takes_the_folders_of_a_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("cat/1.png", "dog/2.png"):
            archive.writestr(name, png())
    assert gather(tmp_path / "a.zip").labels == ("cat", "dog")


@pytest.mark.parametrize("rule", ["auto", "folder"])
def test_gather_refuses_splits_taken_for_classes(tmp_path: Path, rule: str) -> None:
    classes(tmp_path, {"train": 1, "test": 1})
    with pytest.raises(DataError, match="splits"):
        gather(tmp_path, rule)


def test_gather_flattens_images_in_memory_and_names_them_by_their_place(tmp_path: Path) -> None:
    array, image = np.zeros((10, 12, 3), np.uint8), Image.new("RGB", (10, 10))
    gathered = gather([png(), array, image, tmp_path / "x.png", f"{tmp_path}/y.png"])
    assert gathered.ids == ("0", "1", "2", f"{tmp_path}/x.png", f"{tmp_path}/y.png")
    assert gathered.labels is None
    assert paths(gathered)[1] is array
    assert paths(gathered)[2] is image
    assert paths(gathered)[4] == tmp_path / "y.png"


@pytest.mark.parametrize(
    "image", [np.zeros((10, 12, 3), np.uint8), np.zeros((10, 12), np.uint8), Image.new("L", (9, 9)), png()], ids=type
)
def test_gather_takes_one_image_in_memory(image: Any) -> None:
    gathered = gather(image)
    assert len(gathered) == 1
    assert paths(gathered)[0] is image
    assert gathered.ids == ("0",)


@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_gather_takes_other_kinds_of_bytes_and_they_can_be_read(kind: Any) -> None:
    (item,) = paths(gather(kind(png())))
    with open_raster(item) as raster:
        assert (raster.header.width, raster.header.height) == (10, 10)


def test_gather_takes_a_stack_of_arrays_image_by_image() -> None:
    stack = np.arange(3 * 8 * 8 * 3, dtype=np.uint8).reshape(3, 8, 8, 3)
    gathered = gather(stack)
    assert gathered.ids == ("0", "1", "2")
    for item, array in zip(paths(gathered), stack, strict=True):
        np.testing.assert_array_equal(item, array)


def test_gather_takes_a_generator() -> None:
    assert gather((png() for _ in range(3)), "none").ids == ("0", "1", "2")


@pytest.mark.parametrize("nothing", [[], (), np.zeros((0, 8, 8, 3), np.uint8)], ids=["list", "tuple", "stack"])
def test_gather_refuses_nothing(nothing: Any) -> None:
    with pytest.raises(InputError, match="no images were given"):
        gather(nothing, "folder")


def test_an_image_list_is_frozen() -> None:
    with pytest.raises(AttributeError):
        gather(png(), "none").ids = ("a",)  # type: ignore[misc]


def test_one_folder_called_train_is_no_split(tmp_path: Path) -> None:
    touch(tmp_path, *(f"train/{number}.png" for number in range(12)))
    assert set(gather(tmp_path).labels or ()) == {"train"}
    assert list_images(tmp_path).labels is None
