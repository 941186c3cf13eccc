"""The images of WebDataset shards, found by one pass over a tar's headers; nothing is ever extracted."""

from __future__ import annotations

import json
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from jepakit._files import reason_of
from jepakit._messages import counted, joined
from jepakit._progress import track
from jepakit.errors import DataError
from jepakit.sources.archives import TAR, Archives, Member, names_in_shards
from jepakit.sources.files import is_hidden, is_image
from jepakit.sources.passed import passed_over
from jepakit.sources.store import Found

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_MAX_SIDECAR_BYTES = 1_000_000
_MOST_ZEROS = 16 * 2**20
"""The most bytes after a tar's last member; more than any record size that tars are padded to."""


def find_in_tars(paths: Sequence[str], *, with_labels: bool) -> Found:
    """The images of one or many shards, with the labels stored beside them."""
    indexes = [_index(path, with_labels=with_labels) for path in track(paths, "shards", progress=len(paths) > 1)]
    members = [shard.members for shard in indexes]
    labels = [label for shard in indexes for label in shard.labels]
    links = [link for shard in indexes for link in shard.links]
    others = passed_over((name for shard in indexes for name in shard.others), bare_dicom=False)
    ids, classes = names_in_shards(paths, members), set(labels) - {None}
    note = "no labels: no image has a .cls, or a label in .json"
    if classes:
        note = f"labels: {counted(len(classes), 'class')} from .cls and .json"
    return Found(
        Archives.of(paths, ids, members),
        ids,
        folders=[member.name for each in members for member in each],
        labels=tuple(labels) if classes else None,
        label_note=note,
        note=joined(_of_links(links), others),
    )


def _of_links(links: Sequence[str]) -> str:
    if not links:
        return ""
    return f"{counted(len(links), 'symbolic link')} passed over ({links[0]} first): tar them with --dereference"


class _Index(NamedTuple):
    """The image members of a tar in order, the label of each, and the names of symbolic links and of other visible files."""

    members: list[Member]
    labels: list[str | None]
    links: list[str]
    others: list[str]


def _index(path: str, *, with_labels: bool) -> _Index:
    """What an uncompressed tar holds.

    A label is the content of `KEY.cls`, else "label" in `KEY.json`, where KEY is the image's name up to its last dot
    or, if there is no such file, up to its first; None if there is neither, or labels are not asked for. Of members
    with the same name the last counts, as when unpacking; a hard link stands for the earlier member that it names.
    Raises DataError for compressed or damaged tars, and for an image whose label is ambiguous.
    """
    members: dict[str, Member] = {}
    sidecars: dict[str, str | None] = {}
    links: list[str] = []
    others: list[str] = []
    try:
        with Path(path).open("rb") as file:
            for entry in _entries(path, file):
                name = entry.name.removeprefix("./")
                is_sidecar = with_labels and name.endswith((".cls", ".json")) and not is_hidden(name)
                if entry.issym():
                    links += [name] if is_sidecar or is_image(name) else []
                elif entry.islnk():
                    _link(path, name, entry.linkname.removeprefix("./"), members, sidecars)
                elif entry.issparse() and (is_sidecar or is_image(name)):
                    raise DataError(f"{path}: {name} is stored as a sparse file: make the tar without --sparse")
                elif is_image(name):
                    members[name] = Member(name, entry.offset_data, entry.size, entry.size, TAR, 0)
                elif is_sidecar:
                    sidecars[name] = _label(path, name, entry, file)
                elif not is_hidden(name):
                    others.append(name)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({reason_of(error)})") from None
    return _Index(list(members.values()), _labels_of(path, list(members), sidecars), links, others)


def _link(path: str, name: str, to: str, members: dict[str, Member], sidecars: dict[str, str | None]) -> None:
    """Add a hard link as the image or the label that it points to."""
    if to in members and is_image(name):
        members[name] = members[to]._replace(name=name)
    elif to in sidecars:
        sidecars[name] = sidecars[to]
    elif is_image(name):
        raise DataError(
            f"{path}: {name} is a hard link to {to}, which is not an image stored before it: make the tar with --hard-dereference"
        )


