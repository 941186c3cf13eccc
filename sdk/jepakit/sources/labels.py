"""Labels: from the source itself, its first-level folders, or a table of paths and labels."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from jepakit._files import with_home
from jepakit._groups import image_of
from jepakit._messages import counted, first_few, joined
from jepakit.errors import ConfigError, DataError
from jepakit.sources.files import Files
from jepakit.sources.layout import PLAIN_SPLITS, are_groups, companions, splits, wrapper
from jepakit.sources.patients import folders_are_patients
from jepakit.sources.remarks import remarks_on_labels
from jepakit.sources.store import Found
from jepakit.sources.table import RULES, check_rule, is_rule, look_up_labels, read_table

MIN_CLASSES, MAX_CLASSES, MIN_IMAGES_PER_CLASS = 2, 50, 10

Labels = tuple[str | None, ...] | None


def choose_labels(found: Found, rule: str | Path, *, group: str | Path, embedding: bool) -> tuple[Labels, str]:
    """The labels by the rule, or None, and a note on what was assumed.

    group      the rule for groups: with "auto", the note says that a table's column of groups is not used
    embedding  either every image has a label or none has; "auto" takes any number of folders as classes, and gives no
               note if no labels are expected

    Raises DataError when the rule does not fit the images, ConfigError when it is neither a rule nor a file.
    """
    rule = check_rule("labels", rule)
    labels, note = _choose(found, rule, group=group, embedding=embedding)
    note = joined(note, remarks_on_labels(labels, written=not _by_folders(found, rule)))
    if not embedding and rule != "folder":
        note = joined(note, _companions_count(found))
    if labels is None or None not in labels:
        return labels, note
    n_images, n_labelled = len(labels), len(labels) - labels.count(None)
    if embedding:
        raise DataError(
            f"{found.ids[labels.index(None)]} has no label ({n_images - n_labelled:,} of {n_images:,} images have none): to embed, "
            "give each image one, embed only those that have one (a table of path and label can be given as the images), or use labels none"
        )
    return labels, f"{note}; {n_labelled:,} of {n_images:,} images are labelled"


def labels_of(ids: Sequence[str], file: str | Path) -> tuple[str | None, ...]:
    """The labels of embedded images by a table of paths and labels, None for images that it gives none; tiles and frames
    have the label of their image, unless the table names them.

    Raises ConfigError if `file` is not a table, DataError if it has no label for any image.
    """
    if str(file) in RULES or not is_rule(str(file)):
        raise ConfigError(f"labels = {str(file)!r}: give a CSV, TSV or Parquet file of path and label that exists")
    return look_up_labels(with_home(file), Found(Files("", ids), tuple(ids)))[0]


def names_pieces(rule: str | Path) -> bool:
    """Whether the rule is a table whose paths are the ids of tiles or frames."""
    file = check_rule("labels", rule)
    return file not in RULES and any(
        path != image_of(path) for path in read_table(file, ("path", "label")).columns["path"]
    )


def _by_folders(found: Found, rule: str) -> bool:
    """Whether folders decide about the labels, and not a table or the source's own labels."""
    return rule == "folder" or (rule == "auto" and not found.label_note)


def _companions_count(found: Found) -> str:
    """A warning about folders of masks and the like, whose files count as images to train on, too; empty if there are none."""
    if found.folders is None:
        return ""
    counts = Counter(_tops(found.folders, wrapper(found.folders)))
    beside = companions(sorted(filter(None, counts)))
    if not beside:
        return ""
    number = counted(sum(counts[name] for name in beside), "file")
    return f"warning: {number} in {first_few(beside, 3)} count as images, too: name the others alone (their folder, a glob or a manifest)"


