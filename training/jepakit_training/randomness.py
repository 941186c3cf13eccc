"""Stateless randomness: every random number is a function of its purpose, so resuming needs no RNG state."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from the run's seed and the names and numbers of its use, e.g. (seed, "views", epoch, index).

    The same on every platform, Python version and rank (unlike `hash`).
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@contextmanager
def own_generators() -> Iterator[None]:
    """Restore torch's random generators after the block, which may draw and seed as it likes."""
    on_gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=on_gpus):
        yield
