"""Tables that name images: CSV by the csv module, Parquet by pyarrow, columns found by their usual names."""

from __future__ import annotations

import csv
import os
import posixpath
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, Literal

from jepakit._files import reason_of, with_home
from jepakit._groups import image_of
from jepakit._messages import counted, did_you_mean, lines_of
from jepakit.errors import ConfigError, DataError, MissingExtraError
from jepakit.sources.files import Files, suffix
from jepakit.sources.store import Found

TABLES = (".csv", ".tsv", ".parquet")
RULES = ("auto", "folder", "none")
"""Where labels or groups come from, if not from a table file."""
COLUMNS = {
    "path": ("path", "file", "file_name", "file_path", "image", "image_path"),
    "label": ("label", "class", "target", "category"),
    "group": ("group", "patient", "patient_id", "scene", "slide", "plate", "well"),
    "split": ("split",),
}
"""The roles of columns, and the names that each may have, of which the first one present is used. Case, spaces, "_" and "-"
make no difference (`Patient ID`, `PatientID`), except between columns that differ in nothing else."""

_MOST_SLIPS = 10
"""If more images than this are missing from a table, no spelling is suggested: the cause is not a typo."""
_WHOLE = re.compile(r"[+-]?\d+(\.0+)?")
Rows = Iterator[tuple[int, list[str]]]


@dataclass(frozen=True)
class Table:
    """Columns by role, all of the same length; `names` are their names in the file, `unused` those of no role, `unasked`
    those of roles that were not asked for."""

    columns: dict[str, list[str]]
    names: dict[str, str]
    unused: list[str]
    unasked: dict[str, str]


def read_table(file: str, needed: Sequence[str], optional: Sequence[str] = ()) -> Table:
    """The columns of a .csv, .tsv or .parquet file for the roles asked for (keys of `COLUMNS`).

    Raises DataError, with the line, for a file that is not a table or has an empty cell (only labels may be empty);
    MissingExtraError without pyarrow.
    """
    unit, header, rows = _open_parquet(file) if suffix(file) == ".parquet" else _open_csv(file)
    places = {role: place for role in (*needed, *optional) if (place := _find_column(header, role)) is not None}
    for role in needed:
        if role not in places:
            raise DataError(
                f"{file} has no column {role!r} (nor {', '.join(COLUMNS[role][1:])}); "
                f"its columns are {', '.join(header)}{_remedy(header, role)}"
            )
    for place in places.values():
        same = [name for name in header if name.casefold() == header[place].casefold()]
        if len(same) > 1:
            raise DataError(f"{file} has two columns named {same[0]!r} and {same[1]!r}: rename or drop one")
    columns: dict[str, list[str]] = {role: [] for role in places}
    for number, values in rows(list(places.values())):
        for role, value in zip(places, values, strict=True):
            if not value and role != "label":
                raise DataError(
                    f"{file}, {unit} {number}: the column {header[places[role]]!r} is empty: fill it in, or leave the row out"
                )
            columns[role].append(value)
    if not columns[needed[0]]:
        raise DataError(f"{file} has a header but no rows")
    for role in {"label", "group"} & columns.keys():
        columns[role] = _without_points(columns[role])
    known = {role: place for role in COLUMNS if (place := _find_column(header, role)) is not None}
    unused = [name for place, name in enumerate(header) if name and place not in known.values()]
    names = {role: header[place] for role, place in places.items()}
    unasked = {role: header[place] for role, place in known.items() if role not in places}
    return Table(columns, names, unused, unasked)


def _remedy(header: Sequence[str], role: str) -> str:
    """What to do about a table without a column for `role`."""
    if hint := next(filter(None, (did_you_mean(name, header) for name in COLUMNS[role])), ""):
        return hint
    if all(_find_column(header, other) is None for other in COLUMNS):
        return ": its first line must name the columns, separated by commas, semicolons or tabs"
    return f": rename the one that is meant to {role}"


def is_rule(rule: str) -> bool:
    """Whether `rule` is one of `RULES`, or the name of an existing table."""
    return rule in RULES or (suffix(rule) in TABLES and Path(with_home(rule)).is_file())