def _choose(found: Found, rule: str, *, group: str | Path, embedding: bool) -> tuple[Labels, str]:
    if rule == "none":
        return None, "" if embedding else "no labels, as requested"
    if rule not in RULES:
        listed, strangers, column = look_up_labels(rule, found)
        note = f"labels: {counted(len(set(listed) - {None}), 'class')} from {rule}"
        if strangers:
            note += f" ({counted(len(strangers), 'row')} of no image here, {min(strangers)} first)"
        if column is not None and group == "auto" and not embedding:
            note = joined(note, f"its column {column} is used only if the file is named as group, too")
        return listed, note
    if not _by_folders(found, rule):
        return found.labels, found.label_note
    if found.folders is None:
        if rule == "folder":
            raise DataError(
                f"labels = 'folder', but {found.kind} has no class folders: give the folder that holds them, a CSV file "
                "of paths and labels, or labels none"
            )
        return None, "" if embedding else f"no labels: {found.kind} has no class folders"
    labels, note = _folder_labels(found.folders, rule, any_number=embedding)
    if rule == "auto" and labels is not None and folders_are_patients(found, labels):
        return None, "no labels: each first-level folder holds one patient, so folders are not taken as classes"
    return labels, note


def _folder_labels(names: Sequence[str], rule: str, *, any_number: bool) -> tuple[tuple[str, ...] | None, str]:
    lone = wrapper(names) if rule == "auto" else ""
    around = "" if any_number else lone
    tops = _tops(names, around)
    counts = Counter(tops)
    if None in counts:
        stray = names[tops.index(None)]
        if rule == "folder":
            raise DataError(f"{stray} is in no class folder: move it into one, or use labels none")
        return None, f"no labels: images lie outside class folders ({counts[None]:,} of {len(names):,}, {stray} first)"
    classes = sorted(str(name) for name in counts)
    _refuse_splits(classes, rule)
    if rule == "auto" and (why_not := _no_classes(classes, counts, any_number=any_number)):
        return None, f"no labels: {why_not}"
    inside = f" in {around.rstrip('/')}" if around else ""
    what = f"{len(classes)} folders{inside} are classes" if len(classes) > 1 else f"1 folder{inside} is the only class"
    note = f"labels: {what} ({first_few(classes, 6)})"
    if any_number and lone:
        note += f"; if the folders in it are the classes, give …/{lone.rstrip('/')} (a ZIP: unpacked)"
    return tuple(str(top) for top in tops), note


def _tops(names: Sequence[str], around: str) -> list[str | None]:
    """The folder of each image below `around`; None for an image in no folder there."""
    inner = (name[len(around) :].partition("/") for name in names)
    # One string per class, not one per image.
    return [sys.intern(top) if slash else None for top, slash, _ in inner]


def _refuse_splits(classes: Sequence[str], rule: str) -> None:
    """Raise DataError if folders look like splits; with the rule "folder", only if all their names are in `PLAIN_SPLITS`."""
    found = splits(classes)
    are_plain = len(classes) > 1 and {name.lower() for name in classes} <= PLAIN_SPLITS
    if (found and rule == "auto") or are_plain:
        forced = "" if are_plain else ", or labels folder if they are classes"
        raise DataError(
            f"the folders {first_few(found or classes, 6)} look like splits, not classes: name one of them, or use labels none{forced}"
        )


def _no_classes(classes: Sequence[str], counts: Counter[str | None], *, any_number: bool) -> str:
    """Why folders are not taken as classes; empty if they are."""
    if beside := companions(classes):
        return (
            f"what lies in {first_few(beside, 3)} seems to belong to the images beside it (masks, thumbnails), so folders are not "
            "taken as classes (labels folder takes them as such)"
        )
    if are_groups(classes):
        return (
            f"{classes[0]} and the other folders seem to hold one patient, slide or scene each, so they are not taken as classes (labels "
            "folder takes them as such; group folder keeps each together)"
        )
    if any_number:
        return ""
    if not MIN_CLASSES <= len(classes) <= MAX_CLASSES:
        return f"{counted(len(classes), 'first-level folder')} (classes are {MIN_CLASSES} to {MAX_CLASSES}; labels folder takes any number)"
    smallest = min(classes, key=lambda name: counts[name])
    if counts[smallest] < MIN_IMAGES_PER_CLASS:
        return (
            f"the folder {smallest} holds {counted(counts[smallest], 'image')} (classes have {MIN_IMAGES_PER_CLASS} or more; "
            "labels folder takes any number)"
        )
    return ""
