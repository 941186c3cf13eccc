"""Signals in real processes: at the end of a short step, in the middle of a long one, twice, in a thread."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch
from tests.training.forked import start
from tests.training.runs import TINY
from torch.utils.data import DataLoader, Dataset

from jepakit._machine import in_command
from jepakit._run_files import CHECKPOINTS, METRICS
from jepakit_training.stopping import asked_by, stopping

GRACE_S = 1.0


def train(
    folder: Path,
    step_s: float,
    *,
    in_one_call: bool = False,
    stubborn: bool = False,
    loader: bool = False,
    command: bool = False,
    rank: int = 0,
) -> None:
    """A loop like the trainer's; `in_one_call`: a step is one call into C++, during which Python handles no signals."""
    in_command.set(command)
    os.environ["RANK"] = str(rank)
    with stopping(lambda: 7, grace_s=GRACE_S) as stop:
        if loader and os.fork() == 0:
            (folder / "loader").write_text(str(os.getpid()))
            while True:
                time.sleep(0.1)
        for step in range(10_000):
            (folder / "began").touch()
            if in_one_call:
                one_long_call()
            else:
                time.sleep(step_s)
            if stop.at_boundary():
                time.sleep(2 * GRACE_S if stubborn else 0)  # saving to a slow disk
                raise stop.leaving(step + 1)


def one_long_call() -> None:
    torch.linalg.matrix_power(torch.full((1800, 1800), 1 / 1800), 2**40 - 1)


def begun(folder: Path, step_s: float = 0.05, **kwargs: int) -> ForkServerProcess:
    """A process in the middle of its first steps."""
    folder.mkdir(exist_ok=True)
    process = start(train, folder, step_s, log=folder / "log", **kwargs)
    deadline = time.monotonic() + 60
    while not (folder / "began").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.2)
    return process


def ended(process: ForkServerProcess, within_s: float) -> int | None:
    process.join(within_s)
    code = process.exitcode
    process.kill()
    process.join()
    return code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 143), (signal.SIGINT, 1)])
