"""Manifests, and tables of labels and groups: CSV and Parquet, their columns, and every way to get them wrong."""

from __future__ import annotations

import builtins
import ntpath
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.files import touch

from jepakit.errors import ConfigError, DataError, MissingExtraError
from jepakit.sources import gather, list_images, table
from jepakit.sources.files import Files
from jepakit.sources.store import Found


def csv(file: Path, *lines: str, encoding: str = "utf-8") -> Path:
    file.write_text("".join(f"{line}\n" for line in lines), encoding=encoding)
    return file


def parquet(file: Path, columns: dict[str, Sequence[Any]]) -> Path:
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.table(columns), file)
    return file


# Manifests


def test_a_manifest_gives_images_labels_groups_and_what_is_held_out(tmp_path: Path) -> None:
    touch(tmp_path, "x/1.png", "x/2.png", "y/3.png")
    manifest = csv(tmp_path / "m.csv", "path,label,group,split,age", "y/3.png,cat,p1,training,9", "x/1.png,dog,p2,test,8", "x/2.png,cat,p1,Train,7")  # fmt: skip
    listed = list_images(manifest)
    assert listed.ids == ("y/3.png", "x/1.png", "x/2.png")
    assert [ref.data for ref in listed] == [tmp_path / name for name in listed.ids]
    assert listed.labels == ("cat", "dog", "cat")
    assert listed.groups == ("p1", "p2", "p1")
    assert listed.held_out is not None
    assert listed.held_out.tolist() == [False, True, False]
    assert listed.note == (
        "labels: 2 classes from the manifest's column label; groups: 2 groups from the manifest's column group; "
        "1 of 3 images held out by the manifest's split; columns not used: age"
    )


def test_a_manifest_of_paths_alone_has_neither_labels_nor_groups(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{kind}/{i}.png" for kind in "ab" for i in range(10)))
    names = [f"{kind}/{i}.png" for kind in "ab" for i in range(10)]
    listed = list_images(csv(tmp_path / "m.csv", "path", *names))
    assert (listed.labels, listed.groups, listed.held_out) == (None, None, None)
    assert "no column label" in listed.note
    assert list_images(tmp_path / "m.csv", "folder").labels == ("a",) * 10 + ("b",) * 10


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_delimiters_and_byte_order_marks_of_any_spreadsheet_are_read(
    tmp_path: Path, delimiter: str, encoding: str
) -> None:
    touch(tmp_path, "Köln, 1.png", "2.png")
    rows = ['"Köln, 1.png"', "Dom"], ["2.png", " Rhein "]
    manifest = csv(
        tmp_path / "m.csv", *(delimiter.join(row) for row in (["Filename", "Class"], *rows)), "", encoding=encoding
    )
    listed = list_images(manifest)
    assert listed.ids == ("Köln, 1.png", "2.png")
    assert listed.labels == ("Dom", "Rhein")


@pytest.mark.parametrize(
    ("path", "label", "group"),
    [
        ("file", "class", "patient"), ("filepath", "target", "patient_id"), ("image", "category", "scene"), ("IMAGE_PATH", "Label", "Slide"),
        ("file_name", "CLASS", "PatientID"), ("File Name", "Target", "Patient ID"), ("file-path", "label", "patient"),
        ("imagePath", "label", "PATIENT-ID"),
    ],
)  # fmt: skip
def test_columns_are_known_by_their_usual_names(tmp_path: Path, path: str, label: str, group: str) -> None:
    touch(tmp_path, "1.png")
    listed = list_images(csv(tmp_path / "m.csv", f"{group},{label},{path}", "g,c,1.png"))
    assert (listed.ids, listed.labels, listed.groups) == (("1.png",), ("c",), ("g",))
    assert f"column {label}" in listed.note


@pytest.mark.parametrize(
    "header", ["image,file_path,PatientID,patient_id", "image,File Path,slide,PatientID", "FileName,path,scene,patient"]
)
def test_of_several_columns_the_first_of_the_usual_names_counts_however_it_is_spelt(
    tmp_path: Path, header: str
) -> None:
    touch(tmp_path, "1.png")
    listed = list_images(csv(tmp_path / "m.csv", header, "gone.png,1.png,a,b"))
    assert (listed.ids, listed.groups) == (("1.png",), ("b",))


def test_columns_that_are_not_used_are_told_once(tmp_path: Path) -> None:
    touch(tmp_path, "1.png")
    header = "path,label,slide,patient,image,,age,sex,weight"
    manifest = csv(tmp_path / "m.csv", header, "1.png,a,s,p,i,,9,f,1")
    listed = list_images(manifest)
    assert listed.groups == ("p",)
    assert listed.note.endswith("column patient; columns not used: slide, image, age, sex and 1 more")
    assert "not used" not in list_images(csv(tmp_path / "m.csv", "path,label,split", "1.png,a,train"), "none").note


def test_absolute_paths_and_a_manifest_named_from_elsewhere_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "in/1.png", "2.png")
    csv(tmp_path / "in/m.csv", "path", "./1.png", "../2.png", f"{tmp_path}/in/../2.jpg")
    touch(tmp_path, "2.jpg")
    monkeypatch.chdir(tmp_path)
    listed = list_images("in/m.csv")
    assert listed.ids == ("1.png", "../2.png", f"{tmp_path}/2.jpg")
    assert [Path(str(ref.data)).read_bytes() for ref in listed] == [b"in/1.png", b"2.png", b"2.jpg"]


