"""A manifest: a table that names images, and may give each a label, a group and a split."""

from __future__ import annotations

import os
import posixpath
import unicodedata
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jepakit._messages import counted, first_few, joined
from jepakit.errors import DataError
from jepakit.sources.files import Files, not_files
from jepakit.sources.store import Found, repeated
from jepakit.sources.table import Table, read_table


def find_in_manifest(file: str, *, with_labels: bool, with_groups: bool, with_splits: bool) -> Found:
    """The images of a manifest, in its order; paths are relative to the manifest's folder.

    Columns of labels, groups and splits are read only if asked for. Raises DataError for rows that cannot be used.
    """
    roles = (("label", with_labels), ("group", with_groups), ("split", with_splits))
    asked = [role for role, wanted in roles if wanted]
    table = read_table(file, ("path",), asked)
    ids = tuple(posixpath.normpath(path) for path in table.columns["path"])
    root = os.path.dirname(file)  # noqa: PTH120 (stays text)
    _check_paths(file, root, ids)
    labels, label_note = _labels(table)
    held_out, note = _held_out(file, table)
    unused = f"columns not used: {first_few(table.unused, 4)}" if table.unused else ""
    return Found(
        Files(root, ids),
        ids,
        folders=ids,
        labels=labels,
        label_note=label_note,
        groups=tuple(table.columns["group"]) if "group" in table.columns else None,
        group_note=_describe(table, "group", "group"),
        held_out=held_out,
        note=joined(note, unused),
    )


def _check_paths(file: str, root: str, ids: tuple[str, ...]) -> None:
    if (twice := repeated(ids, root)) is not None:
        raise DataError(f"{file} lists {twice} more than once: give each image one row")
    missing = not_files(root, ids)
    if missing:
        raise DataError(
            f"{file} lists {missing[0]}, which is not a file in {root or 'this folder'} "
            f"({len(missing)} of {len(ids)} are missing): {_how_to_write(root, missing[0])}"
        )


def _how_to_write(root: str, path: str) -> str:
    scheme, colon, _ = path.partition(":/")
    if "\\" in path:
        return "paths are written with / here, not with \\"
    if scheme == "file":
        return "paths are written without file://"
    if colon and len(scheme) > 1:
        return "images are read from disk only: download them, and give their paths"
    for form in ("NFC", "NFD"):
        if Path(root, unicodedata.normalize(form, path)).is_file():
            return f"the file's own name is in Unicode form {form}: write it in that form, or rename the file"
    return "paths are relative to the manifest's folder"


def _held_out(file: str, table: Table) -> tuple[NDArray[np.bool_] | None, str]:
    splits = table.columns.get("split")
    if splits is None:
        return None, ""
    held_out = np.array([split.casefold() not in ("train", "training") for split in splits])
    if held_out.all():
        raise DataError(
            f"{file}: no row's {table.names['split']} is train (found {', '.join(sorted(set(splits))[:6])}): "
            "write train in the rows to train on, or drop the column"
        )
    if not held_out.any():
        return None, "the manifest's split holds out nothing"
    return held_out, f"{int(held_out.sum())} of {len(splits)} images held out by the manifest's split"


def _labels(table: Table) -> tuple[tuple[str | None, ...] | None, str]:
    """The labels (None for an empty cell) and where they are from; or no labels, and why."""
    if "label" not in table.columns:
        return None, "no labels: the manifest has no column label"
    labels = tuple(label or None for label in table.columns["label"])
    if not any(labels):
        return None, f"no labels: the manifest's column {table.names['label']} is empty"
    return labels, _describe(table, "label", "class")


def _describe(table: Table, role: str, what: str) -> str:
    if role not in table.columns:
        return ""
    number = len(set(filter(None, table.columns[role])))
    return f"{role}s: {counted(number, what)} from the manifest's column {table.names[role]}"