def test_a_short_step_is_finished_first(tmp_path: Path, number: int, code: int) -> None:
    process = begun(tmp_path)
    os.kill(process.pid or 0, number)
    assert ended(process, 20) == code  # multiprocessing makes 1 of any exception but SystemExit
    log = (tmp_path / "log").read_text()
    assert "stopped after step" in log
    assert ("KeyboardInterrupt: stopped after step" in log) == (number == signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_long_step_is_left_when_the_grace_is_over(tmp_path: Path, number: int) -> None:
    process = begun(tmp_path, in_one_call=True)
    os.kill(process.pid or 0, number)
    start_s = time.monotonic()
    assert ended(process, 60) == 143
    assert GRACE_S * 0.9 < time.monotonic() - start_s < GRACE_S + 10
    assert "stopped in the middle of a step: the same command will resume from step 7" in (tmp_path / "log").read_text()


def test_of_several_processes_only_the_first_says_from_where_the_run_resumes(
    tmp_path: Path,
) -> None:
    """The others do not know what has been saved."""
    process = begun(tmp_path, in_one_call=True, rank=1)
    os.kill(process.pid or 0, signal.SIGTERM)
    assert ended(process, 60) == 143
    assert (tmp_path / "log").read_text() == ""


@pytest.mark.parametrize(("command", "code"), [(True, 130), (False, None)])
def test_a_second_ctrl_c_ends_even_a_long_step_but_no_process_of_a_caller(
    tmp_path: Path, command: bool, code: int | None
) -> None:
    process = begun(tmp_path, in_one_call=True, command=command)
    for _ in range(2):
        os.kill(process.pid or 0, signal.SIGINT)
        time.sleep(0.3)
    assert (tmp_path / "log").read_text() == "stopping after this step …\n"
    assert ended(process, 20 if command else 5) == code


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping(lambda: 0) as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.at_boundary()
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def train_beside_a_handler(folder: Path) -> None:
    signal.signal(signal.SIGHUP, lambda *_: (folder / "handled").touch())
    train(folder, 0.05)


def test_a_hang_up_that_a_caller_handles_stays_the_callers(tmp_path: Path) -> None:
    process = start(train_beside_a_handler, tmp_path, log=tmp_path / "log")
    for wanted in ("began", "handled"):
        deadline = time.monotonic() + 60
        while not (tmp_path / wanted).exists():
            assert time.monotonic() < deadline
            if wanted == "handled":
                os.kill(process.pid or 0, signal.SIGHUP)
            time.sleep(0.1)
    process.join(2 * GRACE_S)
    assert ended(process, 0) is None, "it trains on"
    assert (tmp_path / "log").read_text() == ""


@pytest.mark.parametrize("workers", [0, 1])
def test_a_lost_terminal_costs_no_step(
    image_folder: Callable[..., Path], weights_file: Callable[[str], Path], tmp_path: Path, workers: int
) -> None:
    """As when a connection by SSH breaks: the kernel sends SIGHUP, and nothing can be printed any more."""
    images, weights, run = image_folder(per_class=12, height=40, width=40), weights_file("test_vit"), tmp_path / "run"
    settings = {**TINY, "backbone": "test_vit", "weights": weights, "steps": 100_000, "workers": workers}
    settings |= {f"views.{name}": value for name, value in settings.pop("views").items()}
    told = [f"--set={name}={json.dumps(value, default=str)}" for name, value in settings.items()]
    command = [sys.executable, "-m", "jepakit", "adapt", str(images), f"--out={run}", *told]
    outer, inner = os.openpty()
    # A process that leads a session gets the first terminal that it opens as its own.
    owning = ["sh", "-c", 'terminal=$1; shift; exec "$@" <"$terminal" >"$terminal" 2>&1', "sh", os.ttyname(inner)]
    process = subprocess.Popen([*owning, *command], start_new_session=True)
    printed = b""
    while not (run / METRICS).exists():
        if select.select([outer], [], [], 0.1)[0]:
            printed += os.read(outer, 4096)
        assert process.poll() is None, printed
    os.close(outer)
    assert process.wait(60) == 143
    os.close(inner)
    assert len(list((run / CHECKPOINTS).iterdir())) == 1


def test_signals_that_ask_for_no_stop_are_no_news(capfd: pytest.CaptureFixture[str]) -> None:
    """Torch's loader has a handler of SIGCHLD, which comes whenever one of its processes ends."""
    before = signal.signal(signal.SIGCHLD, lambda *_: None)
    try:
        with stopping(lambda: 0) as stop:
            os.kill(os.getpid(), signal.SIGCHLD)
            time.sleep(0.2)
            assert not stop.at_boundary()
    finally:
        signal.signal(signal.SIGCHLD, before)
    time.sleep(0.2)
    assert capfd.readouterr().err == ""


def test_a_second_ctrl_c_interrupts_a_step_at_once() -> None:
    with stopping(lambda: 0) as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.at_boundary()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_one_ctrl_c_lets_a_long_step_go_on(tmp_path: Path) -> None:
    process = begun(tmp_path, in_one_call=True)
    os.kill(process.pid or 0, signal.SIGINT)
    process.join(GRACE_S + 2)
    assert process.exitcode is None
    assert ended(process, 0) is None


def test_saving_after_the_step_may_take_longer_than_the_grace(tmp_path: Path) -> None:
    process = begun(tmp_path, stubborn=True)
    os.kill(process.pid or 0, signal.SIGTERM)
    assert ended(process, 20) == 143
    assert "stopped after step" in (tmp_path / "log").read_text()


def test_ctrl_c_in_the_loaders_processes_counts_once(tmp_path: Path) -> None:
    process = begun(tmp_path, step_s=4.0, loader=True)
    worker = int((tmp_path / "loader").read_text())
    try:
        for pid in (process.pid or 0, worker):  # what a terminal does: both are in its foreground group
            os.kill(pid, signal.SIGINT)
        assert ended(process, 30) == 1
        assert "stopped after step 1" in (tmp_path / "log").read_text()
    finally:
        os.kill(worker, signal.SIGKILL)


def opened(folder: Path) -> list[int]:
    """Ten new files: among them are the numbers of those closed before."""
    return [os.open(folder / f"file{number}", os.O_WRONLY | os.O_CREAT) for number in range(10)]


def fork_in_a_run(folder: Path) -> None:
    with stopping(lambda: 0):
        if os.fork() == 0:
            opened(folder)
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        os.wait()


def fork_after_a_run(folder: Path) -> None:
    with stopping(lambda: 0):
        pass
    files = opened(folder)
    if os.fork() == 0:
        for file in files:
            os.write(file, b"whole")
        os._exit(0)
    os.wait()


@pytest.mark.parametrize(("fork", "content"), [(fork_in_a_run, b""), (fork_after_a_run, b"whole")])
def test_the_files_of_a_forked_child_are_its_own(tmp_path: Path, fork: Callable[[Path], None], content: bytes) -> None:
    """Neither gets a signal's number, nor is closed because a pipe of the run had its number."""
    assert ended(start(fork, tmp_path, log=tmp_path / "log"), 30) == 0
    assert [file.read_bytes() for file in tmp_path.glob("file*")] == [content] * 10
    assert (tmp_path / "log").read_text() == ""


def load(folder: Path) -> None:
    """A step that waits for a real loader, whose process the same SIGTERM ends."""
    with stopping(lambda: 7) as stop:
        for _ in DataLoader(Slow(folder), num_workers=1):
            assert not stop.at_boundary()


class Slow(Dataset[int]):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        (self.folder / "began").write_text(str(os.getpid()))
        time.sleep(60)
        return index


def test_a_sigterm_to_the_whole_job_is_a_stop_too(tmp_path: Path) -> None:
    process = start(load, tmp_path, log=tmp_path / "log")
    while not (tmp_path / "began").exists() or not (tmp_path / "began").read_text():
        assert process.is_alive(), (tmp_path / "log").read_text()
        time.sleep(0.01)
    for pid in (process.pid or 0, int((tmp_path / "began").read_text())):
        os.kill(pid, signal.SIGTERM)
    assert ended(process, 15) == 143
    assert "stopped in the middle of a step: the same command will resume from step 7" in (tmp_path / "log").read_text()


def open_files() -> list[str]:
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


def test_everything_is_as_before_afterwards() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    threads, files = threading.active_count(), open_files()
    with stopping(lambda: 0) as stop:
        assert not stop.at_boundary()
        assert threading.active_count() == threads + 1
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert threading.active_count() == threads
    assert signal.set_wakeup_fd(-1) == -1
    assert open_files() == files


def test_signals_wake_up_again_what_they_did_before() -> None:
    """As asyncio's loop, in an application that trains."""
    with socket.socket() as other:
        other.setblocking(False)
        signal.set_wakeup_fd(other.fileno())
        with stopping(lambda: 0):
            pass
        assert signal.set_wakeup_fd(-1) == other.fileno()


def test_a_handler_that_is_not_pythons_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of an application that embeds Python: `getsignal` knows none, and there is nothing to put back."""
    real = signal.getsignal
    before = real(signal.SIGTERM)
    monkeypatch.setattr(signal, "getsignal", lambda number: None if number == signal.SIGTERM else real(number))
    with stopping(lambda: 0):
        assert real(signal.SIGTERM) == before
        assert real(signal.SIGINT) != signal.default_int_handler
    assert real(signal.SIGINT) == signal.default_int_handler


def test_outside_the_main_thread_signals_stay_as_they_are() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def run() -> None:
        with stopping(lambda: 0) as stop:
            seen.append((stop.at_boundary(), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


def test_a_thread_is_asked_to_stop_by_what_its_caller_looks_at(tmp_path: Path) -> None:
    asked = tmp_path / "stop"
    seen: list[bool] = []

    def train_in_a_thread() -> None:
        with asked_by(asked.exists), stopping(lambda: 0) as stop:
            seen.append(stop.at_boundary())
            asked.touch()
            seen.append(stop.at_boundary())
            assert isinstance(stop.leaving(1), SystemExit)
        with stopping(lambda: 0) as stop:
            seen.append(stop.at_boundary())

    thread = threading.Thread(target=train_in_a_thread)
    thread.start()
    thread.join(10)
    assert seen == [False, True, False]
