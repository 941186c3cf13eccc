"""Progress of long work on standard error: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Self, TypeVar

from jepakit._say import is_terminal, say, standard_error

_Item = TypeVar("_Item")
_PLAIN_EVERY_S, _PLAIN_AT_LEAST_EVERY_S, _PLAIN_SHARE = 15.0, 300.0, 0.05
# The time left follows the pace of the last half minute or more: training slows down once the backbone trains too.
_PACE_EVERY_S, _PACE_POINTS = 1.0, 30

_is_shown: ContextVar[bool] = ContextVar("_is_shown", default=True)


@contextmanager
def shown(progress: bool) -> Iterator[None]:
    """Within the block, show progress only if `progress` is true, whichever function would show it."""
    before = _is_shown.set(progress and _is_shown.get())
    try:
        yield
    finally:
        _is_shown.reset(before)


def stage(words: str) -> None:
    """Announce the start of work that cannot be counted."""
    if _is_shown.get():
        say(f"{words} …")


def track(items: Sequence[_Item], what: str, *, progress: bool = True) -> Iterator[_Item]:
    """Yield the items, showing progress."""
    with Steps(len(items), what=what, progress=progress) as steps:
        for done, item in enumerate(items, 1):
            yield item
            steps.update(done)


class Steps:
    """Shows `step of total`, given values and the time left, until its block ends.

    total     number of steps
    first     how many of them were done before
    what      what a step is called
    progress  whether anything is shown
    epochs    passes over the data that all steps together make; None: not shown
    extra_s   seconds of work expected after the last step, counted as time left
    """

    def __init__(
        self,
        total: int,
        *,
        first: int = 0,
        what: str = "step",
        progress: bool = True,
        epochs: float | None = None,
        extra_s: float = 0.0,
    ) -> None:
        self._progress = progress and _is_shown.get()
        self._total, self._first, self._what = total, first, what
        self._epochs, self._extra_s = epochs, extra_s
        self._start = self._last_line = time.monotonic()
        self._pace: deque[tuple[float, int]] = deque(maxlen=_PACE_POINTS)
        self._values, self._spoke = "", False
        self._bar = _bar(what, total, first) if self._progress and total and is_terminal(sys.stderr) else None

    def update(self, done: int, values: str = "") -> None:
        """Report that `done` steps are done; the text `values` is shown until there are newer ones."""
        now = time.monotonic()
        # The first step does not count: it waits for the loader's processes to start.
        if not self._pace or now - self._pace[-1][0] >= _PACE_EVERY_S or done == self._total:
            self._pace.append((now, done))
        self._values = values or self._values
        words = "  ".join(part for part in (self._epoch(done), self._values) if part)
        if self._bar is not None:
            self._bar.update(0, completed=done, left=self._left(done, now), values=words)
        elif self._progress and (
            now - self._last_line > self._pause(now) or (done == self._total and (values or self._spoke))
        ):
            self._last_line, self._spoke = now, True
            line = "  ".join(
                part for part in (f"{self._what} {done}/{self._total}", self._left(done, now), words) if part
            )
            say(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _pause(self, now: float) -> float:
        """Seconds between plain lines: more, the longer it takes already."""
        return min(max(_PLAIN_EVERY_S, _PLAIN_SHARE * (now - self._start)), _PLAIN_AT_LEAST_EVERY_S)

    def _epoch(self, done: int) -> str:
        return (
            f"epoch {self._epochs * done / self._total:.1f}/{round(self._epochs, 1):g}"
            if self._epochs is not None
            else ""
        )

    def _left(self, done: int, now: float) -> str:
        (then, before), first = self._pace[0], self._first
        if done == self._total and not self._extra_s:
            return f"in {human_time(now - self._start)}" if first == 0 else ""
        if done == before:
            return ""
        return f"{human_time((now - then) / (done - before) * (self._total - done) + self._extra_s)} left"


def human_time(seconds: float) -> str:
    """A duration in its two largest units: 45 s, 2 min 30 s, 1 h 12 min, 3 d 4 h."""
    step = 1 if seconds < 600 else 60 if seconds < 86_400 else 3600
    left = step * round(seconds / step)
    parts = []
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"


def _bar(what: str, total: int, first: int) -> Any:
    """A running bar on standard error, its values below it and other output passing above; None where none can be drawn."""
    from rich.console import Console, RenderableType
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.text import Text

    class Bar(Progress):
        def get_renderables(self) -> Iterable[RenderableType]:
            yield from super().get_renderables()
            for task in self.tasks:
                if task.fields["values"]:
                    yield Text(task.fields["values"])

    console = Console(file=standard_error())
    # A notebook's `!command` gives it a terminal, though the cell shows every state of a bar below the last.
    if console.is_dumb_terminal or "JPY_PARENT_PID" in os.environ:
        return None
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
    )
    # Results that are sent elsewhere go there, also while the bar runs.
    bar = Bar(*columns, console=console, redirect_stdout=is_terminal(sys.stdout))
    bar.start()
    bar.add_task(what, total=total, completed=first, left="", values="")
    return bar
