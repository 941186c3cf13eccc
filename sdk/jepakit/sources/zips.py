"""The images of a ZIP, from its central directory."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence

from jepakit._progress import track
from jepakit.errors import DataError
from jepakit.readers import DICOM_HEAD, begins_as_dicom
from jepakit.sources.archives import DEFLATED, STORED, Archives, Member, names_in_shards
from jepakit.sources.files import is_hidden, is_image, may_be_bare_dicom
from jepakit.sources.passed import passed_over
from jepakit.sources.store import Found

_KINDS = {zipfile.ZIP_STORED: STORED, zipfile.ZIP_DEFLATED: DEFLATED}
_ENCRYPTED = 0x1


def find_in_zips(paths: Sequence[str], *, whole: bool) -> Found:
    """The images of one or many ZIPs; `whole`: a single one, whose folders count as the source's, as if unpacked."""
    indexes = [_index(path) for path in track(paths, "ZIPs", progress=len(paths) > 1)]
    members = [each for each, _ in indexes]
    inner = tuple(member.name for each in members for member in each)
    ids = inner if whole else names_in_shards(paths, members)
    note = passed_over(name for _, others in indexes for name in others)
    return Found(Archives.of(paths, ids, members), ids, folders=inner, note=note)


def _index(path: str) -> tuple[list[Member], list[str]]:
    """The image members of a ZIP, in the order of the same files in a folder, and the names of its other visible files.

    Of members with one name the last counts.

    Raises DataError if it is not a ZIP, or holds encrypted or unusually compressed images.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            visible = [entry for entry in archive.infolist() if not (entry.is_dir() or is_hidden(entry.filename))]
            entries = [entry for entry in visible if _is_wanted(archive, entry)]
    except Exception as error:
        # zipfile fails on a damaged directory in many ways, including decoding errors.
        raise DataError(f"{path} is not a ZIP, or is cut short ({error}): copy it again") from None
    members = [_member(path, entry) for entry in entries]
    last = {member.name: member for member in members}
    others = {entry.filename for entry in visible}.difference(entry.filename for entry in entries)
    return sorted(last.values(), key=lambda member: member.name.split("/")), sorted(others)


def _is_wanted(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bool:
    if is_image(entry.filename):
        return True
    if not may_be_bare_dicom(entry.filename):
        return False
    try:
        with archive.open(entry) as file:
            return begins_as_dicom(file.read(DICOM_HEAD))
    except Exception:
        # Damaged, encrypted or unusually compressed: there is no sign that it is an image.
        return False


def _member(path: str, entry: zipfile.ZipInfo) -> Member:
    if entry.flag_bits & _ENCRYPTED:
        raise DataError(f"{path}: {entry.filename} is encrypted: make a ZIP without a password")
    if entry.compress_type not in _KINDS:
        raise DataError(
            f"{path}: {entry.filename} is compressed by method {entry.compress_type}: make a ZIP with deflate or store"
        )
    kind = _KINDS[entry.compress_type]
    return Member(
        entry.filename.removeprefix("./"), entry.header_offset, entry.compress_size, entry.file_size, kind, entry.CRC
    )
