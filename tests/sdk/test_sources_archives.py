"""WebDataset shards and ZIPs: which members are images, and that each is read by itself and within limits."""

from __future__ import annotations

import io
import json
import multiprocessing
import pickle
import subprocess
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jepakit.errors import DataError, ImageError
from jepakit.readers.checks import RATIO_MATTERS_ABOVE
from jepakit.sources import ImageList, gather, list_images
from jepakit.sources.archives import DEFLATED, TAR, Archives, Member


def tar(path: Path, members: dict[str, bytes], mode: str = "w", format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, mode, format=format) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def zip_of(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def contents(images: ImageList) -> dict[str, Any]:
    return {ref.name: ref.data for ref in images}


def noise(count: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(count)


# Tars


def test_a_shards_images_are_named_by_shard_and_member_in_its_order(tmp_path: Path) -> None:
    members = {
        "b.jpg": noise(700),
        "b.txt": b"a caption",
        "a.png": noise(512, 1),
        "deep/c.left.tif": b"",
        ".d.png": b"x",
    }
    listed = list_images(tar(tmp_path / "shard-0.tar", members))
    assert listed.ids == ("shard-0.tar/b.jpg", "shard-0.tar/a.png", "shard-0.tar/deep/c.left.tif")
    assert contents(listed) == {f"shard-0.tar/{name}": members[name] for name in ("b.jpg", "a.png", "deep/c.left.tif")}


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
def test_names_of_any_length_and_alphabet_are_read(tmp_path: Path, format: int) -> None:
    name = f"{'long' * 60}/Ärzte.png"
    listed = list_images(tar(tmp_path / "a.tar", {name: b"1", "b.png": b"2"}, format=format))
    assert contents(listed) == {f"a.tar/{name}": b"1", "a.tar/b.png": b"2"}


@pytest.mark.parametrize("how", ["glob", "list", "folder"])
def test_many_shards_are_one_source(tmp_path: Path, how: str) -> None:
    files = [tar(tmp_path / f"{i}.tar", {f"{i}.jpg": bytes([i])}) for i in range(3)]
    listed = list_images({"glob": f"{tmp_path}/*.tar", "list": files, "folder": tmp_path}[how])
    assert contents(listed) == {f"{i}.tar/{i}.jpg": bytes([i]) for i in range(3)}
    assert ("the source: 3 archives in" in listed.note) == (how == "folder")


def test_a_shard_listed_twice_is_no_twice_as_many_images(tmp_path: Path) -> None:
    shard = tar(tmp_path / "a.tar", {"1.png": noise(9)})
    for listing in (list_images, gather):
        with pytest.raises(DataError, match=r"a\.tar more than once: give each archive once"):
            listing([shard, f"{tmp_path}/./a.tar"])


def test_shards_of_the_same_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        tar(tmp_path / folder / "0.tar", {"a.jpg": folder.encode()})
    listed = list_images(tmp_path)
    assert contents(listed) == {f"{tmp_path}/{folder}/0.tar/a.jpg": folder.encode() for folder in ("x", "y")}


def test_archives_beside_images_are_passed_over_and_counted(tmp_path: Path) -> None:
    tar(tmp_path / "backup.tar", {"a.jpg": b"x"})
    (tmp_path / "b.png").write_bytes(b"y")
    listed = list_images(tmp_path)
    assert listed.ids == ("b.png",)
    assert "1 archive beside the images passed over" in listed.note


def test_members_of_a_format_that_is_not_read_are_counted(tmp_path: Path) -> None:
    names = ("a.png", "a.txt", "b.czi", "c.heic", "IM01", "inner.zip", ".d.czi")
    members = dict.fromkeys(names, b"x")
    told = (
        "1 .heic file passed over: HEIC and AVIF are not read, save them as JPEG or PNG; "
        "1 file without a suffix passed over: {}; "
        "1 file passed over (1 .zip): unpack what holds images; "
        "1 file passed over (1 .czi): not read, convert what holds images to TIFF, PNG or .npy"
    )
    zipped, shard = zip_of(tmp_path / "a.zip", members), tar(tmp_path / "a.tar", members)
    for source, bare in (
        (zipped, "of such files only DICOM is read"),
        (shard, "in a .tar only files with the suffix of an image are read"),
    ):
        assert list_images(source).note.endswith(f"; {told.format(bare)}")
    with pytest.raises(DataError, match=r"b\.zip holds no images .*; 1 file passed over \(1 \.czi\)"):
        list_images(zip_of(tmp_path / "b.zip", {"b.czi": b"x"}))


def test_a_shards_labels_come_from_cls_or_json_of_the_same_key(tmp_path: Path) -> None:
    members = {
        "x/1.jpg": b"", "x/1.cls": b"7\n", "2.json": json.dumps({"label": "cat", "other": 1}).encode(), "2.jpg": b"",
        "3.png": b"", "3.json": b'{"label": 4}',
    }  # fmt: skip
    listed = list_images(tar(tmp_path / "a.tar", members))
    assert listed.labels == ("7", "cat", "4")
    assert "3 classes from .cls and .json" in listed.note
    assert list_images(tmp_path / "a.tar", "none").labels is None
    same = {"1.jpg": b"", "1.cls": "\ufeffcat".encode(), "2.jpg": b"", "2.json": b'{"label": " cat "}'}
    assert list_images(tar(tmp_path / "b.tar", same)).labels == ("cat", "cat")
    assert list_images(tar(tmp_path / "c.tar", {"1.jpg": b"", "1.json": b'{"label": ""}'})).labels is None


def test_an_image_whose_name_has_dots_has_the_label_of_its_own_name(tmp_path: Path) -> None:
    members = {f"scan.{day}.{ending}": data for day, word in (("01", b"cat"), ("02", b"dog")) for ending, data in
               (("png", b"?"), ("cls", word), ("json", b'{"label": "fox"}'))}  # fmt: skip
    shard = tar(tmp_path / "s.tar", {**members, "._scan.01.cls": b"\xa3", "one.cls": b"bee", "one.left.png": b"?"})
    assert list_images(shard).labels == ("cat", "dog", "bee")
    torn = tar(tmp_path / "t.tar", {"1.a.cls": b"cat", "1.b.cls": b"dog", "1.c.png": b"?"})
    with pytest.raises(
        DataError, match=r"1\.c\.png could have any of the labels cat, dog: give it a \.cls file of its own"
    ):
        list_images(torn)
    assert list_images(torn, "none").labels is None


def test_a_member_that_was_added_again_replaces_the_earlier_with_its_label(tmp_path: Path) -> None:
    shard = tar(tmp_path / "a.tar", {"1.jpg": b"old", "1.cls": b"cat", "2.jpg": b"2", "2.cls": b"dog", "2.json": b"{}"})
    tar(shard, {"./1.jpg": b"new", "1.cls": b"dog", "2.json": b'{"label": "cat"}'}, "a")
    listed = list_images(shard)
    assert contents(listed) == {"a.tar/1.jpg": b"new", "a.tar/2.jpg": b"2"}
    assert listed.labels == ("dog", "dog"), "of 2 the .cls, which comes first"
    assert len(listed) == 2
    tar(shard, {"1.cls": b""}, "a")
    assert list_images(shard).labels == (None, "dog")


def test_a_shard_may_have_labels_for_some_images_or_none(tmp_path: Path) -> None:
    shard = tar(tmp_path / "a.tar", {"1.jpg": b"", "1.cls": b"0", "2.jpg": b"", "2.json": b"[]"})
    listed = list_images(shard)
    assert listed.labels == ("0", None)
    assert "labels: 1 class from .cls and .json" in listed.note
    assert "1 of 2 images are labelled" in listed.note
    with pytest.raises(
        DataError, match=r"a\.tar/2\.jpg has no label \(1 of 2 images have none\): .* or use labels none"
    ):
        gather(shard, "auto")
    without = list_images(tar(tmp_path / "b.tar", {"1.jpg": b"", "2.jpg": b""}))
    assert without.labels is None
    assert "no labels: no image has a .cls, or a label in .json" in without.note


@pytest.mark.parametrize(
    ("name", "data"), [("1.json", b"{"), ("1.cls", b"\xff"), ("1.json", b'{"label": [1]}'), ("1.cls", b"x" * 1_000_001)]
)
def test_a_label_that_cannot_be_read_is_named_unless_no_labels_are_wanted(
    tmp_path: Path, name: str, data: bytes
) -> None:
    tar(tmp_path / "a.tar", {"1.jpg": b"", name: data})
    with pytest.raises(DataError, match=rf"a\.tar: .*{name}"):
        list_images(tmp_path / "a.tar")
    assert len(list_images(tmp_path / "a.tar", "none")) == 1


def test_folders_in_shards_are_classes_only_when_asked_for(tmp_path: Path) -> None:
    members = {f"{kind}/{i}.jpg": b"" for kind in ("cat", "dog") for i in range(10)}
    assert list_images(tar(tmp_path / "a.tar", members)).labels is None
    assert set(list_images(tmp_path / "a.tar", "folder").labels or ()) == {"cat", "dog"}


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz"])
def test_compressed_tars_are_refused_with_a_remedy(tmp_path: Path, name: str, mode: str) -> None:
    tar(tmp_path / name, {"1.jpg": b""}, mode)
    with pytest.raises(DataError, match=rf"{name} is compressed with .*: decompress it to a plain \.tar"):
        list_images(tmp_path / name)


def damaged_header(data: bytes) -> bytes:
    return data[:1024] + b"\xff" * 512 + data[1536:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damaged_header, "damaged at byte 1,024"),
        (lambda data: data[:1300], "damaged at byte 1,024"),
        (lambda data: data[:1700], "cut short in the middle of 1.jpg"),
        (lambda data: b"no tar" * 200, "not a tar"),
        (lambda data: b"", "not a tar"),
        (lambda data: data[:1024] + bytes(512) + data[1536:], r"goes on after the zeros .* \(byte 1,024\)"),
        (lambda data: data + data, r"goes on after the zeros .* \(byte 3,072\)"),
        (lambda data: data[:1024] + bytes(20_000_000), "ends at byte 1,024 of 20,001,024: copy it again"),
    ],
    ids=["header", "cut in a header", "cut in an image", "text", "empty", "zeroed", "joined", "unfinished"],
)
def test_damaged_tars_are_refused(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    file = tar(tmp_path / "a.tar", {f"{i}.jpg": noise(400) for i in range(3)})
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=message):
        list_images(file)


