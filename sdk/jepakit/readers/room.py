"""A budget for images decoded at once: several large ones, each in a thread, could fill the machine's memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from jepakit._machine import usable_cpus
from jepakit.readers.forks import in_each_child

AT_ONCE_BYTES = (64 << 20) * max(2, usable_cpus())
"""64 MB a core: a photograph of 20 megapixels each."""


class _Room:
    def __init__(self) -> None:
        self.changed, self.taken = threading.Condition(), 0


_room = _Room()


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """Wait until an image of `size` bytes fits into the budget, or no other is being decoded; hold its bytes for the block.

    All threads share `AT_ONCE_BYTES`. The block must not ask for room again.
    """
    room = _room
    with room.changed:
        room.changed.wait_for(lambda: not room.taken or room.taken + size <= AT_ONCE_BYTES)
        room.taken += size
    try:
        yield
    finally:
        with room.changed:
            room.taken -= size
            room.changed.notify_all()


def _empty() -> None:
    global _room
    _room = _Room()


in_each_child(_empty)
