"""Groups: images that must not be split between training and held-out, such as those of one patient."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from jepakit._groups import image_of
from jepakit._messages import counted
from jepakit.errors import ConfigError, DataError
from jepakit.sources.files import Files, is_dicom, may_be_dicom
from jepakit.sources.patients import patients
from jepakit.sources.store import Found
from jepakit.sources.table import RULES, check_rule, look_up_groups

Groups = tuple[str, ...] | None


def choose_groups(found: Found, rule: str | Path) -> tuple[Groups, str]:
    """The groups by the rule, or None, and a note on what was assumed.

    Raises DataError when the rule does not fit the images, ConfigError when it is neither a rule nor a file.
    """
    rule = check_rule("group", rule)
    if rule == "none":
        return None, ""
    if rule == "folder":
        return _deepest_folders(found)
    if rule not in RULES:
        groups = look_up_groups(rule, found)
        return groups, f"groups: {len(set(groups))} from {rule}"
    if found.groups is not None:
        return found.groups, found.group_note
    return _patients(found)


def groups_of(ids: Sequence[str], file: str | Path) -> tuple[str, ...]:
    """The groups of embedded images by a table of paths and groups; tiles and frames have the group of their image.

    Raises ConfigError if `file` is not a table, DataError if an image is not in it.
    """
    table = check_rule("group", file)
    if table in RULES:
        raise ConfigError(
            f"group = {table!r}: embeddings carry no groups: give a CSV, TSV or Parquet file of path and group"
        )
    images = tuple(map(image_of, ids))
    return look_up_groups(table, Found(Files("", images), images))


def _deepest_folders(found: Found) -> tuple[Groups, str]:
    if found.store.in_memory:
        raise DataError("images in memory are in no folders: use group auto, none, or a file of paths and groups")
    groups = tuple(sys.intern(name.rpartition("/")[0] or ".") for name in found.ids)
    counts = Counter(groups)
    folder, count = counts.most_common(1)[0]
    return groups, f"groups: {counted(len(counts), 'folder')}, e.g. {folder} ({counted(count, 'image')})"


def _patients(found: Found) -> tuple[Groups, str]:
    places = [place for place, name in enumerate(found.ids) if may_be_dicom(name)]
    if not places or found.store.in_memory:
        return None, ""
    named = dict(zip(places, patients(found, places), strict=True))
    # Numbers, not hashes: groups get into a run's files, and trying all likely IDs would reverse a hash.
    known: dict[str | None, str] = {}
    for patient in named.values():
        if patient is not None:
            known.setdefault(patient, f"patient {len(known) + 1}")
    if not known:
        by_name = sum(is_dicom(found.ids[place]) for place in places)
        return None, f"no groups: none of {by_name} DICOM files names its patient" if by_name else ""
    groups = tuple(known.get(named.get(place), name) for place, name in enumerate(found.ids))
    alone = sum(named.get(place) is None for place in range(len(groups)))
    rest = f", {counted(alone, 'image')} without one each on their own" if alone else ""
    return groups, f"groups: {counted(len(known), 'patient')} by DICOM PatientID{rest}"
