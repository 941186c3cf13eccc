"""Stopping a run from outside: at the end of the current step if that is soon, else in the middle of it.

SIGINT, SIGTERM and SIGHUP (a lost terminal) ask for a stop at the end of the step. Python runs signal handlers between
two of its own instructions, and one backward pass of a large model on a CPU is one instruction that can take minutes; the
senders of SIGTERM (torchrun, Slurm, Kubernetes, spot machines) kill after about 30 s. So a thread reads the pipe into which
Python's C-level handler writes each signal at once; it prints that the run stops, and ends the process if the step does not
end in time. Only that step is lost: after a slow step the run saves at once (`checkpoint.Saver`). Ctrl-C ends only jepakit's
own processes this way: a notebook's kernel, or a caller's script, may hold other work.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from contextvars import ContextVar

from jepakit._machine import in_command
from jepakit._say import say
from jepakit._signals import handled
from jepakit_training import ranks

GRACE_S = 20.0
_SECOND_GRACE_S = 2.0
_pipes: set[int] = set()
_also_asked: ContextVar[Callable[[], bool]] = ContextVar("_also_asked", default=lambda: False)


def answering(handler: Callable[[int], object]) -> AbstractContextManager[None]:
    """While the block runs, `handler` handles SIGINT and SIGTERM, as `handled` does, and SIGHUP as a SIGTERM.

    A SIGHUP that is ignored stays ignored, as nohup wants, and one that a caller handles stays the caller's.
    """
    meanings = _meanings()
    return handled(map(signal.Signals, meanings), lambda number, _: handler(meanings[number]))


def _meanings() -> dict[int, signal.Signals]:
    """The signals that ask for a stop, each with the signal that it is treated as: SIGINT or SIGTERM."""
    before = signal.getsignal(signal.SIGHUP)
    hangs_up = before is signal.SIG_DFL or (in_command.get() and before is not signal.SIG_IGN)
    meanings: dict[int, signal.Signals] = {signal.SIGINT: signal.SIGINT, signal.SIGTERM: signal.SIGTERM}
    return {**meanings, signal.SIGHUP: signal.SIGTERM} if hangs_up else meanings


@contextmanager
def asked_by(asked: Callable[[], bool]) -> Iterator[None]:
    """In the block, `asked` can also request a stop, checked after every step: for threads, which get no signals."""
    before = _also_asked.set(asked)
    try:
        yield
    finally:
        _also_asked.reset(before)


class Stop:
    """Whether a stop was requested, and how to exit then."""

    def __init__(self, newest: Callable[[], int]) -> None:
        self._newest = newest
        self.number: int | None = None
        """The last signal that requested a stop."""
        self.seen = False
        """Whether `at_boundary` has returned True: then the loop knows, and the watchdog lets it take its time to save."""

    def at_boundary(self) -> bool:
        """Whether to stop; call it at the end of every step."""
        self.seen = self.number is not None or _also_asked.get()()
        return self.seen

    def ask(self, number: int) -> None:
        """Record a signal; from then on, SIGINT raises KeyboardInterrupt."""
        self.number = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def leaving(self, done: int) -> BaseException:
        """Report where the run was stopped; returns the exception to raise.

        KeyboardInterrupt after SIGINT, SystemExit(143) after SIGTERM, or when another process was told to stop.
        """
        line = f"stopped after step {done}; run the same command again to resume"
        say(line)
        return KeyboardInterrupt(line) if self.number == signal.SIGINT else SystemExit(128 + signal.SIGTERM)

    def in_a_step(self) -> str:
        """The message of a process that exits in the middle of a step."""
        newest = self._newest()
        return f"stopped in the middle of a step: the same command will {f'resume from step {newest}' if newest else 'start over'}"


class _Watchdog:
    """A thread that ends the process if a step outlasts the grace period; it reads the signal numbers written by the C
    handler."""

    def __init__(self, stop: Stop, grace_s: float) -> None:
        self._stop, self._grace_s, self._is_ours = stop, grace_s, in_command.get()
        self._meanings = _meanings()
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._thread = threading.Thread(target=self._watch, name="jepakit-stopping", daemon=True)
        self._thread.start()
        self._pipe_before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        _pipes.add(self._writing)

    def close(self) -> None:
        """End the thread."""
        signal.set_wakeup_fd(self._pipe_before)
        _pipes.discard(self._writing)
        os.close(self._writing)
        self._thread.join()
        os.close(self._reading)

    def _watch(self) -> None:
        """The thread's loop; returns when `close` closes the pipe's other end."""
        deadline, code, interrupts, told = None, 0, 0, False
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._reading], [], [], left)[0]:
                if not self._stop.seen:
                    self._leave_now(code)
                deadline = None
                continue
            written = os.read(self._reading, 64)
            if not written:
                return
            numbers = [self._meanings[number] for number in written if number in self._meanings]
            # Other signals are read too, such as SIGCHLD when torch's loader ends. `say` gets its own thread, as a write can block.
            if not told and ranks.rank() == 0 and numbers:
                threading.Thread(target=say, args=("stopping after this step …",), daemon=True).start()
                told = True
            interrupts += numbers.count(signal.SIGINT)
            if interrupts >= 2 and self._is_ours:
                deadline, code = time.monotonic() + _SECOND_GRACE_S, 128 + signal.SIGINT
            elif signal.SIGTERM in numbers and deadline is None:
                deadline, code = time.monotonic() + self._grace_s, 128 + signal.SIGTERM

    def _leave_now(self, code: int) -> None:
        # A progress bar has hidden the cursor; `print` could wait for a lock that the main thread holds.
        show_cursor = "\033[?25h" if os.isatty(2) else ""
        if ranks.rank() == 0:  # the others do not know what has been saved
            with suppress(OSError):
                os.write(2, f"{show_cursor}\n{self._stop.in_a_step()}\n".encode())
        os._exit(code)


@contextmanager
def stopping(newest: Callable[[], int], *, grace_s: float = GRACE_S) -> Iterator[Stop]:
    """While the block runs, SIGINT, SIGTERM and SIGHUP ask for a stop at the end of the step (`Stop.at_boundary`).

    newest   the step of the newest checkpoint, for the message; 0 if there is none
    grace_s  seconds that a step may continue after SIGTERM; then the process ends with exit code 143

    A second SIGINT interrupts the step; if even that takes over 2 s, a process of jepakit's own (`in_command`) ends
    with exit code 130, and any other goes on to the end of what it computes.
    Outside the main thread (e.g. a notebook's worker) signal handling is not changed; use `asked_by` there.
    """
    stop = Stop(newest)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    with closing(_Watchdog(stop, grace_s)), answering(stop.ask):
        try:
            yield stop
        except RuntimeError as error:
            # A SIGTERM sent to all processes of a job would also end the loader's, unless they ignore it.
            if stop.number is None or "DataLoader worker" not in str(error):
                raise
            if ranks.rank() == 0:
                say(stop.in_a_step())
            raise SystemExit(128 + stop.number) from error


def _close_pipes() -> None:
    """In a forked child: close the pipes. Ctrl-C reaches the loader's processes too, and would be counted once more for each."""
    if _pipes:
        signal.set_wakeup_fd(-1)
    while _pipes:
        os.close(_pipes.pop())


os.register_at_fork(after_in_child=_close_pipes)
