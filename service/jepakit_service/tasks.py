"""Tells a task's own cancellation from that of something it awaited."""

from __future__ import annotations

import asyncio


def is_cancelled() -> bool:
    """Whether the running task itself is being cancelled: a CancelledError may also come from what it awaits."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
