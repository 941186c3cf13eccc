"""Small reads of many files at once, with progress: most of the time goes to waiting for a disk or a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from jepakit._progress import Steps

_In = TypeVar("_In")
_Out = TypeVar("_Out")

THREADS = 8
# One future per file, all at once, would take more memory than the answers.
_AT_ONCE = 64


def in_threads(work: Callable[[_In], _Out], items: Sequence[_In], what: str, *, threads: int = THREADS) -> list[_Out]:
    """`[work(item) for item in items]` in threads, showing progress; raises the first error."""
    done: list[_Out] = []
    with Steps(len(items), what=what) as steps, ThreadPoolExecutor(threads) as pool:
        while len(done) < len(items):
            for answer in pool.map(work, items[len(done) : len(done) + _AT_ONCE]):
                done.append(answer)
                steps.update(len(done))
    return done
