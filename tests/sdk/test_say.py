"""Standard error and standard output that are closed, full, or read by nobody."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jepakit import Embeddings, KNNProbe

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="/dev/full is Linux's")

TALKS = """
import pathlib, sys
from jepakit._progress import Steps, stage, track
from jepakit._say import say
say("warning")
stage("looking")
for _ in track(range(3), "images"): pass
with Steps(2) as steps: steps.update(2, "loss 0.4")
print("worked")
"""
COMMAND = "from jepakit.cli import main; main()"


def done(
    program: str, *arguments: str, buffered: bool = True, terminal: str = "dumb", **streams: object
) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1", "TERM": terminal}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, env=environment, check=False, **streams)  # type: ignore[call-overload,no-any-return]


@needs_full
def test_lines_that_a_full_disk_does_not_take_are_lost_and_the_work_goes_on() -> None:
    with FULL.open("wb") as full:
        ended = done(TALKS, stdout=subprocess.PIPE, stderr=full)
    assert (ended.returncode, ended.stdout) == (0, b"worked\n")


def test_lines_that_nobody_reads_are_lost_and_the_work_goes_on() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    ended = done(TALKS, stdout=subprocess.PIPE, stderr=writing)
    os.close(writing)
    assert (ended.returncode, ended.stdout) == (0, b"worked\n")


_ONLY_WRITES = "sys.stderr = type('Only', (), {'write': lambda self, text: None})()"
_UNTIL_PYTHON_FLUSHES = "import atexit; atexit.register(setattr, sys, 'stderr', None)"


@pytest.mark.parametrize(
    "closing", ["sys.stderr = None", "sys.stderr.close()", f"{_ONLY_WRITES}; {_UNTIL_PYTHON_FLUSHES}"]
)
def test_without_standard_error_nothing_is_said_and_standard_output_is_the_results(closing: str) -> None:
    ended = done(f"import sys; {closing}\n{TALKS}", stdout=subprocess.PIPE)
    assert (ended.returncode, ended.stdout) == (0, b"worked\n")


def test_a_stream_that_fails_in_its_own_way_does_not_end_the_work() -> None:
    """As a notebook's, whose thread is gone: zmq's error is neither an OSError nor a ValueError."""
    failing = "class Stream:\n    def write(self, text): raise LookupError\n    flush = write\nsys.stderr = Stream()"
    ended = done(f"import sys\n{failing}\n{_UNTIL_PYTHON_FLUSHES}\n{TALKS}", stdout=subprocess.PIPE)
    assert (ended.returncode, ended.stdout) == (0, b"worked\n")


def test_a_bar_whose_terminal_is_gone_does_not_end_the_work() -> None:
    program = """
import os, sys
from jepakit._progress import Steps
outer, inner = os.openpty()
sys.stderr = os.fdopen(inner, "w")
with Steps(2) as steps:
    os.close(outer)
    steps.update(2, "loss 0.4")
print("worked")
"""
    ended = done(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, terminal="xterm")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"worked\n", b"")


@needs_full
@pytest.mark.parametrize("buffered", [True, False])
def test_a_result_that_standard_output_does_not_take_is_an_error_in_one_line(buffered: bool) -> None:
    with FULL.open("wb") as full:
        ended = done(COMMAND, "doctor", buffered=buffered, stdout=full, stderr=subprocess.PIPE)
    assert ended.returncode == 1
    (line,) = ended.stderr.decode().splitlines()
    assert line.startswith("error: the result could not be printed (No space left on device)")


def test_without_standard_output_a_table_is_shown_to_nobody(tmp_path: Path) -> None:
    embeddings = Embeddings(np.eye(4, dtype=np.float32), "0123456789abcdef", list("abcd"), list("xyxy"))
    embeddings.save(tmp_path / "e.npz")
    KNNProbe().fit(embeddings).save(tmp_path / "p.safetensors")
    asked = ["probe", "predict", str(tmp_path / "p.safetensors"), str(tmp_path / "e.npz")]
    ended = done(f"import sys; sys.stdout = None\n{COMMAND}", *asked, stderr=subprocess.PIPE)
    assert (ended.returncode, ended.stderr) == (0, b"")


@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_that_has_seen_enough_is_told_nothing(buffered: bool) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    ended = done(COMMAND, "--version", buffered=buffered, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (1, b"")


def test_too_little_address_space_for_a_library_is_told_in_one_line() -> None:
    program = """
import sys
from jepakit.cli import program
def app(**_): raise ImportError("libtorch_cpu.so: failed to map segment from shared object")
program.app = app
program.main()
"""
    ended = done(program, stderr=subprocess.PIPE)
    assert ended.returncode == 1
    assert ended.stderr.decode().startswith("error: libtorch_cpu.so: failed to map segment from shared object: ")
    assert "ulimit -v" in ended.stderr.decode()
