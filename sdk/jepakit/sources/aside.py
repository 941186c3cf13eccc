"""What a listing skips: system folders (thumbnails, recycle bins, snapshots), and what jepakit itself wrote."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import takewhile
from pathlib import Path

from jepakit._messages import counted
from jepakit._run_files import CONFIG, ENVIRONMENT, METRICS
from jepakit.bundles.bundle import MANIFEST, WEIGHTS

CACHED = ".jepakit.npy"
"""How the names of images in the trainer's cache end."""
_SYSTEM_FOLDERS = frozenset({
    "@eadir", "@recycle", "#recycle", "$recycle.bin",  # thumbnails and recycle bins of Synology, QNAP, Windows
    "#snapshot", "~snapshot", "@recently-snapshot", "@__thumb",
    "system volume information", "lost+found",
})  # fmt: skip
_MARKS = ({MANIFEST, WEIGHTS}, {CONFIG, ENVIRONMENT, METRICS})
"""The files that identify a bundle, and a run that has begun to train."""


def is_system_folder(base: str) -> bool:
    """Whether a folder of this name is kept by a system: its files are thumbnails, or were deleted."""
    return base.lower() in _SYSTEM_FOLDERS


def is_own_folder(files: Iterable[str]) -> bool:
    """Whether a folder with these files is a bundle or a run, whose golden.npz and neighbours.png are not the user's images."""
    there = set(files)
    return any(marks <= there for marks in _MARKS)


def without_aside(matches: Sequence[str], pattern: str) -> tuple[list[str], list[str]]:
    """The matches of a glob outside system folders, bundles and runs (unless the glob names the folder), and the system folders met."""
    named = os.path.join("", *takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts))  # noqa: PTH118
    system: list[str] = []

    @cache
    def is_aside(folder: str) -> bool:
        if len(folder) <= len(named):
            return False
        above, base = os.path.split(folder)
        if is_aside(above):
            return True
        if is_system_folder(base):
            system.append(folder)
            return True
        return is_own_folder(name for name in set().union(*_MARKS) if Path(folder, name).is_file())

    kept = [name for name in matches if not name.endswith(CACHED) and not is_aside(os.path.dirname(name))]  # noqa: PTH120
    return kept, system


def system_folders_passed_over(folders: Sequence[str]) -> str:
    """A note on system folders that were not looked into; empty if there are none."""
    return f"{counted(len(folders), 'system folder')} passed over ({folders[0]} first)" if folders else ""
