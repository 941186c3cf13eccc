"""Work done ahead by threads."""

from __future__ import annotations

import threading
from contextlib import closing

from jepakit._threads import work_ahead


def test_threads_work_on_a_few_items_beyond_the_last_one_taken_in_order() -> None:
    together, begun = threading.Barrier(3), list[int]()

    def work(item: int) -> int:
        begun.append(item)
        together.wait(10)  # broken unless three work at once
        return 2 * item

    with closing(work_ahead(work, range(12), threads=3, ahead=5)) as done:
        item, answer = next(done)
        assert (item, answer.result()) == (0, 0)
        assert max(begun) <= 5
        assert [(item, answer.result()) for item, answer in done] == [(item, 2 * item) for item in range(1, 12)]


def test_nothing_more_is_begun_once_it_is_closed() -> None:
    begun, go_on = list[int](), threading.Event()

    def work(item: int) -> None:
        begun.append(item)
        go_on.wait(10)

    done = work_ahead(work, range(9), threads=1, ahead=3)
    _, first = next(done)
    done.close()
    go_on.set()
    first.result()
    for thread in threading.enumerate():
        if thread.name.startswith("jepakit-read"):
            thread.join(10)
    assert begun == [0]
