"""Progress of long work on standard error: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

_Item = TypeVar("_Item")
_PLAIN_EVERY_S = 15.0


def track(items: Sequence[_Item], what: str, *, enabled: bool = True) -> Iterator[_Item]:
    """Yield the items, showing how far it is."""
    steps = Steps(len(items), 0, what=what, enabled=enabled)
    try:
        for done, item in enumerate(items, 1):
            yield item
            steps.update(done)
    finally:
        steps.close()


class Steps:
    """Shows `step of total`, chosen values beside it, and the time that is left."""

    def __init__(self, total: int, first: int, *, what: str = "step", enabled: bool = True) -> None:
        self._total, self._first, self._what, self._enabled = total, first, what, enabled
        self._start = self._last_line = time.monotonic()
        self._bar: Any = None
        if enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[values]}"),
            )  # fmt: skip
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(what, total=total, completed=first, values="")

    def update(self, done: int, values: Mapping[str, float] | None = None) -> None:
        """Say that `done` steps are done."""
        shown = describe(values or {})
        if self._bar is not None:
            self._bar.update(self._task, completed=done, values=shown)
        elif self._enabled and (
            time.monotonic() - self._last_line > _PLAIN_EVERY_S or (done == self._total and values)
        ):
            self._last_line = time.monotonic()
            spent = self._last_line - self._start
            left = spent / max(1, done - self._first) * (self._total - done)
            print(
                f"{self._what} {done}/{self._total}  {left:.0f} s left  {shown}".rstrip(),
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """Take the bar down."""
        if self._bar is not None:
            self._bar.stop()


def describe(values: Mapping[str, float]) -> str:
    """Training's numbers in the words of the docs; SIGReg beside its floor."""
    if not values:
        return ""
    return (
        f"loss {values['loss']:.4f}  prediction {values['prediction']:.4f}  sigreg {values['sigreg']:.2f} (floor 1.05)  "
        f"{values['images_per_s']:.0f} images/s  data wait {values['data_wait']:.0%}"
    )
