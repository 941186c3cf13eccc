"""Processes for tests to kill: forked within milliseconds from one that has imported everything and run nothing."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

_PRELOAD = [
    "jepakit",
    "jepakit.cli",
    "jepakit_training",
    "jepakit_training.stopping",
    "accelerate",
    "timm",
    "tomli_w",
]


def start(function: Callable[..., Any], *args: Any, log: Path, **kwargs: Any) -> ForkServerProcess:
    """Run `function(*args, **kwargs)` in a new process with one torch thread; its output goes to `log`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    process: ForkServerProcess = context.Process(target=_run, args=(function, args, kwargs, log))
    process.start()
    return process


def _run(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], log: Path) -> None:
    import torch

    multiprocessing.set_start_method("fork", force=True)  # for the loader, as in a process started by a user
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    torch.set_num_threads(1)
    function(*args, **kwargs)


def import_trackers(file: Path) -> None:
    """Import the trackers' module, and write down all that is imported then."""
    importlib.import_module("jepakit_training.run.trackers")
    file.write_text("\n".join(sys.modules))
