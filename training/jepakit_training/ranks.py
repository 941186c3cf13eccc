"""This process's rank and the number of processes, from the environment variables of torch's launchers, accelerate and
Ray Train. Needs no torch."""

from __future__ import annotations

import os


def has_launcher() -> bool:
    """Whether torchrun, accelerate or Ray Train started this process, even as the only one."""
    return "RANK" in os.environ


def rank() -> int:
    """This process's rank, from 0; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes train; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """How many of the processes share this machine; 1 without a launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