def check_rule(setting: Literal["group", "labels"], rule: str | Path) -> str:
    """`rule` as text: one of `RULES`, or the name of an existing table; ConfigError otherwise."""
    if not isinstance(rule, str | os.PathLike):
        own = "; labels of your own go to the probe, fit(vectors, labels)" if setting == "labels" else ""
        raise ConfigError(
            f"{setting} is of type {type(rule).__name__}: give {', '.join(RULES)}, or a file {', '.join(TABLES)}{own}"
        )
    text = with_home(rule)
    if is_rule(text):
        return text
    missing = " (there is no such file)" if suffix(text) in TABLES else ""
    raise ConfigError(
        f"{setting} = {text!r}{missing}: give {', '.join(RULES)}, or a file {', '.join(TABLES)} "
        f"with a column path and a column {setting.removesuffix('s')}{did_you_mean(text, RULES)}"
    )


def look_up_groups(file: str, found: Found) -> tuple[str, ...]:
    """The group of each image in a table. Its paths are ids, or relative to the table like a manifest's.

    Raises DataError when an image is not in the table, or is in it twice with different values.
    """
    values = _values(read_table(file, ("path", "group")), "group", file)
    keys = _keys(values, found, file)
    found_values = [None if key is None else values[key] for key in keys]
    missing = [name for name, value in zip(found.ids, found_values, strict=True) if value is None]
    if missing:
        meant = did_you_mean(missing[0], list(values)[:1000]) if len(missing) <= _MOST_SLIPS else ""
        raise DataError(
            f"{missing[0]} is not in {file} ({len(missing)} of {len(found.ids)} images are not): add all images to it, those without "
            f"labels too{meant}"
        )
    return tuple(value for value in found_values if value is not None)


def look_up_labels(file: str, found: Found) -> tuple[tuple[str | None, ...], list[str], str | None]:
    """The label of each image in a table, None for those without; also the table's labelled paths that match no image, and the
    name of its column of groups, if it has one.

    Raises DataError when it has no label for any image, or different ones for one.
    """
    table = read_table(file, ("path", "label"))
    values = _values(table, "label", file)
    keys = _keys(values, found, file)
    found_values = [None if key is None else values[key] for key in keys]
    if not any(found_values):
        first = found.ids[0]
        if None not in found_values:
            raise DataError(f"{file}: the column of the labels is empty for all of {counted(len(found.ids), 'image')}")
        path = next(iter(values))
        hint = (
            "they are of tiles or frames, so cut the images alike (tile, frame)"
            if path != image_of(path) and first == image_of(first)
            else f"write both alike{did_you_mean(first, list(values)[:1000])}"
        )
        raise DataError(
            f"{file} gives none of {counted(len(found.ids), 'image')} a label: its first path is {path}, and "
            f"that of the first image is {first}: {hint}"
        )
    strangers = [key for key in values.keys() - set(keys) if values[key]]
    return tuple(value or None for value in found_values), strangers, table.unasked.get("group")


def _values(table: Table, column: str, file: str) -> dict[str, str]:
    """A table's values by normalised path; DataError for a path with two values."""
    values: dict[str, str] = {}
    for path, value in zip(table.columns["path"], table.columns[column], strict=True):
        if (first := values.setdefault(posixpath.normpath(path), value)) != value:
            raise DataError(f"{file} gives {path} two values ({first or 'none'}, {value or 'none'}): keep one")
    return values


def _keys(values: dict[str, str], found: Found, file: str) -> list[str | None]:
    """The name under which the table lists each image; None if it does not."""
    spell = _speller(found.store, file) if isinstance(found.store, Files) else lambda _: []
    return [_key(values, place, name, spell) for place, name in enumerate(found.ids)]


def _key(values: dict[str, str], place: int, name: str, spell: Callable[[int], list[str]]) -> str | None:
    if (normal := posixpath.normpath(name)) in values:
        return normal
    spellings = [normal, *spell(place)]
    # A row for an image holds for its tiles and frames, unless they have rows of their own.
    of_image = map(image_of, spellings) if "#" in name else ()
    return next((spelling for spelling in (*spellings, *of_image) if spelling in values), None)


def _speller(files: Files, file: str) -> Callable[[int], list[str]]:
    """A function from a file's index to its paths, relative to the table's folder and absolute, with "/"."""
    beside = os.path.dirname(os.path.abspath(file))  # noqa: PTH100, PTH120

    @cache
    def of_folder(folder: str) -> list[str]:
        path = os.path.abspath(os.path.join(files.root, folder))  # noqa: PTH100, PTH118
        try:
            relative = [os.path.relpath(path, beside)]
        except ValueError:  # on another drive of Windows
            relative = []
        return [each.replace(os.sep, "/") for each in (*relative, path)]

    def spell(place: int) -> list[str]:
        folder, base = os.path.split(files.names[place])
        return [posixpath.normpath(posixpath.join(each, base)) for each in of_folder(folder)]

    return spell


