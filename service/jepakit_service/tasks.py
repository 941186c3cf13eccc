"""Tells a task's own cancellation from one of what it awaited."""

from __future__ import annotations

import asyncio


def is_cancelled() -> bool:
    """Whether somebody wants the running task itself to end: a CancelledError may have come from what it awaits."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
