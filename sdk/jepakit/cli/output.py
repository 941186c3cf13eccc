"""What commands print and write."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from jepakit._files import as_path, prepare_place, written
from jepakit._one_line import one_line
from jepakit._say import is_terminal, show
from jepakit.errors import ConfigError


def print_rows(rows: Iterable[tuple[object, ...]]) -> None:
    """Print tab-separated rows; cells with tabs, line breaks or quotes are quoted (on a terminal, escaped)."""
    shown = one_line if is_terminal(sys.stdout) else str
    lines = SimpleNamespace(write=partial(show, end=""))
    csv.writer(lines, delimiter="\t", lineterminator="\n").writerows([shown(str(cell)) for cell in row] for row in rows)


def check_out(file: Path, suffix: str) -> Path:
    """The output file, its folder created; ConfigError, before any work, if it could not be written."""
    file = as_path(file, "out")
    if file.is_dir():
        raise ConfigError(f"--out {file} is a folder: name a file in it")
    if file.suffix not in ("", suffix):
        raise ConfigError(f"--out {file}: the output is a {suffix} file: give a name that ends in {suffix}")
    prepare_place(file)
    return file


def write_csv(file: Path, rows: list[tuple[str, str]]) -> None:
    """Write rows of text, with any characters in names; WriteError if they cannot be written."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    with written(as_path(file, "out")) as stream:
        stream.write(text.getvalue().encode("utf-8", "surrogateescape"))
