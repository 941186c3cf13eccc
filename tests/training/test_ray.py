"""Training under Ray Train, on a cluster of two workers on this machine."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from tests.training.test_launch import SETTINGS, Source, assert_same, command

import jepakit
from jepakit._run_files import CHECKPOINTS, ENVIRONMENT, METRICS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
RAY = ("--launcher", "ray", "--processes", "2", "--workers", "0")


@pytest.fixture(scope="module")
def source(image_folder: Callable[..., Path], weights_file: Callable[[str], Path]) -> Source:
    return Source(image_folder(), weights_file("test_vit"))


def wait_for(process: subprocess.Popen[str], there: Callable[[], bool]) -> None:
    """Wait until the running command has produced something."""
    deadline = time.monotonic() + 300
    while not there():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def left_in(out: Path) -> list[str]:
    return [path.name for path in out.iterdir() if path.name.startswith(".tmp")]


def test_a_cluster_gives_what_this_machine_gives(source: Source, tmp_path: Path) -> None:
    done = subprocess.run(command(source, tmp_path / "ray", *RAY, steps=3), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("images train") == 1
    assert done.stderr.count("step 3/3") == 1
    ray = jepakit.open_run(tmp_path / "ray")
    assert not left_in(ray.path)
    assert json.loads((ray.path / ENVIRONMENT).read_text())["processes"] == 2
    local = jepakit.adapt(source.images, out=tmp_path / "local", weights=str(source.weights), processes=2, **SETTINGS)
    assert_same(ray, local)


def test_a_killed_worker_is_replaced_and_goes_on_from_the_last_checkpoint(source: Source, tmp_path: Path) -> None:
    out = tmp_path / "ray"
    process = subprocess.Popen(
        command(source, out, *RAY, "--set", "save_every_s=0", steps=100),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    started: list[psutil.Process] = []
    try:
        wait_for(process, lambda: bool(list((out / CHECKPOINTS).glob("step-*"))))
        started = psutil.Process(process.pid).children(recursive=True)
        workers = [each for each in started if any("RayTrainWorker" in word for word in each.cmdline())]
        assert len(workers) == 2
        workers[1].kill()
        _, words = process.communicate(timeout=300)
    finally:
        process.kill()
        for each in started:
            if each.is_running():
                each.kill()
    assert process.returncode == 0, words[-3000:]
    assert "resuming from step " in words
    run = jepakit.open_run(out)
    steps = [row["step"] for row in run.metrics()]
    assert steps == [*range(9, 100, 10)]
    assert run.bundle.manifest.provenance.steps == 100


def test_a_stop_saves_the_step_it_is_in(source: Source, tmp_path: Path) -> None:
    out = tmp_path / "ray"
    process = subprocess.Popen(
        command(source, out, *RAY, steps=5000), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(process, (out / METRICS).exists)
        process.send_signal(signal.SIGTERM)
        _, words = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143, words[-3000:]
    assert "Traceback" not in words
    stopped = re.search(r"stopped after step (\d+); run the same command again", words)
    assert stopped, words[-3000:]
    assert [path.name for path in (out / CHECKPOINTS).iterdir()] == [f"step-{int(stopped[1]):09d}"]
    assert not left_in(out)


def test_an_error_in_a_worker_is_one_line_of_the_command(source: Source, tmp_path: Path) -> None:
    out = tmp_path / "ray"
    wrong = ["test_resnet" if part == "test_vit" else part for part in command(source, out, *RAY, steps=3)]
    done = subprocess.run(wrong, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {source.weights} does not fit test_resnet")
    assert "Traceback" not in done.stderr
    assert not left_in(out)


def test_a_cluster_that_is_not_there_is_named(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    done = subprocess.run(command(source, tmp_path / "ray", *RAY), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "error: no Ray cluster at RAY_ADDRESS = 127.0.0.1:1" in done.stderr.splitlines()[-1]