def test_parquet_says_the_same_as_csv(tmp_path: Path) -> None:
    touch(tmp_path, "1.png", "2.png")
    same: dict[str, Sequence[Any]] = {
        "path": ["2.png", "1.png"],
        "label": [3, 4],
        "patient": ["a", "b"],
        "split": ["train", "val"],
    }
    rows = [",".join([*map(str, row), ""]) for row in zip(*same.values(), strict=True)]
    from_csv = list_images(csv(tmp_path / "m.csv", ",".join([*same, "pixels"]), *rows))
    from_parquet = list_images(parquet(tmp_path / "m.parquet", {**same, "pixels": [b"", b""]}))
    assert from_parquet.ids == from_csv.ids
    assert from_parquet.labels == from_csv.labels == ("3", "4")
    assert from_parquet.groups == from_csv.groups
    assert from_parquet.note == from_csv.note
    assert from_parquet.digest() == from_csv.digest()


def test_numbers_that_an_empty_cell_made_fractions_are_labels_as_they_were(tmp_path: Path) -> None:
    touch(tmp_path, *"123")
    for cells, labels in (([1.0, None, 2.0], ("1", None, "2")), ([1.0, None, 2.5], ("1.0", None, "2.5"))):
        file = parquet(tmp_path / "m.parquet", {"path": ["1", "2", "3"], "label": cells})
        rows = [f"{path},{'' if cell is None else cell}" for path, cell in zip("123", cells, strict=True)]
        assert list_images(file).labels == list_images(csv(tmp_path / "m.csv", "path,label", *rows)).labels == labels


def test_whole_numbers_are_one_class_with_and_without_a_point(tmp_path: Path) -> None:
    touch(tmp_path, *"1234")
    rows = (f"{path},{label}" for path, label in zip("1234", ("0", "1", "1.0", "0.0"), strict=True))
    assert list_images(csv(tmp_path / "m.csv", "path,label", *rows)).labels == ("0", "1", "1", "0")


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "m.parquet")
    real = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"pip install 'jepakit\[parquet\]'"):
        list_images(tmp_path / "m.parquet")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["1.png|a", "2.png|b"], r"columns are 1\.png\|a: its first line must name the columns, separated by commas"),
        (["paht,label", "1.png,a"], r"no column 'path' \(nor file, .*\); its columns are paht, label; did you mean paht\?"),
        (["path,label", "1.png,a,b"], r"m\.csv, line 2: 3 fields, its first line has 2"),
        (["path,label", "1.png,a", "", "2.png"], r"m\.csv, line 4: 1 fields"),
        (["path,patient", "1.png,"], r"m\.csv, line 2: the column 'patient' is empty"),
        (["path,split", "1.png,"], r"m\.csv, line 2: the column 'split' is empty"),
        (["path,label", "1.png,a", ",b"], r"m\.csv, line 3: the column 'path' is empty"),
        (["path,label"], "a header but no rows"),
        ([], "is empty or begins with an empty line"),
        (["", "path,label"], "is empty or begins with an empty line"),
        (["path," + "x" * 200_000, "1.png,a"], r"m\.csv, line 1: field larger than field limit"),
        (["path,label", '"1.png,a'], r"m\.csv, line 2: unexpected end of data"),
        (["path", "1.png", "x.png", "y.png"], r"lists x\.png, which is not a file in .* \(2 of 3 are missing\)"),
        (["path", "1.png", "d\\x.png"], r"lists d\\x\.png, .*: paths are written with / here, not with \\"),
        (["path", "s3://b/x.png"], r"lists s3:/b/x\.png, .*: images are read from disk only: download them"),
        (["path", "C:/x.png"], r"lists C:/x\.png, .*: paths are relative to the manifest's folder"),
        (["path", "file:///x.png"], r"lists file:/x\.png, .*: paths are written without file://"),
        (["path", "1.png", "./1.png"], r"lists 1\.png more than once"),
        (["path,Label,label", "1.png,a,b"], r"has two columns named 'Label'"),
        (["path,label,Label,label", "1.png,a,b,c"], r"has two columns named 'label'"),
        (["path", "1.png", "a\0/b.png"], r"lists a\\x00/b\.png, which is not a file"),
        (["path,split", "1.png,test", "2.png,val"], r"no row's split is train \(found test, val\)"),
    ],
)  # fmt: skip
def test_a_manifest_that_cannot_be_used_says_where_and_why(tmp_path: Path, lines: list[str], message: str) -> None:
    touch(tmp_path, "1.png", "2.png")
    with pytest.raises(DataError, match=message):
        list_images(csv(tmp_path / "m.csv", *lines))