def _find_column(header: Sequence[str], role: str) -> int | None:
    for name, spelt in product(COLUMNS[role], (str.casefold, _plain)):
        names = [spelt(each) for each in header]
        if spelt(name) in names:
            return names.index(spelt(name))
    return None


def _plain(name: str) -> str:
    """A column's name as it is compared."""
    return re.sub(r"[\s_-]", "", name).casefold()


def _open_csv(file: str) -> tuple[str, list[str], Callable[[list[int]], Rows]]:
    try:
        # utf-8-sig: CSV files from Excel begin with a byte order mark.
        with Path(file).open(encoding="utf-8-sig", newline="") as stream:
            first = stream.readline()
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(file, error) from None
    try:
        delimiter, header = max((_header(first, each) for each in ",;\t"), key=_likeness)
    except csv.Error as error:
        raise DataError(f"{file}, line 1: {error}") from None
    if not any(header):
        raise DataError(f"{file} is empty or begins with an empty line: its first line must name the columns")

    def rows(places: list[int]) -> Rows:
        try:
            with Path(file).open(encoding="utf-8-sig", newline="") as stream:
                reader = csv.reader(stream, delimiter=delimiter, strict=True)
                next(reader)
                for row in reader:
                    if not "".join(row).strip():  # spreadsheets also write the commas of empty rows
                        continue
                    if len(row) != len(header):
                        raise DataError(
                            f"{file}, line {reader.line_num}: {len(row)} fields, its first line has {len(header)}; "
                            f"put fields that contain {delimiter!r} in quotes"
                        )
                    yield reader.line_num, [row[place].strip() for place in places]
        except (OSError, UnicodeDecodeError) as error:
            raise _unreadable(file, error) from None
        except csv.Error as error:
            raise DataError(f"{file}, line {reader.line_num}: {error}") from None

    return "line", header, rows


def _header(line: str, delimiter: str) -> tuple[str, list[str]]:
    return delimiter, [name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])]


def _likeness(header: tuple[str, list[str]]) -> tuple[bool, int]:
    """Sort key for delimiters: first one that yields a column of paths, then the most columns."""
    _, names = header
    return _find_column(names, "path") is not None, len(names)


def _open_parquet(file: str) -> tuple[str, list[str], Callable[[list[int]], Rows]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise MissingExtraError(f"reading {file} needs pyarrow: pip install 'jepakit[parquet]'") from None
    try:
        header = list(parquet.read_schema(file).names)
    except (OSError, UnicodeDecodeError, ArrowException) as error:
        raise DataError(f"{file} is not a Parquet file, or is damaged ({lines_of(error)[0][:200]})") from None

    def rows(places: list[int]) -> Rows:
        names = [header[place] for place in places]
        try:
            table = parquet.read_table(file, columns=names)
            values = [table.column(name).to_pylist() for name in names]
        except (OSError, UnicodeDecodeError, ArrowException) as error:
            raise DataError(f"{file} cannot be read ({lines_of(error)[0][:200]})") from None
        columns = [_texts(file, name, each) for name, each in zip(names, values, strict=True)]
        for number, row in enumerate(zip(*columns, strict=True), 1):
            yield number, list(row)

    return "row", header, rows


def _texts(file: str, name: str, values: Sequence[Any]) -> list[str]:
    strange = next((value for value in values if value is not None and not isinstance(value, str | int | float)), None)
    if strange is not None:
        raise DataError(f"{file}: the column {name!r} holds {type(strange).__name__}: give text or numbers")
    # pandas turns an empty cell into NaN.
    return ["" if value is None or value != value else str(value).strip() for value in values]


def _without_points(cells: list[str]) -> list[str]:
    """Whole numbers without the decimal point: pandas writes 1 as 1.0 if another cell of the column was empty."""
    if not all(_WHOLE.fullmatch(cell) for cell in cells if cell):
        return cells
    return [cell.partition(".")[0] for cell in cells]


def _unreadable(file: str, error: OSError | UnicodeDecodeError) -> DataError:
    if isinstance(error, UnicodeDecodeError):
        return DataError(f"{file} is not UTF-8 text: save it as CSV UTF-8")
    return DataError(f"{file} cannot be read ({reason_of(error)})")
