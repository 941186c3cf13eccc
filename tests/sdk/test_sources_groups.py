"""Groups, patients, strata, and folders of many thousands of files."""

from __future__ import annotations

import os
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tests.files import touch

from jepakit._groups import numbered
from jepakit.errors import DataError, ImageError
from jepakit.sources import gather, list_images


@pytest.fixture
def headers_read(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replace the DICOM header reader: a file's text is its PatientID. Returns the files it was asked for."""
    asked: list[Any] = []

    def dicom_group(source: Any) -> str | None:
        asked.append(source)
        text = source.decode() if isinstance(source, bytes) else Path(source).read_text()
        if text == "damaged":
            raise ImageError(f"{source}: damaged", code="unreadable")
        return f"hash of {text}" if text else None

    monkeypatch.setattr("jepakit.sources.patients.dicom_group", dicom_group)
    return asked


# Patients


def series(root: Path, patient: str, folder: str, count: int) -> None:
    touch(root, *(f"{folder}/{i:03}.dcm" for i in range(count)), content=patient)


def test_dicom_files_are_grouped_by_patient_whatever_their_folders(tmp_path: Path, headers_read: list[Any]) -> None:
    series(tmp_path, "Ann", "a/first", 2)
    series(tmp_path, "Ann", "b/second", 1)
    series(tmp_path, "Bob", "b/third", 1)
    listed = list_images(tmp_path)
    assert listed.groups == ("patient 1", "patient 1", "patient 1", "patient 2")
    assert "groups: 2 patients by DICOM PatientID" in listed.note
    assert len(headers_read) == 4


def test_patients_are_known_whatever_dicom_files_are_called(tmp_path: Path, headers_read: list[Any]) -> None:
    names = ["a/1.ima", "a/2.DICOM", "a/1.2.840.17", "b/3.dcm"]
    for name, patient in zip(names, ("ann", "bob", "ann", "bob"), strict=True):
        touch(tmp_path, name, content=patient)
    listed = list_images([tmp_path / name for name in names])
    assert listed.groups == ("patient 1", "patient 2", "patient 1", "patient 2")


def test_files_without_a_suffix_that_are_no_dicom_have_no_groups_and_no_note(tmp_path: Path) -> None:
    listed = list_images([touch(tmp_path, "scan1", "scan2") / name for name in ("scan1", "scan2")])
    assert listed.groups is None
    assert "DICOM" not in listed.note


@pytest.mark.usefixtures("headers_read")
def test_images_of_no_known_patient_stay_on_their_own(tmp_path: Path) -> None:
    touch(tmp_path, "1.dcm", "2.dcm", content="Ann")
    touch(tmp_path, "3.dcm", content="damaged")
    touch(tmp_path, "4.dcm", "5.png", content="")
    listed = list_images(tmp_path)
    assert listed.groups == ("patient 1", "patient 1", "3.dcm", "4.dcm", "5.png")
    assert "3 images without one each on their own" in listed.note


@pytest.mark.usefixtures("headers_read")
def test_anonymous_dicom_files_have_no_groups_and_the_note_says_so(tmp_path: Path) -> None:
    listed = list_images(touch(tmp_path, "1.dcm", "2.dcm", content=""))
    assert listed.groups is None
    assert "none of 2 DICOM files names its patient" in listed.note


def test_no_header_is_read_when_no_groups_are_wanted(tmp_path: Path, headers_read: list[Any]) -> None:
    touch(tmp_path, "1.dcm", "2.png")
    assert list_images(tmp_path, group="none").groups is None
    assert gather(tmp_path).groups is None
    assert headers_read == []


def test_a_folder_for_each_patient_is_no_class(tmp_path: Path, headers_read: list[Any]) -> None:
    for patient in ("Ann", "Bob", "Cem"):
        series(tmp_path, patient, f"case-{patient}", 40)
    listed = list_images(tmp_path, group="none")
    assert listed.labels is None
    assert "each first-level folder holds one patient" in listed.note
    assert len(headers_read) == 12, "a few files of each folder are enough"
    assert list_images(tmp_path, "folder").labels is not None


@pytest.mark.usefixtures("headers_read")
@pytest.mark.parametrize("patients", [("Ann", "Bob", "Ann"), ("", "", "")], ids=["mixed", "anonymous"])
def test_folders_of_dicom_files_that_are_not_patients_may_be_classes(tmp_path: Path, patients: tuple[str, ...]) -> None:
    for place, patient in enumerate(patients):
        series(tmp_path, patient, "sick" if place else "healthy", 10)
        series(tmp_path, f"{patient}2" if patient else "", "sick/more" if place else "healthy/more", 10)
    assert set(list_images(tmp_path).labels or ()) == {"healthy", "sick"}


# Folders


def test_groups_by_folder_are_the_deepest_ones(tmp_path: Path) -> None:
    touch(tmp_path, "a/x/1.png", "a/x/2.png", "a/y/3.png", "b/4.png", "5.png")
    listed = list_images(tmp_path, group="folder")
    assert listed.groups == (".", "a/x", "a/x", "a/y", "b")
    assert "groups: 4 folders, e.g. a/x (2 images)" in listed.note


def test_other_images_have_no_groups_by_themselves(tmp_path: Path) -> None:
    assert list_images(touch(tmp_path, "a/1.png", "b/2.png")).groups is None


def test_strata_are_labels_or_first_level_folders_if_few(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.png", "a/x/2.png", "b/3.png", "4.png")
    assert list_images(tmp_path).strata() == ("", "a", "a", "b")
    touch(tmp_path / "many", *(f"{i}/1.png" for i in range(51)))
    assert list_images(tmp_path / "many").strata() is None
    labelled = list_images(tmp_path / "many", "folder")
    assert labelled.strata() == labelled.labels


# Many files, strange files


def test_other_kinds_of_images_are_passed_over_and_told(tmp_path: Path) -> None:
    strange = [f"{i}.HEIC" for i in range(2)] + ["brain.nii.gz", "IM01", "series/1.2.840.17", "notes.txt", "m.csv.gz"]
    folder = touch(tmp_path, *strange)
    told = (
        "2 .heic files passed over: HEIC and AVIF are not read, save them as JPEG or PNG; "
        "1 .nii.gz file passed over: NIfTI is not read, save its slices as TIFF or .npy; "
        "2 files without a suffix passed over: of such files only DICOM is read"
    )
    with pytest.raises(DataError) as caught:
        list_images(folder)
    assert str(caught.value).endswith(f"in subfolders too); {told}")
    touch(tmp_path, "a.png")
    assert list_images(folder).note.endswith(told)
    assert list_images(f"{folder}/**").note.endswith(told), "the folder series is no file without a suffix"


def test_files_of_a_format_that_is_not_read_are_counted_and_those_that_hold_no_images_are_not(tmp_path: Path) -> None:
    strange = [f"{i}.CZI" for i in range(3)] + ["1.pgm", "2.pgm", "c/1.nef", "old.rar", "a.tif.gz"]
    touch(tmp_path, *strange, "a.png", "Thumbs.db", "readme.md", "a.json", "boxes.xml", "a.csv.gz", "model.pth")
    told = (
        "2 files passed over (1 .rar, 1 .tif.gz): unpack what holds images; "
        "6 files passed over (3 .czi, 2 .pgm, 1 .nef): not read, convert what holds images to TIFF, PNG or .npy"
    )
    for source in (tmp_path, f"{tmp_path}/**"):
        assert list_images(source).note.endswith(f"; {told}")


def test_no_file_is_statted_in_a_folder_of_thousands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{folder}/{i:04}.png" for folder in ("a", "b", "c") for i in range(1000)]
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "list.csv").write_text("path\n" + "\n".join(names))
    calls = 0

    def counting(real: Any) -> Any:
        def stat(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            return real(*args, **options)

        return stat

    for name in ("stat", "lstat"):
        monkeypatch.setattr(os, name, counting(getattr(os, name)))
    assert len(list_images(tmp_path)) == 3000
    assert len(list_images(tmp_path / "list.csv")) == 3000
    assert len(list_images(f"{tmp_path}/*/*.png")) == 3000
    assert len(list_images([tmp_path / name for name in names])) == 3000
    assert calls < 100


def test_the_digest_opens_at_most_256_files_but_knows_every_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, *(f"{i:04}.png" for i in range(1000)))
    listed = list_images(tmp_path)
    opened: list[Path] = []
    real = Path.open

    def noticing(path: Path, *args: Any, **options: Any) -> Any:
        if path.is_relative_to(tmp_path):  # other threads open files too
            opened.append(path)
        return real(path, *args, **options)

    monkeypatch.setattr(Path, "open", noticing)
    before = listed.digest()
    assert len(opened) == 256
    assert opened[0].name == "0000.png"
    assert opened[-1].name == "0999.png"
    sampled = {path.name for path in opened}
    other = next(name for name in listed.ids if name not in sampled)
    (tmp_path / other).rename(tmp_path / f"{other[:4]}x.png")
    assert list_images(tmp_path).digest() != before


def test_the_digest_knows_labels_groups_and_what_is_held_out(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{kind}/{i}.png" for kind in "ab" for i in range(10)))
    names = [f"{kind}/{i}.png" for kind in "ab" for i in range(10)]
    seen = {
        list_images(tmp_path, labels, group=group).digest()
        for labels in ("auto", "none")
        for group in ("none", "folder")
    }
    for held_out in (names[0], names[1]):
        rows = [f"{name},{'test' if name == held_out else 'train'}" for name in names]
        (tmp_path / "m.csv").write_text("\n".join(["path,split", *rows]))
        seen.add(list_images(tmp_path / "m.csv").digest())
    assert len(seen) == 6


_BARE = {"IM002": "DICM", "S1/1.2.840.17": "DICM", "S1/x.png": "", "README": "notes", "short": "x", "DICOMDIR": "DICM"}


@pytest.mark.parametrize("kind", ["folder", "glob", "zip"])
def test_dicom_files_without_a_suffix_are_known_by_their_first_bytes(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "study"
    for name, letters in _BARE.items():
        touch(folder, name, content="\0" * 128 + letters)
    touch(folder, ".hidden/IM003", content="\0" * 128 + "DICM")
    with zipfile.ZipFile(tmp_path / "study.zip", "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder).as_posix())
    listed = list_images({"folder": folder, "glob": f"{folder}/**", "zip": tmp_path / "study.zip"}[kind])
    assert [name.removeprefix(f"{folder}/") for name in listed.ids] == ["IM002", "S1/1.2.840.17", "S1/x.png"]
    if kind != "zip":
        assert listed.note.endswith("3 files without a suffix passed over: of such files only DICOM is read")


def test_a_folder_of_files_without_suffix_that_are_no_dicom_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 files without a suffix passed over: of such files only DICOM is read"):
        list_images(touch(tmp_path, "IM001", "x/IM002", "notes.txt"))


def test_a_folder_in_a_list_is_called_a_folder(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.png", "2.png")
    with pytest.raises(DataError, match=r"a is a folder: give its images, or the folder by itself \(1 of 2"):
        list_images([tmp_path / "2.png", tmp_path / "a"])


def test_a_link_to_itself_is_named_not_a_traceback(tmp_path: Path) -> None:
    (touch(tmp_path, "1.png") / "loop.png").symlink_to("loop.png")
    with pytest.raises(DataError, match=r"loop\.png cannot be listed \(Too many levels of symbolic links\)"):
        list_images(tmp_path)


def test_items_are_counted_from_either_end(tmp_path: Path) -> None:
    listed = list_images(touch(tmp_path, "1.png", "2.png"))
    assert listed[1].name == listed[-1].name == "2.png"
    with pytest.raises(IndexError):
        listed[2]


def test_a_long_name_of_a_group_costs_the_others_nothing() -> None:
    names = [*(f"patient {number}" for number in range(5000)), "x" * 5000]
    tracemalloc.start()
    try:
        assert numbered(names, 5001).tolist() == list(range(5001))
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.usefixtures("headers_read")
def test_folders_of_a_patient_each_are_classes_where_a_patient_has_two(tmp_path: Path) -> None:
    for kind, patient in (("healthy", "Ann"), ("sick", "Ann"), ("worse", "Bob")):
        series(tmp_path, patient, kind, 10)
    assert set(list_images(tmp_path).labels or ()) == {"healthy", "sick", "worse"}