def _labels_of(path: str, images: list[str], sidecars: dict[str, str | None]) -> list[str | None]:
    """The label of each image, from the sidecar files."""
    own: dict[str, str] = {}
    of_key: dict[str, set[str]] = {}
    for name, label in sorted(sidecars.items()):  # .cls before .json of the same name
        stem = name.rpartition(".")[0]
        if label is not None and stem not in own:
            own[stem] = label
            of_key.setdefault(_key(name), set()).add(label)

    def label_of(image: str) -> str | None:
        if (label := own.get(image.rpartition(".")[0])) is not None:
            return label
        labels = of_key.get(_key(image), set())
        if len(labels) > 1:
            raise DataError(
                f"{path}: {image} could have any of the labels {', '.join(sorted(labels)[:3])}: give it a .cls file of its own "
                "name, or use labels none"
            )
        return next(iter(labels), None)

    return [label_of(image) for image in images]


def _entries(path: str, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Files and links of a tar. Iterating a `tarfile` would end at a damaged header, and keep all members in memory."""
    start = file.read(6)
    for magic, method in _COMPRESSED.items():
        if start.startswith(magic):
            raise DataError(
                f"{path} is compressed with {method}, so its members cannot be reached one by one: "
                "decompress it to a plain .tar"
            )
    file.seek(0, 2)
    end = file.tell()
    file.seek(0)
    try:
        tar = tarfile.TarFile(fileobj=file)
    except tarfile.TarError as error:
        raise DataError(f"{path} is not a tar, or is damaged ({error})") from None
    tar.offset = here = 0
    while True:
        file.seek(here)
        if not file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            _check_end(path, file, here, end)
            return
        file.seek(here)
        try:
            entry = tarfile.TarInfo.fromtarfile(tar)
        except tarfile.HeaderError as error:
            raise DataError(f"{path} is damaged at byte {here:,} ({error}): copy or make it again") from None
        if entry.size < 0 or tar.offset <= here:
            raise DataError(f"{path} is damaged at byte {here:,} (a size below 0): copy or make it again")
        if entry.offset_data + (entry.size if entry.isreg() and not entry.issparse() else 0) > end:
            raise DataError(f"{path} is cut short in the middle of {entry.name}: copy or make it again")
        if entry.isreg() or entry.issym() or entry.islnk():
            yield entry
        here = tar.offset


def _check_end(path: str, file: BinaryIO, here: int, end: int) -> None:
    """Refuse a false end: after the zeros at byte `here`, only more zeros may follow, to fill the last record."""
    if end - here > _MOST_ZEROS:
        raise DataError(
            f"{path} ends at byte {here:,} of {end:,}: copy it again, or make it again (if it is two tars in one file, as two)"
        )
    file.seek(here)
    if file.read().strip(b"\0"):
        raise DataError(
            f"{path} goes on after the zeros that end a tar (byte {here:,}): it is damaged, or is two tars in one file: make it again"
        )


def _key(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _label(path: str, name: str, entry: tarfile.TarInfo, file: BinaryIO) -> str | None:
    if entry.size > _MAX_SIDECAR_BYTES:
        raise DataError(f"{path}: {name} is {entry.size:,} bytes, the limit of a label is {_MAX_SIDECAR_BYTES:,}")
    file.seek(entry.offset_data)
    data = file.read(entry.size)
    try:
        if name.endswith(".cls"):
            return sys.intern(data.decode("utf-8-sig").strip()) or None
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {name} cannot be read ({error}): correct it, or use labels none") from None
    label = values.get("label") if isinstance(values, dict) else None
    if label is not None and not isinstance(label, str | int):
        raise DataError(f"{path}: the label in {name} is {label!r:.80}: make it text or a whole number")
    return None if label is None else sys.intern(str(label).strip()) or None
