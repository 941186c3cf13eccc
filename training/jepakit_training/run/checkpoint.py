"""Checkpoints that survive a kill at any moment.

    checkpoints/step-000000100/{state.pt, manifest.json}

Written to a temporary folder, flushed, then renamed; older ones are deleted only afterwards. Loading takes the newest
one whose SHA-256 is right; damaged ones are renamed to damaged-step-…, and may be removed. (accelerate's own
`save_state` can leave incomplete folders, which it then cannot load; see "Own checkpoints" in docs/design.md.)
"""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jepakit._files import file_sha256, making_folder, reason_of
from jepakit._say import say
from jepakit.errors import CheckpointError, TrainingError

_KEEP = 2
_SLOW_STEP_S = 10.0


class Saver:
    """Decides after each step whether to save; a full disk in the middle of a run does not stop it.

    folder   where the checkpoints are stored
    every_s  seconds between checkpoints. A step that took longer than 10 s is saved at once, as the grace period of a
             SIGTERM would end before the next step does (see `stopping`)
    first    the step that the run resumes from; 0 at its start
    main     whether this process is the one that saves
    """

    def __init__(self, folder: Path, every_s: float, first: int, *, main: bool) -> None:
        self._folder, self._every_s, self._main = folder, every_s, main
        self.newest = first
        self._saved_at = self._step_began = time.monotonic()
        self._save_took, self._warned = 0.0, False

    def after_step(self, done: int, state: Callable[[], dict[str, Any]], *, must: bool = False) -> None:
        """Save if it is due, or if it `must` be done: at the last step and at a stop. `state` is called only then.

        If it cannot be written, warn once and try again when the next one is due; CheckpointError if it `must` be done.
        """
        now = time.monotonic()
        # If saving takes longer than a step, saving after every step is not worth it.
        slow = now - self._step_began > max(_SLOW_STEP_S, self._save_took)
        if self._main and (must or slow or now - self._saved_at >= self._every_s):
            self._save(done, state(), must=must)
            self._saved_at = time.monotonic()
            self._save_took = self._saved_at - now
        self._step_began = time.monotonic()

    def _save(self, done: int, state: dict[str, Any], *, must: bool) -> None:
        try:
            save(self._folder, done, state)
        except CheckpointError as error:
            resume = f"resume from step {self.newest}" if self.newest else "start over"
            if must:
                raise CheckpointError(f"{error}; then the same command will {resume}") from error
            if not self._warned:
                say(f"warning: {error}; training goes on, and would {resume} after a stop")
            self._warned = True
        else:
            self.newest, self._warned = done, False


def save(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings, lists and dicts of them) as the checkpoint of `step`.

    Raises CheckpointError if it cannot be written, TrainingError if a number is not finite; older ones are kept then.
    """
    _check_finite(step, state)
    storages = [tensor.untyped_storage() for tensor in _tensors(state)]
    needed = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".tmp-*"):
            shutil.rmtree(stale, ignore_errors=True)
        if shutil.disk_usage(folder).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        _write_checkpoint(folder, step, state)
    except OSError as error:
        raise _unwritten(folder, step, needed, error) from error


def _write_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    target = folder / _name(step)
    with making_folder(target) as temporary:
        _save_state(state, temporary / "state.pt")
        manifest = {"step": step, "sha256": file_sha256(temporary / "state.pt")}
        (temporary / "manifest.json").write_text(json.dumps(manifest))
        shutil.rmtree(target, ignore_errors=True)
    for older in _newest_first(folder)[_KEEP:]:
        shutil.rmtree(older, ignore_errors=True)


def _save_state(state: dict[str, Any], path: Path) -> None:
    try:
        with path.open("wb") as file:
            torch.save(state, file)
    except RuntimeError as error:
        # torch reports a failed write as "unexpected pos 768 vs 662"; the system's error is its context.
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def load_newest(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """(step, state) of the newest intact checkpoint, or None.

    Raises CheckpointError if one cannot be read, as it may be intact and training must not start over beside it, or if it
    holds anything but tensors and plain values.
    """
    try:
        for candidate in _newest_first(folder):
            if (step := _whole_step(candidate)) is not None:
                return step, _load_state(candidate / "state.pt")
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or folder} could not be read ({reason_of(error)}), and may be intact: once it can be "
            "read, run the same command again. To resume without this checkpoint, remove its folder"
        ) from error
    return None


def _load_state(path: Path) -> dict[str, Any]:
    """The state in a file, which may hold tensors and plain values only; CheckpointError for anything else."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} holds more than tensors and numbers, so no trainer wrote it, and nothing of it was run: remove its folder"
        ) from None
    return state


def set_aside_newer(folder: Path, step: int) -> None:
    """Rename the checkpoints of steps after `step`, which `load_newest` skipped as damaged, with a warning for each.

    Raises CheckpointError if one cannot be renamed.
    """
    for damaged in _newest_first(folder):
        if damaged.name <= _name(step):
            return
        aside = damaged.with_name(f"damaged-{damaged.name}")
        try:
            if aside.exists():
                shutil.rmtree(aside)
            damaged.rename(aside)
        except OSError as error:
            raise CheckpointError(
                f"{damaged} is damaged or incomplete, and could not be renamed to {aside.name} ({reason_of(error)}): "
                "move it away, then run the same command again"
            ) from error
        say(f"warning: {damaged} is damaged or incomplete and is passed over; it is kept as {aside.name}")


def _whole_step(checkpoint: Path) -> int | None:
    """The step of a checkpoint; None if it is damaged or incomplete. Raises OSError if it cannot be read."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        step, digest = int(manifest["step"]), manifest["sha256"]
        return step if file_sha256(checkpoint / "state.pt") == digest else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _unwritten(folder: Path, step: int, needed: int, error: OSError) -> CheckpointError:
    try:
        free = f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB are free"
    except OSError:
        free = "the folder cannot be reached"
    return CheckpointError(
        f"the checkpoint of step {step} could not be written to {folder} ({reason_of(error)}): it needs {needed / 1e6:,.1f} MB "
        f"beside the older ones, and {free}; make room there"
    )


def _check_finite(step: int, state: dict[str, Any]) -> None:
    """TrainingError if a number is not finite; one reduction over all tensors waits for the device only once."""
    numbers = [tensor for tensor in _tensors(state) if tensor.is_floating_point() and tensor.numel()]
    if not torch.nn.utils.get_total_norm(numbers, norm_type=math.inf).isfinite():
        raise TrainingError(
            f"weights are not finite after step {step}, so they are not saved; the last checkpoint is intact: start a new "
            "run with a lower lr"
        )


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state.detach()
    elif isinstance(state, dict | list | tuple):
        for part in state.values() if isinstance(state, dict) else state:
            yield from _tensors(part)


def _name(step: int) -> str:
    return f"step-{step:09d}"


def _newest_first(folder: Path) -> list[Path]:
    """The checkpoints, newest first; OSError for an unreadable folder, which `glob` would treat as empty."""
    try:
        return sorted((path for path in folder.iterdir() if path.name.startswith("step-")), reverse=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
