"""Where a contact sheet may be written, checked without torch."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from PIL import Image

from jepakit.errors import ConfigError

MARK = "jepakit", "contact sheet"
"""Key and text stored in the file, by which a sheet is recognised."""


def check_sheet_path(sheet: Path, images: str | tuple[str, ...]) -> None:
    """Raise ConfigError for a sheet that would not be a PNG, lie among the images, or replace another file."""
    sources = (images,) if isinstance(images, str) else images
    if any(_is_among(sheet.resolve(), source) for source in sources):
        raise ConfigError(f"sheet = {sheet} would lie among the images it shows: name another place (sheet=FILE)")
    if sheet.is_file() and not is_sheet(sheet):
        raise ConfigError(
            f"sheet = {sheet} already exists, and is not an earlier contact sheet: name another place (sheet=FILE)"
        )
    if sheet.suffix.lower() != ".png":
        raise ConfigError(f"sheet = {sheet}: it is drawn as PNG, name a file that ends in .png")


def _is_among(sheet: Path, source: str) -> bool:
    """Whether `source` would include the sheet at its path."""
    path = Path(source).resolve()
    if path.exists():
        return sheet.is_relative_to(path)
    # A glob: `**/` matches any number of folders, also none; `*` does not cross folders.
    return fnmatch(str(sheet), str(path).replace("**/", "*")) and (
        "**" in source or len(sheet.parts) == len(path.parts)
    )


def is_sheet(path: Path) -> bool:
    """Whether a file is a sheet made by jepakit, which may be overwritten."""
    key, text = MARK
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return picture.info.get(key) == text
    except Exception:  # a hostile or damaged file can raise anything
        return False
