"""Locks and forks: a child has only the thread that forked, so a lock held by the parent's other threads is never released there."""

from __future__ import annotations

import os
from collections.abc import Callable
from threading import Lock


def in_each_child(renew: Callable[[], None], lock: Lock | None = None) -> None:
    """Have each forked process call `renew` before anything else, to release what threads of its parent hold.

    With a `lock`, which must never be held for long, the fork waits until no other thread is in the middle of a change.
    """
    if not hasattr(os, "register_at_fork"):
        return
    if lock is None:
        os.register_at_fork(after_in_child=renew)
    else:
        os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
        os.register_at_fork(after_in_child=renew)
