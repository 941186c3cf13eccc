"""`adapt`: in this process, in several on this machine, or on a Ray cluster. The training itself is `loop.adapt_here`.

The processes are new interpreters that are sent the settings and the list of images, so a notebook, or a script
without a main guard, can start them as well as the command line. torchrun's agent does not fit: it sends signals to
whole process groups, so that a SIGTERM kills the loader's processes before the step that would end in a
checkpoint, and it does not report the class of an error.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from jepakit._machine import usable_cpus
from jepakit._say import say
from jepakit.config import AdaptConfig
from jepakit.errors import ConfigError, TrainingError
from jepakit.run import Run
from jepakit.sources import ImageList
from jepakit_training import ranks
from jepakit_training.endings import raise_first, read_endings
from jepakit_training.stopping import answering

_GRACE_S = 10.0  # for the others to report why, or to end, after one process has failed
_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit codes of a process that stopped when told to


def adapt(config: AdaptConfig, images: ImageList, out: Path) -> Run:
    """Continue LeJEPA pretraining of a backbone on `images`; returns the finished run in `out`.

    Running it again with the same settings resumes an interrupted run, or returns a finished one; other settings or
    data are refused. Raises InputError for what the user can fix, TrainingError otherwise, whether one process trains
    or many.
    """
    if ranks.has_launcher():  # torchrun or accelerate
        _check_launched(config, images)
        return run_rank(config, images, out)
    if images.in_memory and (config.launcher == "ray" or (config.processes or 1) > 1):
        raise ConfigError(
            "images in memory cannot be shared between processes: adapt with processes = 1 and the local launcher, or "
            "save them to a folder"
        )
    if config.launcher == "ray":
        from jepakit_training.ray_launch import adapt_on_ray

        return adapt_on_ray(config, images, out)
    count = count_processes(config, images)
    if count == 1:
        from jepakit_training.loop import adapt_here

        return adapt_here(config, images, out)
    return _adapt_in(count, config, images, out)


def run_rank(config: AdaptConfig, images: ImageList, out: Path) -> Run:
    """Train as one rank of several; RANK and WORLD_SIZE are read from the environment."""
    import torch
    from accelerate import PartialState

    from jepakit_training.loop import adapt_here

    on_cpu = not torch.cuda.is_available()
    if on_cpu:  # without it, accelerate takes each process on a CPU for the only one
        os.environ["ACCELERATE_USE_CPU"] = "true"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(torch|accelerate)\b")  # not actionable for users
        met = PartialState(cpu=on_cpu).num_processes  # adapt_here's Accelerator shares it
    if met != ranks.world_size():
        raise TrainingError(
            f"{met} processes train instead of {ranks.world_size()}: start them with torchrun, or let jepakit start them, processes=N"
        )
    return adapt_here(config, images, out)


def _check_launched(config: AdaptConfig, images: ImageList) -> None:
    if config.launcher == "ray":
        raise ConfigError("launcher = 'ray' starts its own processes: run it without torchrun or accelerate launch")
    if config.processes not in (None, ranks.world_size()):
        raise ConfigError(
            f"processes = {config.processes}, but the launcher has started {ranks.world_size()}: leave processes out, or run it "
            "without a launcher"
        )
    if images.in_memory and ranks.world_size() > 1:
        raise ConfigError(
            f"images in memory cannot be shared between {ranks.world_size()} processes: save them to a folder"
        )


def count_processes(config: AdaptConfig, images: ImageList) -> int:
    """How many processes train on this machine; ConfigError if it has GPUs, but fewer than the processes asked for."""
    if config.processes == 1 or images.in_memory:
        return 1
    gpus = count_gpus()
    if config.processes is None:
        return max(1, gpus)
    if gpus and config.processes > gpus:
        raise ConfigError(
            f"processes = {config.processes}, but this machine has {gpus} GPUs: start at most one process per GPU"
        )
    return config.processes


def count_gpus() -> int:
    """GPUs that torch can use: the driver also counts those that it is too old for."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _adapt_in(processes: int, config: AdaptConfig, images: ImageList, out: Path) -> Run:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in its __all__

    # The rendezvous store is in this process: a port picked for one of the others to bind might be taken by then. It gets
    # our own socket, as by default it would listen on every interface and accept any connection.
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    with tempfile.TemporaryDirectory(prefix="jepakit-") as folder:
        group = _Group(processes, store.port, Path(folder), str(out))
        try:
            # `wait` passes them on to the training processes, which stop after the step they are in, with a checkpoint.
            with answering(group.stop):
                group.hand_out(pickle.dumps((config, images, out, Path(folder))))
                group.wait()
        finally:
            group.kill()
        if not group.done:
            _raise_ending(group)
    return Run(out)


