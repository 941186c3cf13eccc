"""The two entry points: `list_images` for training, `gather` for embedding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from jepakit._messages import joined
from jepakit._one_line import one_line
from jepakit._progress import shown
from jepakit._say import say
from jepakit.errors import DataError
from jepakit.sources.files import Files
from jepakit.sources.find import LISTED, find
from jepakit.sources.groups import choose_groups
from jepakit.sources.imagelist import ImageList
from jepakit.sources.labels import choose_labels, names_pieces
from jepakit.sources.memory import is_one_image
from jepakit.sources.remarks import remarks_on_groups
from jepakit.sources.store import Found, repeated
from jepakit.sources.tiles import Cut, cut_into_pieces


def list_images(
    images: Any,
    labels: str | Path = "auto",
    *,
    group: str | Path = "auto",
    tile: int | None = None,
    overlap: int = 0,
    min_valid: float = 0.5,
    frame: int | Literal["each"] | None = None,
    chosen_range: tuple[float, float] | None = None,
    most_skipped: float = 0.0,
) -> ImageList:
    """List the images of a source, in a stable order.

    images     a folder (recursive) or a glob (sorted by name), a file, a list of paths or of (path, label) (in its own
               order), a manifest (.csv, .tsv, .parquet), one or many .tar shards, a ZIP, or a sequence or map-style
               dataset of arrays, Pillow images, bytes or (image, label)
    labels     "auto": the source's own (manifest, shards, dataset), else the first-level folders (or those in a lone one)
               if all images lie in 2 to 50 of them with at least 10 images each and their names may be classes;
               "folder": any number of first-level folders; "none"; or a table file with the columns path and label, whose
               paths may be the ids of tiles
    group      images that stay together when some are held out. "auto": the manifest's groups, else the patients of
               DICOM files; "folder": the folder of each image; "none"; or a table file with path and group
    tile       side in pixels of the tiles to cut scenes into; neighbours share `overlap` pixels
    min_valid  tiles with a smaller share of pixels that have data are left out
    frame      which frame of multi-frame files, from 0; "each": every frame is an image
    chosen_range
               the range of values that the user chose, if any: tiles with no values in it are left out, too
    most_skipped
               share of the files to be cut into tiles or frames that may be left out because they cannot be opened;
               with 0, ImageError names the first

    Hidden files, system folders and what jepakit wrote (bundles, runs, ...) are ignored; nothing is decoded. Raises
    DataError when there is nothing to read or the source contradicts itself, ConfigError for settings that are wrong in
    themselves.
    """
    return _list(
        images,
        labels,
        group,
        Cut(tile, overlap, min_valid, frame, chosen_range),
        embedding=False,
        most_skipped=most_skipped,
    )


def gather(
    images: Any,
    labels: str | Path = "auto",
    group: str | Path = "none",
    *,
    tile: int | None = None,
    overlap: int = 0,
    min_valid: float = 0.5,
    frame: int | Literal["each"] | None = None,
    chosen_range: tuple[float, float] | None = None,
    progress: bool = False,
    most_skipped: float = 0.0,
    most_cut: int | None = None,
) -> ImageList:
    """`list_images` for the input of `embed`, which may also be a single image in memory.

    labels    "auto": the source's own, else any number of first-level folders, but no labels if an image lies outside
              them; "folder": only those folders; "none"; or a table file
    progress  show progress, assumptions and what was left out on standard error
    most_cut  how many of the images, spread over the source, are cut into tiles or frames; None: all, otherwise the
              others are left out
    """
    one = is_one_image(images) and not isinstance(images, str | Path)
    with shown(progress):
        listed = _list(
            [images] if one else images,
            labels,
            group,
            Cut(tile, overlap, min_valid, frame, chosen_range),
            embedding=True,
            most_skipped=most_skipped,
            most_cut=most_cut,
        )
    if progress and listed.note:
        say(one_line(listed.note))
    return listed


def _check_listed_once(found: Found) -> None:
    """Raise DataError if a list names a file twice: it could be both trained on and held out."""
    if found.kind == LISTED and (twice := repeated(found.ids)) is not None:
        raise DataError(f"the list names {twice} more than once: give each image once")


def _list(
    source: Any,
    labels: str | Path,
    group: str | Path,
    cut: Cut,
    *,
    embedding: bool,
    most_skipped: float,
    most_cut: int | None = None,
) -> ImageList:
    found = find(
        source,
        with_labels=labels == "auto",
        with_groups=group == "auto",
        with_splits=not embedding,
        may_be_gone=embedding and most_skipped > 0,
    )
    if not embedding:
        _check_listed_once(found)
    of_pieces = cut.cuts and names_pieces(labels)
    chosen, label_note = (None, "") if of_pieces else choose_labels(found, labels, group=group, embedding=embedding)
    groups, group_note = choose_groups(found, group)
    group_remarks = remarks_on_groups(groups, written=group != "folder")
    note = joined(label_note, group_note, group_remarks, found.note)
    images = ImageList(found.ids, chosen, groups, found.held_out, note, found.store)
    pieces = cut_into_pieces(images, cut, most_skipped=most_skipped, most_cut=most_cut)
    if not of_pieces:
        return pieces
    chosen, label_note = choose_labels(_as_found(found, pieces), labels, group=group, embedding=embedding)
    return replace(pieces, labels=chosen, note=joined(label_note, pieces.note))


def _as_found(found: Found, pieces: ImageList) -> Found:
    """The pieces as if each were a file: a table may spell their names in all the ways of a file's."""
    assert pieces.pieces is not None
    store = found.store
    if isinstance(store, Files):
        of_image = [
            store.names[image] + piece_id.removeprefix(found.ids[image])
            for piece_id, image in zip(pieces.ids, pieces.pieces.image.tolist(), strict=True)
        ]
        store = Files(store.root, of_image)
    return Found(store, tuple(pieces.ids))
