"""SIGKILL at any moment of a run: restarted until it finishes, it ends bit for bit like one that was never killed."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.training.forked import start

import jepakit
from jepakit._run_files import BUNDLE, CHECKPOINTS, START
from jepakit.bundles.bundle import WEIGHTS
from jepakit.run import Run

STEPS = 8
TINY: dict[str, Any] = {
    "image_size": 32, "steps": STEPS, "warmup": 0.25, "batch_size": 8, "projector": (32, 32, 8), "n_slices": 16,
    "views": {"n_local": 1, "local_size": 16}, "save_every_s": 0.0, "backbone": "test_vit",
}  # fmt: skip
# What a run's folder shows in each part of a run, in the order in which it goes through them.
MOMENTS = ("starting", "writing the start", "training", "saving", "measuring", "writing the bundle")


def moment_of(run: Path) -> str:
    """The part of the run that the folder shows."""
    newest = max((path.name for path in run.glob(f"{CHECKPOINTS}/step-*")), default="")
    if any(run.glob(f".tmp-{BUNDLE}-*")):
        return "writing the bundle"
    if newest.endswith(f"{STEPS:09d}"):
        return "measuring"
    if any(run.glob(f"{CHECKPOINTS}/.tmp-*")):
        return "saving"
    if (run / START).exists():
        return "training"
    return "writing the start" if any(run.glob(f".tmp-{START}-*")) else "starting"


@pytest.fixture(scope="module")
def begin(
    image_folder: Callable[..., Path], weights_file: Callable[[str], Path]
) -> Callable[[Path, int], ForkServerProcess]:
    """`begin(folder, workers)`: a process that starts or resumes adapting in `folder`/run."""
    images = image_folder(per_class=12, height=40, width=40)
    weights = str(weights_file("test_vit"))

    def call(folder: Path, workers: int) -> ForkServerProcess:
        folder.mkdir(exist_ok=True)
        settings = {**TINY, "weights": weights, "out": folder / "run", "workers": workers}
        return start(jepakit.adapt, images, log=folder / "log", **settings)

    return call


@pytest.fixture(scope="module")
def unkilled(
    begin: Callable[[Path, int], ForkServerProcess], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, float]:
    """A run that nobody killed, and the seconds it took."""
    folder = tmp_path_factory.mktemp("unkilled")
    start(int, log=folder / "log").join()  # until everything is imported
    began = time.monotonic()
    assert finish(begin(folder, 0), folder) == 0
    return jepakit.open_run(folder / "run"), time.monotonic() - began


def finish(process: ForkServerProcess, folder: Path) -> int | None:
    process.join(120)
    if process.exitcode is None:
        process.kill()
        process.join()
    assert process.exitcode == 0, (folder / "log").read_text()
    return process.exitcode


def kill(process: ForkServerProcess, when: Iterator[bool]) -> bool:
    """Kill the process once `when` says so; False if it ended by itself before."""
    while process.exitcode is None:
        if next(when):
            process.kill()
            process.join()
            return True
        time.sleep(0.001)
    assert process.exitcode == 0
    return False


def at_moment(run: Path, moment: str, wait_s: float) -> Iterator[bool]:
    """True once the folder has shown the moment, or a later one, for `wait_s`."""
    while MOMENTS.index(moment_of(run)) < MOMENTS.index(moment):
        yield False
    yield from after(wait_s)


def after(wait_s: float) -> Iterator[bool]:
    end = time.monotonic() + wait_s
    while True:
        yield time.monotonic() >= end


def assert_same(run: Run, expected: Run) -> None:
    for part in (START, BUNDLE):
        weights, wanted = (load_file(each.path / part / WEIGHTS) for each in (run, expected))
        assert weights.keys() == wanted.keys()
        assert all(torch.equal(weights[key], wanted[key]) for key in wanted)
    assert run.comparison == expected.comparison
    assert run.bundle.manifest.model_id == expected.bundle.manifest.model_id
    timed = ("images_per_s", "data_wait", "peak_memory_gb")
    rows, wanted_rows = (
        [{key: value for key, value in row.items() if key not in timed} for row in each.metrics()]
        for each in (run, expected)
    )
    assert rows == wanted_rows
    assert len({row["step"] for row in rows}) == len(rows)
    assert not list(run.path.glob(".tmp-*"))
    assert not list(run.path.glob(f"{CHECKPOINTS}/.tmp-*"))


def kill_and_go_on(
    begin: Callable[[Path, int], ForkServerProcess], unkilled: tuple[Run, float], tmp_path: Path, kills: int, seed: int
) -> Counter[str]:
    """Kill runs a few times each until there were `kills`; returns the moments at which they happened."""
    expected, took_s = unkilled
    draw, moments = random.Random(seed), Counter[str]()
    for number in range(10 * kills):
        folder = tmp_path / str(number)
        for _ in range(draw.randrange(3, 8)):
            workers = draw.choice((0, 2))
            run = folder / "run"
            # Half at a random time, half at a random part of the run: some parts are over in a millisecond.
            when = (
                after(draw.uniform(0, took_s))
                if draw.random() < 0.5
                else at_moment(run, draw.choice(MOMENTS), draw.choice((0.0, 0.0, 0.002, 0.02)))
            )
            if not kill(begin(folder, workers), when):
                break
            moments[moment_of(run)] += 1
        finish(begin(folder, draw.choice((0, 2))), folder)
        assert_same(jepakit.open_run(folder / "run"), expected)
        if moments.total() >= kills:
            return moments
    raise AssertionError(f"only {moments.total()} kills")


@pytest.mark.timeout(900)  # 285 s on two cores shared with ten other processes
def test_kills(begin: Callable[[Path, int], ForkServerProcess], unkilled: tuple[Run, float], tmp_path: Path) -> None:
    moments = kill_and_go_on(begin, unkilled, tmp_path, kills=10, seed=1)
    assert moments.total() >= 10
    assert len(moments) >= 3, moments


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_many_kills(
    begin: Callable[[Path, int], ForkServerProcess], unkilled: tuple[Run, float], tmp_path: Path
) -> None:
    moments = kill_and_go_on(begin, unkilled, tmp_path, kills=200, seed=2)
    print(moments)
    assert set(moments) == set(MOMENTS), moments