def test_a_file_named_relatively_and_absolutely_is_listed_twice(tmp_path: Path) -> None:
    touch(tmp_path, "1.png")
    with pytest.raises(DataError, match=r"lists .*/1\.png more than once"):
        list_images(csv(tmp_path / "m.csv", "path", "1.png", f"{tmp_path}/1.png"))


@pytest.mark.parametrize(("on_disk", "written"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_a_name_in_another_form_of_unicode_is_told_apart(tmp_path: Path, on_disk: Any, written: Any) -> None:
    touch(tmp_path, unicodedata.normalize(on_disk, "K\u00f6ln.png"))
    with pytest.raises(DataError, match=f"the file's own name is in Unicode form {on_disk}: write it in that form"):
        list_images(csv(tmp_path / "m.csv", "path", unicodedata.normalize(written, "K\u00f6ln.png")))


@pytest.mark.parametrize(
    ("name", "header", "row"),
    [
        ("m.csv", "path;label;a, b, c, d", "1.png;cat;7"),
        ("m.csv", '"a;b;c;d",path,label', "7,1.png,cat"),
        ("m.tsv", "path\tlabel\tsize, in mm, of a, b", "1.png\tcat\t7"),
    ],
)
def test_the_delimiter_is_the_one_that_gives_a_column_of_paths(
    tmp_path: Path, name: str, header: str, row: str
) -> None:
    touch(tmp_path, "1.png")
    assert list_images(csv(tmp_path / name, header, row)).labels == ("cat",)


def test_a_manifest_that_is_not_utf_8_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"m\.csv is not UTF-8 text: save it as CSV UTF-8"):
        list_images(csv(tmp_path / "m.csv", "path", "ärzte.png", encoding="latin-1"))


def test_empty_rows_of_a_spreadsheet_are_none(tmp_path: Path) -> None:
    touch(tmp_path, "1.png", "2.png")
    listed = list_images(csv(tmp_path / "m.csv", "path,label,", "1.png,a,", ",,", "2.png,b,", " ,,", ""))
    assert (listed.ids, listed.labels) == (("1.png", "2.png"), ("a", "b"))


def test_an_address_is_no_source(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="s3://b/x is a URL: images are read from disk only, so download them"):
        list_images("s3://b/x")


def test_columns_that_are_not_asked_for_may_be_empty(tmp_path: Path) -> None:
    touch(tmp_path, "1.png")
    manifest = csv(tmp_path / "m.csv", "path,label,group", "1.png,,")
    listed = list_images(manifest, "none", group="none")
    assert (listed.labels, listed.groups) == (None, None)


@pytest.mark.parametrize("path", [[b"\x89PNG"], [None], [float("nan")]])
def test_a_parquet_whose_path_is_no_text_is_refused(tmp_path: Path, path: Any) -> None:
    with pytest.raises(DataError, match=r"m\.parquet.*'image'"):
        list_images(parquet(tmp_path / "m.parquet", {"image": path}))


def test_a_damaged_parquet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a Parquet file, or is damaged"):
        list_images(touch(tmp_path, "m.parquet") / "m.parquet")


def test_a_manifest_of_nothing_but_held_out_images_is_embedded(tmp_path: Path) -> None:
    touch(tmp_path, "1.png", "2.png")
    found = gather(csv(tmp_path / "m.csv", "path,split", "1.png,test", "2.png,test"))
    assert found.ids == ("1.png", "2.png")
    assert found.held_out is None


def test_a_split_that_holds_out_nothing_is_as_good_as_none(tmp_path: Path) -> None:
    touch(tmp_path, "1.png")
    assert list_images(csv(tmp_path / "m.csv", "path,split", "1.png,train")).held_out is None


def test_a_file_is_found_whatever_links_lead_to_it(tmp_path: Path) -> None:
    touch(tmp_path, "store/1.png")
    (tmp_path / "set").symlink_to(tmp_path / "store")
    (tmp_path / "2.png").symlink_to(tmp_path / "store" / "1.png")
    assert len(list_images(csv(tmp_path / "m.csv", "path", "set/1.png", "2.png"))) == 2


# Tables of labels and groups


def test_labels_and_groups_can_come_from_tables(tmp_path: Path) -> None:
    touch(tmp_path, "images/a/1.png", "images/2.png")
    labels = csv(tmp_path / "labels.csv", "path,label", "2.png,dog", "a/1.png,cat", "gone.png,cow")
    groups = parquet(tmp_path / "groups.parquet", {"file": ["./2.png", "a/1.png"], "patient": [1, 2]})
    listed = list_images(tmp_path / "images", labels, group=str(groups))
    assert listed.ids == ("2.png", "a/1.png")
    assert listed.labels == ("dog", "cat")
    assert listed.groups == ("1", "2")
    assert "labels: 2 classes from" in listed.note
    assert gather(tmp_path / "images", str(labels)).labels == ("dog", "cat")


def test_a_table_may_name_images_as_seen_from_its_own_folder_or_absolutely(tmp_path: Path) -> None:
    touch(tmp_path, "images/1.png", "images/2.png")
    labels = csv(tmp_path / "labels.csv", "path,label", "images/1.png,cat", f"{tmp_path}/images/2.png,dog")
    assert list_images(tmp_path / "images", labels).labels == ("cat", "dog")
    assert list_images(f"{tmp_path}/images/*", labels).labels == ("cat", "dog")


def test_a_table_is_searched_without_looking_at_the_folder_of_each_image_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, relpath = [], os.path.relpath

    def noted(path: str, start: str) -> str:
        asked.append(path)
        return relpath(path, start)

    monkeypatch.setattr("jepakit.sources.table.os.path.relpath", noted)
    names = tuple(f"{folder}/{number}.png" for number in range(9) for folder in ("a", "b/c", "../e"))
    beside = [f"{folder}/{number}.png" for number in range(9) for folder in ("x/a", "x/b/c", "e")]
    found = Found(Files("/d/x", names), names)
    assert table._keys(dict.fromkeys(beside, "v"), found, "/d/t.csv") == beside
    assert asked == ["/d/x/a", "/d/x/b/c", "/d/e"]
    tops = Found(Files("/", ("1.png",)), ("1.png",))
    assert table._keys({"/1.png": "v"}, tops, "/d/t.csv") == ["/1.png"]


@pytest.mark.parametrize("path", ["images/sub/a.png", "C:/data/images/sub/a.png"])
def test_a_table_finds_images_by_its_slashes_where_paths_have_others(
    monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr("jepakit.sources.table.os", SimpleNamespace(path=ntpath, sep=ntpath.sep))
    found = Found(Files(r"C:\data\images", ("sub/a.png",)), ("sub/a.png",))
    assert table._keys({path: "v"}, found, r"C:\data\labels.csv") == [path]


def test_images_that_a_table_of_groups_lacks_are_named_and_counted(tmp_path: Path) -> None:
    touch(tmp_path, "images/1.png", "images/2.png", "images/3.png")
    groups = csv(tmp_path / "groups.csv", "path,group", "1.png,p1", "2.pgn,p1")
    with pytest.raises(
        DataError, match=r"2\.png is not in .*groups\.csv \(2 of 3 images are not\).*; did you mean 2\.pgn"
    ):
        list_images(tmp_path / "images", group=groups)


def test_images_that_labels_leave_out_have_none_and_are_counted(tmp_path: Path) -> None:
    touch(tmp_path, "1.png", "2.png", "3.png", "4.png")
    rows = ["path,label", "4.png,dog", "1.png,cat", "gone.png,cow", "2.png,", "3.png,cat"]
    table = csv(tmp_path / "labels.csv", *rows[:5])
    listed = list_images(tmp_path, table)
    assert listed.labels == ("cat", None, None, "dog")
    assert listed.labels_given() == listed.strata() == ("cat", "dog")
    assert listed.judges().tolist() == [0, 3]
    unused = "1 row of no image here, gone.png first"
    assert listed.note == f"labels: 2 classes from {table} ({unused}); 2 of 4 images are labelled"
    manifest = csv(tmp_path / "m.csv", *(row for row in rows if "gone" not in row))
    listed = list_images(manifest)
    assert listed.labels == ("dog", "cat", None, "cat")
    assert listed.note == "labels: 2 classes from the manifest's column label; 3 of 4 images are labelled"
    same = {"path": listed.ids, "label": ["dog", "cat", None, "cat"]}
    assert list_images(parquet(tmp_path / "m.parquet", same)).digest() == listed.digest()


def test_classes_that_differ_by_case_alone_are_told(tmp_path: Path) -> None:
    touch(tmp_path, "1.png", "2.png", "3.png")
    manifest = csv(tmp_path / "m.csv", "path,label", "1.png,Cat", "2.png,cat", "3.png,dog")
    told = "warning: Cat and cat are two classes, though only their letters' case differs"
    assert f"column label; {told}" in list_images(manifest).note
    pairs = [(tmp_path / f"{number}.png", label) for number, label in zip("123", ("Cat", "cat", "dog"), strict=True)]
    assert told in list_images(pairs).note.split("; ")


@pytest.mark.parametrize(
    ("one", "other"), [("no tumor", "no  tumor"), ("no tumor", "no\xa0tumor"), ("L\xe9sion", "Le\u0301sion")]
)
@pytest.mark.parametrize(("column", "things"), [("label", "classes"), ("patient", "groups")])
def test_names_that_look_alike_are_told(tmp_path: Path, one: str, other: str, column: str, things: str) -> None:
    touch(tmp_path, "1.png", "2.png", "3.png")
    manifest = csv(tmp_path / "m.csv", f"path,{column}", f"1.png,{one}", f"2.png,{other}", "3.png,dog")
    first, second = sorted((one, other))
    told = f"warning: {first!a} and {second!a} are two {things}, though they differ only in spaces"
    assert told in list_images(manifest).note


@pytest.mark.parametrize("word", ["nan", "NaN", "None", "null", "NA", "n/a", "#N/A", "<NA>"])
def test_words_for_nothing_are_labels_and_groups_with_a_warning(tmp_path: Path, word: str) -> None:
    touch(tmp_path, "1.png", "2.png", "3.png")
    manifest = csv(tmp_path / "m.csv", "path,label,group", "1.png,a,p1", f"2.png,{word},p2", f"3.png,{word},{word}")
    note = list_images(manifest).note
    assert f"warning: 2 images of the label {word}: if that stands for a missing label, leave it empty" in note
    assert f"warning: 1 image of the group {word}: if that stands for a missing group, give each of these" in note


def test_a_class_folder_may_be_called_none(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{kind}/{i}.png" for kind in ("none", "scratch") for i in range(10)))
    assert "warning" not in list_images(tmp_path, group="folder").note


def test_as_many_labels_as_images_are_told(tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(12)]
    touch(tmp_path, *names)
    manifest = csv(tmp_path / "m.csv", "path,target", *(f"{name},5{place}.3" for place, name in enumerate(names)))
    assert "warning: 12 images have 12 different labels: are these classes?" in list_images(manifest).note


def test_an_image_without_a_label_is_another_thing_than_any_label(tmp_path: Path) -> None:
    touch(tmp_path, "1.png", "2.png", "3.png")
    digests = {
        list_images(csv(tmp_path / "m.csv", "path,label", "1.png,a", f"2.png,{second}", f"3.png,{third}")).digest()
        for second, third in (("", "b"), ("b", ""), ("None", "b"), ("b", "b"), ("\x00b", ""))
    }
    assert len(digests) == 5


def test_labels_that_name_none_of_the_images_are_refused_with_both_names(tmp_path: Path) -> None:
    touch(tmp_path, "images/1.png", "images/2.png")
    table = csv(tmp_path / "labels.csv", "path,label", "scans/1.png,cat", "2.jpg,dog", "1.png,")
    with pytest.raises(
        DataError, match=r"labels\.csv gives none of 2 images a label: its first path is scans/1\.png, .* 1\.png: write"
    ):
        list_images(tmp_path / "images", table)


def test_labels_that_are_empty_for_every_image_are_said_to_be_so(tmp_path: Path) -> None:
    touch(tmp_path, "images/1.png", "images/2.png")
    table = csv(tmp_path / "labels.csv", "path,label", "1.png,", "2.png,", "3.png,cat")
    with pytest.raises(DataError, match=r"labels\.csv: the column of the labels is empty for all of 2 images"):
        list_images(tmp_path / "images", table)


def test_a_column_of_groups_beside_labels_is_not_passed_over_silently(tmp_path: Path) -> None:
    touch(tmp_path, "images/1.png", "images/2.png")
    labels = csv(tmp_path / "labels.csv", "path,label,plate", "1.png,cat,p1", "2.png,dog,p2")
    note = "its column plate is used only if the file is named as group, too"
    assert note in list_images(tmp_path / "images", labels).note
    both = list_images(tmp_path / "images", labels, group=labels)
    assert both.groups == ("p1", "p2")
    assert "its column" not in both.note


def test_a_table_of_groups_without_most_images_guesses_no_slip_of_the_pen(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{number}.png" for number in range(12)))
    for missing, meant in ((1, True), (11, False)):
        groups = csv(tmp_path / "groups.csv", "path,group", *(f"{number}.png,p" for number in range(12 - missing)))
        told = rf"\({missing} of 12 images are not\): add all images to it, those without labels too"
        with pytest.raises(DataError, match=told) as caught:
            list_images(tmp_path, "none", group=groups)
        assert ("did you mean" in str(caught.value)) == meant


def test_a_manifest_whose_labels_are_all_empty_has_none(tmp_path: Path) -> None:
    touch(tmp_path, "1.png", "2.png")
    manifest = csv(tmp_path / "m.csv", "path,class", "1.png,", "2.png, ")
    listed = list_images(manifest)
    assert (listed.labels, listed.note) == (None, "no labels: the manifest's column class is empty")
    assert gather(manifest).labels is None


def test_what_is_embedded_has_a_label_for_each_image_or_none_at_all(tmp_path: Path) -> None:
    touch(tmp_path, "1.png", "2.png", "3.png")
    table = csv(tmp_path / "m.csv", "path,label", "1.png,cat", "2.png,", "3.png,")
    for source, labels in ((table, "auto"), (tmp_path, table)):
        with pytest.raises(
            DataError, match=r"^2\.png has no label \(2 of 3 images have none\): to embed, .* or use labels none$"
        ):
            gather(source, labels)
    assert gather(table, "none").labels is None


def test_a_table_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "images/1.png")
    with pytest.raises(DataError, match=r"gives \./1\.png two values \(cat, dog\)"):
        list_images(tmp_path / "images", csv(tmp_path / "l.csv", "path,label", "1.png,cat", "./1.png,dog"))
    agreeing = csv(tmp_path / "l.csv", "path,label", "1.png,cat", "1.png,cat")
    assert list_images(tmp_path / "images", agreeing).labels == ("cat",)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": "fodler"}, r"labels = 'fodler': give auto, folder, none, or a file .*; did you mean folder\?"),
        ({"labels": "gone.csv"}, r"labels = 'gone.csv' \(there is no such file\)"),
        ({"group": "patients"}, r"group = 'patients': give auto, folder, none"),
        ({"labels": ["cat"]}, r"labels is of type list: give auto, .*; labels of your own go to the probe, fit\("),
        ({"labels": None}, "labels is of type NoneType: give auto"),
        ({"group": 3}, r"group is of type int: give auto, folder, none, or a file [^;]*$"),
    ],
)
def test_a_rule_that_is_neither_a_rule_nor_a_file_is_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    touch(tmp_path, "1.png")
    with pytest.raises(ConfigError, match=message):
        list_images(tmp_path, **settings)
