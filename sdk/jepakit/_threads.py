"""Work in threads, such as reading many files: most of the time goes to waiting for a disk or a network."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

from jepakit._progress import Steps

_In = TypeVar("_In")
_Out = TypeVar("_Out")

THREADS = 8
# One future per file, all at once, would take more memory than the answers.
_AHEAD = 64


def in_threads(work: Callable[[_In], _Out], items: Sequence[_In], what: str, *, threads: int = THREADS) -> list[_Out]:
    """`[work(item) for item in items]` in threads, showing progress; raises the first error."""
    done: list[_Out] = []
    reading = work_ahead(work, items, threads=threads, ahead=_AHEAD)
    with Steps(len(items), what=what) as steps, closing(reading):
        for _, answer in reading:
            done.append(answer.result())
            steps.update(len(done))
    return done


def work_ahead(
    work: Callable[[_In], _Out], items: Iterable[_In], *, threads: int, ahead: int
) -> Generator[tuple[_In, Future[_Out]], None, None]:
    """Each item with the future of `work(item)`, in order; threads work on up to `ahead` items beyond the last one taken.

    threads  0: nothing is done ahead, and the work is done in the caller's own thread

    Closing it waits for what the threads are working on.
    """
    if not threads:
        yield from ((item, _done(work, item)) for item in items)
        return
    pool = ThreadPoolExecutor(threads, "jepakit-read")
    begun: deque[tuple[_In, Future[_Out]]] = deque()
    try:
        for item in items:
            try:
                begun.append((item, pool.submit(work, item)))
            except RuntimeError:  # the main thread has ended: other threads run on, but pools take no more work
                begun.append((item, _done(work, item)))
            if len(begun) > ahead:
                yield begun.popleft()
        while begun:
            yield begun.popleft()
    finally:
        pool.shutdown(cancel_futures=True)


def _done(work: Callable[[_In], _Out], item: _In) -> Future[_Out]:
    answer: Future[_Out] = Future()
    try:
        answer.set_result(work(item))
    except Exception as error:
        answer.set_exception(error)
    return answer