class _Group:
    """The training processes. They do not outlive this one: they end when their standard input is closed.

    Rank 0 writes to our standard error; output of the others and of libraries is kept in FOLDER/rank-N.log.
    """

    def __init__(self, count: int, port: int, folder: Path, name: str) -> None:
        self.folder = folder
        self.signals: list[int] = []
        """The signals by which this process was told to stop, in order."""
        self.ended: dict[int, int] = {}
        """{rank: exit code} in order of ending; without those that were killed at the end."""
        self.processes = [self._start(rank, count, port, name) for rank in range(count)]

    def _start(self, rank: int, count: int, port: int, name: str) -> subprocess.Popen[bytes]:
        set_ = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": count,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "TORCHELASTIC_USE_AGENT_STORE": True,
            "TORCHELASTIC_RESTART_COUNT": 0,  # so that rank 0 does not open a store itself
        }
        defaults = {
            "OMP_NUM_THREADS": max(1, usable_cpus() // count),
            "GLOO_SOCKET_IFNAME": "lo",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }
        environment = {
            **{key: str(value) for key, value in defaults.items()},
            **os.environ,
            **{key: str(value) for key, value in set_.items()},
        }
        with self.log(rank).open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "jepakit_training.worker", name],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log if rank else None,
                start_new_session=True,  # Ctrl-C reaches only this process, which passes it on once
            )

    def log(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.log"

    def hand_out(self, job: bytes) -> None:
        for process in self.processes:
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # it has ended already: `wait` finds out
                process.stdin.write(job)
                process.stdin.flush()

    @property
    def done(self) -> bool:
        """Whether all have ended successfully."""
        return len(self.ended) == len(self.processes) and not any(self.ended.values())

    def wait(self) -> None:
        """Pass signals on; return when all have ended, at a second Ctrl-C, or when one has failed and the grace period
        of the others is over.

        A reported error counts even before its process ends: with NCCL, ending may wait for the other processes.
        """
        deadline, passed_on = float("inf"), 0
        while len(self.ended) < len(self.processes) and time.monotonic() < deadline:
            if signal.SIGINT in self.signals[1:]:
                return
            passed_on = self._pass_on(passed_on)
            for rank, process in enumerate(self.processes):
                if rank not in self.ended and process.poll() is not None:
                    self.ended[rank] = process.returncode
                    if process.returncode < 0:  # its loader processes would go on for seconds, and complain
                        with suppress(ProcessLookupError):
                            os.killpg(process.pid, signal.SIGKILL)
            endings = read_endings(self.folder)
            if any(ending.error() for ending in endings):
                return  # anything the others report is a consequence
            failed = any(code not in (0, *_STOPPED) for code in self.ended.values())
            if failed or any(not ending.asked_for for ending in endings):
                deadline = min(deadline, time.monotonic() + _GRACE_S)
            time.sleep(0.05)

    def stop(self, number: int) -> None:
        """Record a signal for `wait`: a handler can run at any point, even inside `Popen.poll`, which holds a lock."""
        self.signals.append(number)

    def _pass_on(self, done: int) -> int:
        """Pass on all signals after the first `done`; returns how many there are now."""
        new = self.signals[done:]
        for number in new:
            for process in self.processes:
                process.send_signal(number)  # does nothing if the process has ended
        return done + len(new)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.close()


def _raise_ending(group: _Group) -> NoReturn:
    """Raise the error that a single process would have raised: the cause, not its consequences."""
    endings = read_endings(group.folder)
    raise_first(endings)
    if group.signals and group.signals[-1] == signal.SIGTERM:
        raise SystemExit(128 + signal.SIGTERM)
    if group.signals:
        raise KeyboardInterrupt(next((ending.message for ending in endings if ending.asked_for), ""))
    many, resume = len(group.processes), "the same command resumes from the last checkpoint"
    for rank, code in group.ended.items():
        if code < 0:
            why = ", perhaps by the system because memory ran out" if -code == signal.SIGKILL else ""
            raise TrainingError(f"process {rank} of {many} was ended by {signal.Signals(-code).name}{why}; {resume}")
    if endings:
        first = endings[0]
        say(first.traceback, end="")
        raise TrainingError(f"process {first.rank} of {many} failed: {first}; {resume}")
    rank, code = next((rank, code) for rank, code in group.ended.items() if code)
    words = group.log(rank).read_text(encoding="utf-8", errors="replace").strip()
    raise TrainingError(f"process {rank} of {many} ended with exit code {code}: {words[-500:] or 'it said nothing'}")
