"""Which patient each DICOM file belongs to, read from the headers; only a hash is kept, in memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from jepakit._threads import in_threads
from jepakit.errors import ImageError
from jepakit.readers import dicom_group
from jepakit.sources.files import may_be_dicom
from jepakit.sources.store import Found

_PER_FOLDER = 4


def patients(found: Found, places: Sequence[int]) -> list[str | None]:
    """A hash of each file's PatientID; None if there is none, or the file cannot be read."""

    def patient(place: int) -> str | None:
        try:
            source = found.store.image(place)
            assert isinstance(source, str | Path | bytes)
            return dicom_group(source)
        except ImageError:
            # Reading its pixels will report the error; here it is just an image of an unknown patient.
            return None

    return in_threads(patient, places, "patients")


def folders_are_patients(found: Found, labels: Sequence[str]) -> bool:
    """Whether each class is one patient, a different one for each class; judged by a few DICOM files per class."""
    if not all(map(may_be_dicom, found.ids)):
        return False
    members: dict[str, list[int]] = defaultdict(list)
    for place, label in enumerate(labels):
        members[label].append(place)
    sample = [places[len(places) * part // _PER_FOLDER] for places in members.values() for part in range(_PER_FOLDER)]
    of_folder: dict[str, set[str | None]] = defaultdict(set)
    for place, patient in zip(sample, patients(found, sample), strict=True):
        of_folder[labels[place]].add(patient)
    if any(len(seen) != 1 or None in seen for seen in of_folder.values()):
        return False
    return len(set().union(*of_folder.values())) == len(of_folder)
