"""A budget for images decoded at once: several large ones, each in a thread, could fill the machine's memory."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from jepakit._machine import usable_cpus
from jepakit.readers.forks import in_each_child

AT_ONCE_BYTES = (64 << 20) * max(2, usable_cpus())
"""64 MB of pixels a core: a photograph of 20 megapixels each. Decoding takes about three times as much."""


class _Room:
    def __init__(self) -> None:
        self.changed, self.taken = threading.Condition(), 0
        self.waiting: deque[object] = deque()


_room = _Room()


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """Wait until an image of `size` bytes fits into the budget, or no other is being decoded; hold its bytes for the block.

    All threads share `AT_ONCE_BYTES`, first come, first served: small images never keep out a large one. The block must not ask for
    room again.
    """
    room, turn = _room, object()
    with room.changed:
        room.waiting.append(turn)
        try:
            room.changed.wait_for(
                lambda: room.waiting[0] is turn and (not room.taken or room.taken + size <= AT_ONCE_BYTES)
            )
            room.taken += size
        finally:
            room.waiting.remove(turn)
            room.changed.notify_all()
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
