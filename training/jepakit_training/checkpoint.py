"""Checkpoints that survive a kill at any moment.

    checkpoints/step-000000100/{state.pt, manifest.json}

Written to a temporary folder, flushed, renamed; older ones are deleted only afterwards. Loading takes the
newest one whose SHA-256 is right. (accelerate's own `save_state` leaves torn folders behind and then cannot
load; see the reliability notes in docs/design.md.)
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from jepakit._files import fsync

_KEEP = 2


def save(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings, lists and dicts of them) as the checkpoint of `step`."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)
    temporary = folder / f".tmp-{step}-{os.getpid()}"
    temporary.mkdir()
    try:
        torch.save(state, temporary / "state.pt")
        manifest = {"step": step, "sha256": _sha256(temporary / "state.pt")}
        (temporary / "manifest.json").write_text(json.dumps(manifest))
        for path in (temporary / "state.pt", temporary / "manifest.json", temporary):
            fsync(path)
        target = folder / f"step-{step:09d}"
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        fsync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    # Those of later steps are damaged ones that were passed over at the start: they must not push this one out.
    kept = [target, *(other for other in _newest_first(folder) if other < target)][:_KEEP]
    for other in set(_newest_first(folder)) - set(kept):
        shutil.rmtree(other, ignore_errors=True)


def load_newest(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """(step, state) of the newest whole checkpoint, or None."""
    for candidate in _newest_first(folder):
        try:
            manifest = json.loads((candidate / "manifest.json").read_text())
            if _sha256(candidate / "state.pt") == manifest["sha256"]:
                return manifest["step"], torch.load(candidate / "state.pt", map_location="cpu", weights_only=True)
        except (OSError, ValueError, KeyError):
            continue
    return None


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), reverse=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
