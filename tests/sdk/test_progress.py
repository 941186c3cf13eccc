"""Progress as a user sees it: plain lines in a file, a bar on a terminal (a real pseudo-terminal)."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest

from jepakit import _progress
from jepakit._progress import Steps, human_time, track

VALUES = "loss 0.4321  81 images/s"


class Clock:
    """A `time` that the tests control."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(_progress, "time", clock)
    return clock


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.3, "0 s"), (45.4, "45 s"), (59.6, "1 min"), (150, "2 min 30 s"), (599.9, "10 min"), (659, "11 min"),
        (3599, "1 h"), (4320, "1 h 12 min"), (86_399, "1 d"), (90_000, "1 d 1 h"), (273_700, "3 d 4 h"),
    ],
)  # fmt: skip
def test_durations_in_words(seconds: float, words: str) -> None:
    assert human_time(seconds) == words


def test_a_plain_line_every_15_s_and_at_the_end(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    steps = Steps(100, epochs=10)
    for done in range(1, 101):
        clock.now += 2
        steps.update(done, VALUES if done % 10 == 0 else "")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 100 * 2 // 16 + 1
    assert lines[0] == "step 8/100  3 min 4 s left  epoch 0.8/10"
    assert lines[2].startswith("step 24/100  2 min 32 s left  epoch 2.4/10  loss 0.4321")
    assert lines[-1].startswith("step 100/100  in 3 min 20 s  epoch 10.0/10  loss 0.4321")


def test_long_work_says_less_often_where_it_stands(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """A night in a notebook would be thousands of lines; but a log stays no more than five minutes old."""
    steps, pauses, told_at = Steps(8 * 3600), [], clock.now
    for done in range(1, 8 * 3600):
        clock.now += 1
        steps.update(done)
        if capsys.readouterr().err:
            pauses.append(clock.now - told_at)
            told_at = clock.now
    assert pauses[0] == 16
    assert pauses == sorted(pauses)
    assert pauses[-1] == 301
    assert len(pauses) < 160


def test_the_time_left_counts_the_work_after_the_last_step(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    steps = Steps(20, extra_s=3600)
    for done in (1, 10, 20):
        clock.now += 10 * (10 if done > 1 else 1)
        steps.update(done, VALUES)
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("step 10/20  1 h 2 min left")
    assert last.startswith("step 20/20  1 h left")


def test_the_time_left_follows_the_present_pace(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """A backbone that is frozen for the first 100 steps makes them ten times as fast."""
    steps = Steps(1000)
    for done in range(1, 202):
        clock.now += 1 if done <= 100 else 10
        steps.update(done)
    assert "step 201/1000  2 h 13 min left" in capsys.readouterr().err


def test_a_resumed_run_reckons_with_its_own_steps(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    steps = Steps(100, first=90)
    clock.now += 300  # the loader's processes start
    steps.update(91)
    clock.now += 20
    steps.update(95)
    assert capsys.readouterr().err == "step 91/100\nstep 95/100  25 s left\n"


def test_the_number_of_epochs_is_rounded(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    steps = Steps(80, epochs=2.16034)
    clock.now += 20
    steps.update(40)
    assert capsys.readouterr().err == "step 40/80  epoch 1.1/2.2\n"


def test_what_is_done_at_once_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(range(5), "shards")) == list(range(5))
    assert list(track([], "shards")) == []
    assert capsys.readouterr().err == ""


def test_slow_items_end_with_a_line(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in track(range(4), "shards"):
        clock.now += 10
    assert capsys.readouterr().err.splitlines() == ["shards 2/4  20 s left", "shards 4/4  in 40 s"]


def test_disabled_says_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Steps(2, progress=False) as steps:
        clock.now += 100
        steps.update(2, VALUES)
    assert capsys.readouterr().err == ""


ON_A_TERMINAL = f"""
import sys, time
from jepakit._progress import Steps
with Steps(4, epochs=2) as steps:
    for done in range(1, 5):
        time.sleep(0.15)
        steps.update(done, {VALUES!r})
        if done == 2:
            print("warning: in between", file=sys.stderr)
"""


def on_terminal(term: str, columns: int = 200, program: str = ON_A_TERMINAL) -> str:
    """What a program writes to a pseudo-terminal."""
    outer, inner = pty.openpty()
    environment = {**os.environ, "TERM": term, "COLUMNS": str(columns)}
    child = subprocess.Popen([sys.executable, "-c", program], stderr=inner, env=environment)
    os.close(inner)
    written = b""
    try:
        while part := os.read(outer, 4096):
            written += part
    except OSError:  # the other end is closed
        pass
    os.close(outer)
    assert child.wait() == 0
    return written.decode()


def test_a_bar_on_a_terminal() -> None:
    written = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", on_terminal("xterm"))
    assert "━" in written
    assert "4/4" in written
    assert "epoch 2.0/2  loss 0.4321" in written
    assert re.search(r"(^|[\r\n])warning: in between", written)


@pytest.mark.parametrize("columns", [40, 80])
def test_a_narrow_terminal_shows_the_bar_and_every_value(columns: int) -> None:
    written = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", on_terminal("xterm", columns)).replace("\r", "")
    last = written.rpartition("step")[2]
    assert re.match(r" ━+ +4/4 +in \d+ s", last)
    assert " ".join(last.split("s", 1)[1].split()).startswith(" ".join(f"epoch 2.0/2  {VALUES}".split()))


def test_results_that_are_sent_to_a_file_go_there_while_a_bar_runs() -> None:
    program = """
import io, sys
from jepakit._progress import Steps
sys.stdout = io.StringIO()
with Steps(2):
    print("result")
assert sys.stdout.getvalue() == "result\\n"
"""
    assert "result" not in on_terminal("xterm", program=program)


def test_nothing_to_do_has_no_bar() -> None:
    program = "from jepakit._progress import Steps\nwith Steps(0): pass"
    assert on_terminal("xterm", program=program) == ""


def test_plain_lines_on_a_terminal_that_cannot_move_its_cursor() -> None:
    warning, last = on_terminal("dumb").splitlines()
    assert warning == "warning: in between"
    assert re.fullmatch(rf"step 4/4  in \d+ s  epoch 2.0/2  {re.escape(VALUES)}", last)
