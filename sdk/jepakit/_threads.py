"""Reads of many files at once: most of the time goes to waiting for a disk or a network."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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


def work_ahead(
    work: Callable[[_In], _Out], items: Iterable[_In], *, threads: int, ahead: int
) -> Generator[tuple[_In, Future[_Out]], None, None]:
    """Each item with the future of `work(item)`, in order; threads work on up to `ahead` items beyond the last one taken.

    Closing it ends the threads once each has finished the item it works on.
    """
    pool = ThreadPoolExecutor(threads, "jepakit-read")
    begun: deque[tuple[_In, Future[_Out]]] = deque()
    try:
        for item in items:
            begun.append((item, pool.submit(work, item)))
            if len(begun) > ahead:
                yield begun.popleft()
        while begun:
            yield begun.popleft()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
