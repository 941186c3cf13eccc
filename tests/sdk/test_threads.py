"""Work done ahead by threads."""

from __future__ import annotations

import subprocess
import sys
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


def test_closing_begins_nothing_more_and_waits_for_what_was_begun() -> None:
    begun, started, go_on = list[int](), threading.Event(), threading.Event()

    def work(item: int) -> None:
        begun.append(item)
        if item == 1:
            started.set()
            go_on.wait(10)

    done = work_ahead(work, range(9), threads=1, ahead=3)
    next(done)
    assert started.wait(10)
    closing_it = threading.Thread(target=done.close)
    closing_it.start()
    closing_it.join(0.05)
    assert closing_it.is_alive()
    go_on.set()
    closing_it.join(10)
    assert begun == [0, 1]


def test_without_threads_each_item_is_worked_on_by_the_caller_when_its_turn_comes() -> None:
    begun = list[tuple[int, int]]()

    def work(item: int) -> None:
        begun.append((item, threading.get_ident()))
        if item == 1:
            raise KeyError(item)

    for item, answer in work_ahead(work, range(3), threads=0, ahead=9):
        assert begun[-1] == (item, threading.get_ident())
        assert isinstance(answer.exception(), KeyError) == (item == 1)


def test_threads_that_outlive_the_main_thread_can_still_work_ahead() -> None:
    program = """
import threading
from jepakit._threads import work_ahead

def late():
    threading.main_thread().join()
    print([answer.result() for _, answer in work_ahead(str, range(3), threads=2, ahead=2)])

threading.Thread(target=late).start()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "['0', '1', '2']\n"
    assert done.stderr == ""
