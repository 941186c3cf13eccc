"""Training on a Ray cluster through Ray Train: the only module of training that knows Ray.

The workers run `launch.run_rank`, as everywhere. Ray starts them, connects them, and restarts them when one is lost;
each start resumes from RUN's newest checkpoint. So RUN, the images and the current folder must be available to every
node under the same path.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from jepakit._files import reason_of
from jepakit._machine import usable_cpus
from jepakit._messages import lines_of
from jepakit._ray import OWN, SILENT, init, own_folder
from jepakit._say import say
from jepakit.config import AdaptConfig
from jepakit.errors import TrainingError
from jepakit.run import Run
from jepakit.sources import ImageList
from jepakit_training import ranks
from jepakit_training.endings import raise_first, read_endings, reporting_ending
from jepakit_training.run.folder import RAY_FOLDER
from jepakit_training.stopping import GRACE_S, answering, asked_by

_MOST_LOSSES = 3
# Ray reads these at import. A run's records are jepakit's own, in its own folders.
_SETTINGS = {
    **SILENT,
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",  # 53 s were measured on a busy machine; Ray's default is 60
}


class _Job(NamedTuple):
    config: AdaptConfig
    images: ImageList
    out: Path
    folder: Path
    """A folder in RUN that exists while it trains: holds the output of rank 0, and why a process ended."""
    start_in: Path

    @property
    def stop(self) -> Path:
        """A file that exists once the workers are to stop."""
        return self.folder / "stop"


def adapt_on_ray(config: AdaptConfig, images: ImageList, out: Path) -> Run:
    """Adapt on the cluster at RAY_ADDRESS, or on a new local one on this machine; see `launch.adapt`."""
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=RAY_FOLDER, dir=out))
    try:
        with _cluster(config), _repeating(folder / "said"):
            _fit(_Job(config, images, out, folder, Path.cwd()))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Run(out)


@contextmanager
def _cluster(config: AdaptConfig) -> Iterator[None]:
    """A connection to Ray: the caller's, to RAY_ADDRESS, or to our own cluster, which ends with it."""
    os.environ.update(_SETTINGS)
    if (loaded := sys.modules.get("ray")) is not None and loaded.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    if address is not None:
        _check_reachable(address)
    else:  # Ray's ports listen on all interfaces: guarded by a token, as the service's are
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # Ray reads it once per process
    import ray

    with own_folder() if address is None else contextlib.nullcontext() as folder:
        local: dict[str, Any] = (
            {}
            if folder is None
            else {
                **OWN,
                "address": "local",
                "_temp_dir": str(folder),
                "num_cpus": max(usable_cpus(), config.processes or 1),
            }
        )
        try:
            init(**local)
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = "on this machine" if address is None else f"at RAY_ADDRESS = {address}"
            raise TrainingError(f"no Ray cluster {where}: {lines_of(error)[0]}") from error
        try:
            yield
        finally:
            ray.shutdown()


def _check_reachable(address: str) -> None:
    """TrainingError if nothing listens at `address`: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise TrainingError(
            f"no Ray cluster at RAY_ADDRESS = {address} ({reason_of(error)}): start one there, or unset RAY_ADDRESS "
            "for one of this machine alone"
        ) from None


def _fit(job: _Job) -> None:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    for name in ("ray", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    there = ray.cluster_resources()
    gpus = int(there.get("GPU", 0))
    workers = job.config.processes or max(1, gpus)
    kind, have = ("GPU", gpus) if gpus else ("CPU", int(there.get("CPU", 0)))
    if have < workers:
        say(f"waiting for {workers} {kind}s: the cluster has {have} now")
    trainer = TorchTrainer(
        _run_worker,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=bool(gpus)),
        run_config=RunConfig(
            name="train", storage_path=str(job.folder), failure_config=FailureConfig(max_failures=_MOST_LOSSES)
        ),
    )
    failure = _waited_for(trainer, job.stop)
    endings = read_endings(job.folder)
    raise_first(endings)
    if failure is None:
        return
    if endings:
        say(endings[0].traceback, end="")
    why = endings[0] if endings else lines_of(failure)[-1]
    raise TrainingError(
        f"training on Ray failed {_MOST_LOSSES + 1} times, the last time by {why}; the same command resumes from the "
        "last checkpoint"
    ) from failure


def _waited_for(trainer: Any, stop: Path) -> Exception | None:
    """Wait for `trainer.fit`; returns the error that it raised, if any. It runs in a thread: in the main one, Ray would handle SIGINT.

    SIGINT and SIGTERM make the workers stop after their step. Once they have, or after 20 s, or at a second SIGINT, this
    raises KeyboardInterrupt or SystemExit(143).
    """
    raised: list[Exception] = []
    asked: list[int] = []
    deadline = math.inf

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:
            raised.append(error)

    def ask(number: int) -> None:
        nonlocal deadline
        if not asked:
            deadline = time.monotonic() + GRACE_S
        elif number == signal.SIGINT:
            deadline = 0
        asked.append(number)
        stop.touch()

    thread = threading.Thread(target=fit, daemon=True)
    with answering(ask):
        thread.start()
        while thread.is_alive() and time.monotonic() < deadline:
            thread.join(timeout=0.5)
    if not asked:
        return raised[0] if raised else None
    line = "stopped; the same command resumes from the last checkpoint"
    if thread.is_alive():
        say(line)
    raise KeyboardInterrupt(line) if asked[0] == signal.SIGINT else SystemExit(128 + asked[0])


def _run_worker(settings: dict[str, Any]) -> None:
    """What every worker runs, with RANK etc. set by Ray Train."""
    job: _Job = settings["job"]
    rank = ranks.rank()
    if any(ending.error() for ending in read_endings(job.folder)):
        return  # a user's error or one of training itself: a restart would not help
    if job.stop.exists():
        return
    (job.folder / f"rank-{rank}.json").unlink(missing_ok=True)
    os.chdir(job.start_in)
    import torch

    from jepakit_training.launch import run_rank

    torch.set_num_threads(max(1, usable_cpus() // ranks.local_world_size()))  # Ray allows one
    with (
        contextlib.suppress(SystemExit),  # a requested stop: no reason for Ray to restart
        asked_by(job.stop.exists),
        (job.folder / "said" if rank == 0 else Path(os.devnull)).open("a", buffering=1, encoding="utf-8") as said,
        contextlib.redirect_stderr(said),
        reporting_ending(job.folder, rank),
    ):
        run_rank(job.config, job.images, job.out)


@contextmanager
def _repeating(file: Path) -> Iterator[None]:
    """Copy what is written to the file to our standard error, as it comes."""
    file.touch()
    done = threading.Event()

    def repeat() -> None:
        with file.open(encoding="utf-8") as lines:
            last = False
            while not last:
                last = done.wait(0.5)
                say(lines.read(), end="")

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=5)