@pytest.mark.parametrize("name", ["1.png", "1.cls"])
def test_a_sparse_file_in_a_tar_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    with (tmp_path / name).open("wb") as file:
        file.truncate(1_000_000)
    (tmp_path / "0.png").write_bytes(b"0")
    subprocess.run(["tar", "--sparse", "-cf", "a.tar", "0.png", name], cwd=tmp_path, check=True)
    with pytest.raises(DataError, match=f"{name} is stored as a sparse file: make the tar without --sparse"):
        list_images(tmp_path / "a.tar")


def test_links_and_dangerous_names_in_a_tar_harm_nobody(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, link in (("../../etc/x.jpg", ""), ("/abs/y.jpg", ""), ("z.jpg", "/etc/passwd")):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = (tarfile.SYMTYPE, link) if link else (tarfile.REGTYPE, "")
            archive.addfile(entry)
    listed = list_images(tmp_path / "a.tar")
    assert contents(listed) == {"a.tar/../../etc/x.jpg": b"", "a.tar//abs/y.jpg": b""}
    assert "1 symbolic link passed over (z.jpg first)" in listed.note
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        entry = tarfile.TarInfo("z.jpg")
        entry.type, entry.linkname = tarfile.SYMTYPE, "y.jpg"
        archive.addfile(entry)
    with pytest.raises(
        DataError, match=r"b\.tar holds no images .* 1 symbolic link passed over .*: tar them with --deref"
    ):
        list_images(tmp_path / "b.tar")


def test_a_hard_link_is_the_image_or_label_that_it_names_and_refused_where_that_is_missing(tmp_path: Path) -> None:
    def made(*links: tuple[str, str]) -> Path:
        file = tar(tmp_path / "a.tar", {"./1.png": noise(700), "./1.cls": b"cat"})
        with tarfile.open(file, "a") as archive:
            for name, to in links:
                entry = tarfile.TarInfo(name)
                entry.type, entry.linkname = tarfile.LNKTYPE, to
                archive.addfile(entry)
        return file

    listed = list_images(made(("./2.png", "./1.png"), ("./2.cls", "./1.cls"), ("notes.txt", "gone.txt")))
    assert contents(listed) == {"a.tar/1.png": noise(700), "a.tar/2.png": noise(700)}
    assert listed.labels == ("cat", "cat")
    with pytest.raises(DataError, match=r"2\.png is a hard link to gone\.png, which is not an image stored before it"):
        list_images(made(("2.png", "gone.png")))


# ZIPs


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_a_zip_is_read_as_the_folder_that_was_zipped(tmp_path: Path, compression: int) -> None:
    members = {f"{kind}/{i}.png": noise(3000, i) for kind in ("dog", "cat") for i in (*range(10), 10)}
    members |= {"__MACOSX/cat/._1.png": b"", "notes.txt": b"x"}
    zip_of(tmp_path / "a.zip", members, compression)
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        archive.extractall(tmp_path / "folder")
    listed, unpacked = list_images(tmp_path / "a.zip"), list_images(tmp_path / "folder")
    assert (listed.ids, listed.labels, listed.note) == (unpacked.ids, unpacked.labels, unpacked.note)
    assert contents(listed) == {ref.name: Path(str(ref.data)).read_bytes() for ref in unpacked}


def test_several_zips_are_named_before_their_members(tmp_path: Path) -> None:
    files = [zip_of(tmp_path / f"{i}.zip", {"cat/1.png": bytes([i])}) for i in range(2)]
    assert contents(list_images(files)) == {"0.zip/cat/1.png": b"\0", "1.zip/cat/1.png": b"\1"}
    assert list_images(files, "folder").labels == ("cat", "cat")


def test_a_zip_behind_other_bytes_is_read(tmp_path: Path) -> None:
    file = zip_of(tmp_path / "a.zip", {"1.png": b"pixels"})
    file.write_bytes(b"self-extracting stub" + file.read_bytes())
    assert contents(list_images(file)) == {"1.png": b"pixels"}


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_a_name_that_is_in_a_zip_twice_is_the_later_file_as_when_it_is_unpacked(tmp_path: Path) -> None:
    file = zip_of(tmp_path / "a.zip", {"b.png": b"old", "a.png": b"a"})
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("b.png", b"new")
    listed = list_images(file)
    assert (listed.ids, contents(listed)) == (("a.png", "b.png"), {"a.png": b"a", "b.png": b"new"})


def test_an_encrypted_member_is_refused_by_name(tmp_path: Path) -> None:
    data = bytearray(zip_of(tmp_path / "a.zip", {"1.png": b"x"}).read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(DataError, match=r"1\.png is encrypted: make a ZIP without a password"):
        list_images(tmp_path / "a.zip")


def test_a_rare_compression_is_refused_by_name(tmp_path: Path) -> None:
    zip_of(tmp_path / "a.zip", {"1.png": b"x"}, zipfile.ZIP_LZMA)
    with pytest.raises(DataError, match=r"1\.png is compressed by method 14"):
        list_images(tmp_path / "a.zip")


def refused(images: ImageList, code: str) -> str:
    with pytest.raises(ImageError) as caught:
        images[0]
    assert caught.value.code == code
    return str(caught.value)


def test_a_bomb_is_refused_before_it_is_inflated(tmp_path: Path) -> None:
    listed = list_images(zip_of(tmp_path / "a.zip", {"bomb.png": bytes(20_000_000)}))
    assert "would decode to 20,000,000" in refused(listed, "too_large")


def test_a_member_swells_as_much_as_any_file_before_it_is_called_a_bomb(tmp_path: Path) -> None:
    data = bytes(RATIO_MATTERS_ABOVE)
    assert list_images(zip_of(tmp_path / "a.zip", {"1.png": data}))[0].data == data


def test_a_member_that_is_declared_too_large_is_refused(tmp_path: Path) -> None:
    data = bytearray(zip_of(tmp_path / "a.zip", {"1.png": b"x" * 1000}).read_bytes())
    place = data.index(b"PK\1\2") + 24
    data[place : place + 4] = (3 << 30).to_bytes(4, "little")
    (tmp_path / "a.zip").write_bytes(data)
    assert "3,221,225,472 bytes, the limit is 2,147,483,648" in refused(list_images(tmp_path / "a.zip"), "too_large")


def test_a_member_that_inflates_to_more_than_declared_is_cut_off_and_refused(tmp_path: Path) -> None:
    data = bytearray(zip_of(tmp_path / "a.zip", {"1.png": b"x" * 1000}).read_bytes())
    place = data.index(b"PK\1\2") + 24
    data[place : place + 4] = (10).to_bytes(4, "little")
    (tmp_path / "a.zip").write_bytes(data)
    assert "1.png: damaged" in refused(list_images(tmp_path / "a.zip"), "unreadable")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_a_flipped_bit_in_a_zip_is_noticed(tmp_path: Path, compression: int) -> None:
    data = bytearray(zip_of(tmp_path / "a.zip", {"1.png": noise(500)}, compression).read_bytes())
    data[200] ^= 1
    (tmp_path / "a.zip").write_bytes(data)
    assert "1.png" in refused(list_images(tmp_path / "a.zip"), "unreadable")


@pytest.mark.parametrize("data", [b"", b"no zip", b"PK\3\4 cut"])
def test_a_file_that_is_no_zip_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.zip is not a ZIP"):
        list_images(tmp_path / "a.zip")


@pytest.mark.parametrize("make", [tar, zip_of])
def test_an_archive_without_images_says_what_was_looked_for(tmp_path: Path, make: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"holds no images \(looked for"):
        list_images(make(tmp_path / f"a.{make.__name__[:3]}", {"a.txt": b"x"}))


def test_kinds_of_archives_are_not_mixed_with_each_other_or_with_images(tmp_path: Path) -> None:
    files = [tar(tmp_path / "a.tar", {"1.png": b""}), zip_of(tmp_path / "a.zip", {"1.png": b""})]
    (tmp_path / "1.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.zip and 1 other mix \.zip and \.tar"):
        list_images(files)
    with pytest.raises(DataError, match=r"a\.tar is in a list of image files"):
        list_images([tmp_path / "1.png", files[0]])


# In workers


def both(tmp_path: Path) -> list[ImageList]:
    members = {f"{i}.png": noise(5000, i) for i in range(30)}
    return [list_images(tar(tmp_path / "a.tar", members)), list_images(zip_of(tmp_path / "a.zip", members))]


def test_an_archive_gone_or_changed_after_listing_is_an_image_error(tmp_path: Path) -> None:
    for listed, file in zip(both(tmp_path), (tmp_path / "a.tar", tmp_path / "a.zip"), strict=True):
        file.write_bytes(file.read_bytes()[:600])
        with pytest.raises(ImageError, match=r"9\.png: "):
            listed[29]
        file.unlink()
        assert "0.png: cannot be read" in refused(listed, "unreadable")
        assert listed.digest()


def test_the_digest_changes_with_the_content_of_a_member(tmp_path: Path) -> None:
    for write, name in ((tar, "a.tar"), (partial(zip_of, compression=zipfile.ZIP_STORED), "a.zip")):
        before, after = (list_images(write(tmp_path / name, {"1.png": noise(100, seed)})).digest() for seed in (1, 2))
        assert before != after


def test_members_beyond_four_gigabytes_are_read(tmp_path: Path) -> None:
    place = 5 << 30
    with (tmp_path / "a.tar").open("wb") as file:  # a file with a hole
        file.seek(place)
        file.write(b"far away")
    archives = Archives.of([str(tmp_path / "a.tar")], ["a.tar/1.png"], [[Member("1.png", place, 8, 8, TAR, 0)]])
    assert archives.image(0) == b"far away"


def test_a_member_that_claims_to_be_empty_is_not_unpacked(tmp_path: Path) -> None:
    packed = zip_of(tmp_path / "a.zip", {"1.png": bytes(50_000_000)})
    with zipfile.ZipFile(packed) as file:
        info = file.getinfo("1.png")
    member = Member("1.png", info.header_offset, info.compress_size, 0, DEFLATED, 0)
    tracemalloc.start()
    with pytest.raises(ImageError, match="its bytes are not those declared"):
        Archives.of([str(packed)], ["a.zip/1.png"], [[member]]).image(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


def test_members_are_read_rightly_after_pickling_and_from_many_threads(tmp_path: Path) -> None:
    for listed in both(tmp_path):
        expected = [ref.data for ref in listed]
        again: ImageList = pickle.loads(pickle.dumps(listed))
        assert (again.ids, again.digest()) == (listed.ids, listed.digest())
        with ThreadPoolExecutor(8) as pool:
            got = list(pool.map(again.__getitem__, [*range(30)] * 10))
        assert [ref.data for ref in got] == expected * 10


def read_all(images: ImageList, send: Any) -> None:
    send.send([images[place % 30].data for place in range(300)])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_members_are_read_rightly_in_forked_workers_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for listed in both(tmp_path):
        expected = [ref.data for ref in listed]
        pipes = [context.Pipe(duplex=False) for _ in range(3)]
        workers = [context.Process(target=read_all, args=(listed, send)) for _, send in pipes]
        for worker in workers:
            worker.start()
        for receive, _ in pipes:
            assert receive.recv() == expected * 10
        for worker in workers:
            worker.join()


def test_gather_takes_archives_too(tmp_path: Path) -> None:
    assert gather(zip_of(tmp_path / "a.zip", {"x/1.png": b"", "y/2.png": b""}), "folder").labels == ("x", "y")


def test_a_cls_goes_before_a_json_that_stands_before_it(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("a.png", b"x"), ("a.json", b'{"label": "json"}'), ("a.cls", b"cls")):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    assert list_images(tmp_path / "a.tar").labels == ("cls",)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_with_extra_fields_as_zip_and_finder_write_them_are_read(tmp_path: Path, method: int) -> None:
    """Info-ZIP writes 28 bytes of times and owners before each member's data, and 24 into the directory."""
    members = {"a.png": noise(900), "b.png": noise(800, 1)}
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
        for name, data in members.items():
            entry = zipfile.ZipInfo(name)
            entry.compress_type, entry.extra = method, b"UT\x09\0\x03" + bytes(8) + b"ux\x0b\0\x01\x04" + bytes(9)
            archive.writestr(entry, data)
            entry.extra = entry.extra[:13]  # the directory is written at the end
    assert contents(list_images(tmp_path / "a.zip", "none")) == members
