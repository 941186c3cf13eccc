"""Several processes on this machine: same results as one process, and they end as one would, whatever ends them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.torch import load_file
from torch import Tensor

import jepakit
from jepakit import errors
from jepakit._run_files import BUNDLE, CHECKPOINTS, ENVIRONMENT, METRICS, START
from jepakit.bundles.bundle import WEIGHTS
from jepakit.errors import BackboneError, ConfigError, ImageError, JepakitError
from jepakit.run import Run
from jepakit.sources import list_images
from jepakit_training import launch
from jepakit_training.endings import read_endings, reporting_ending
from jepakit_training.run import checkpoint
from jepakit_training.run import folder as run_folder

JEPAKIT = Path(sys.executable).with_name("jepakit")
STEPS = 3
SETTINGS: dict[str, Any] = {
    "backbone": "test_vit", "image_size": 64, "steps": STEPS, "warmup": 0.3, "batch_size": 8, "projector": (32, 32, 8),
    "n_slices": 16, "views": {"n_local": 1}, "workers": 0,
}  # fmt: skip
SET = ["--set", "projector=[32, 32, 8]", "--set", "n_slices=16", "--set", "views.n_local=1", "--set", "warmup=0.3"]

# No main guard, as in a notebook: the processes must not run it again.
SCRIPT = """
    import json, sys
    import jepakit

    images, weights, out, settings = sys.argv[1:4] + [json.loads(sys.argv[4])]
    print("script starts")
    run = jepakit.adapt(images, out=f"{out}/two", weights=weights, processes=2, **settings)
    assert run.finished and run.path.name == "two"
"""


@dataclass
class Source:
    images: Path
    weights: Path


@pytest.fixture(scope="module")
def source(image_folder: Callable[..., Path], weights_file: Callable[[str], Path]) -> Source:
    return Source(image_folder(), weights_file("test_vit"))


@dataclass
class Scripted:
    """What SCRIPT left in `out`, and what it printed."""

    out: Path
    stdout: list[str]
    stderr: str


@pytest.fixture(scope="module")
def scripted(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Scripted:
    out = tmp_path_factory.mktemp("scripted")
    script = out / "notebook.py"
    script.write_text(textwrap.dedent(SCRIPT))
    done = subprocess.run(
        [sys.executable, script, source.images, source.weights, out, json.dumps(SETTINGS)],
        timeout=280, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return Scripted(out, done.stdout.splitlines(), done.stderr)


def moved(run: Run) -> Tensor:
    """How far training has moved each weight."""
    import torch

    start, end = (load_file(run.path / part / WEIGHTS) for part in (START, BUNDLE))
    return torch.cat([(end[name].double() - start[name].double()).flatten() for name in sorted(start)])


def assert_same(two: Run, one: Run) -> None:
    assert [row["step"] for row in two.metrics()] == [row["step"] for row in one.metrics()]
    for row, expected in zip(two.metrics(), one.metrics(), strict=True):
        for key in ("loss", "prediction", "sigreg", "grad_norm", "lr", "proj_std", "proj_rank"):
            assert row[key] == pytest.approx(expected[key], rel=1e-3), key
    # AdamW's first steps are signs of gradients: one that is 0 but for rounding may take either sign.
    assert float((moved(two) - moved(one)).norm() / moved(one).norm()) < 0.1
    assert two.bundle.manifest.provenance.images_seen == one.bundle.manifest.provenance.images_seen


def test_two_processes_give_what_one_gives(scripted: Scripted, source: Source, tmp_path: Path) -> None:
    two = jepakit.open_run(scripted.out / "two")
    one = jepakit.adapt(source.images, out=tmp_path / "one", weights=str(source.weights), **SETTINGS)
    assert_same(two, one)
    recorded = [json.loads((run.path / ENVIRONMENT).read_text())["processes"] for run in (two, one)]
    assert recorded == [2, 1]


def test_a_script_without_a_main_guard_runs_once_and_one_process_talks(scripted: Scripted) -> None:
    assert scripted.stdout == ["script starts"]
    assert scripted.stderr.count("images train") == 1
    assert scripted.stderr.count(f"step {STEPS}/{STEPS}") == 1
    assert "Traceback" not in scripted.stderr
    assert "Warning" not in scripted.stderr


def test_another_number_of_processes_does_not_go_on_with_a_run(
    scripted: Scripted, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "0")
        with pytest.raises(ConfigError, match="started by 2 processes, now there are 1: have the launcher start 2, or"):
            run_folder._check_same(scripted.out / "two", list_images(source.images))
    with pytest.raises(ConfigError, match=r"started by 2 processes, now there are 1: say processes=2"):
        jepakit.adapt(source.images, out=scripted.out / "two", weights=str(source.weights), **SETTINGS)


def test_what_cannot_be_is_refused_before_torch_is_imported() -> None:
    ranks = {"RANK": "0", "WORLD_SIZE": "2"}
    cases: list[tuple[dict[str, str], dict[str, Any], str]] = [
        ({}, {"processes": 2}, "images in memory cannot be shared between processes: adapt with processes = 1"),
        ({}, {"launcher": "ray"}, "images in memory cannot be shared between processes"),
        (ranks, {}, "images in memory cannot be shared between 2 processes"),
        (ranks, {"processes": 3}, "processes = 3, but the launcher has started 2"),
        (ranks, {"launcher": "ray"}, "launcher = 'ray' starts its own processes"),
        ({}, {"processes": 0}, "processes = 0: input should be greater than or equal to 1"),
        ({}, {"launcher": "slurm"}, "launcher = 'slurm': input should be 'local' or 'ray'"),
    ]
    code = textwrap.dedent("""
        import json, os, sys
        import numpy as np
        import jepakit

        images = [np.zeros((64, 64, 3), np.uint8)] * 20
        for environment, settings, _ in json.loads(sys.argv[1]):
            os.environ.update(environment)
            try:
                jepakit.adapt(images, backbone="test_vit", weights="random", **settings)
            except jepakit.errors.ConfigError as error:
                print(error, "torch" in sys.modules)
            for name in environment:
                del os.environ[name]
    """)
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(cases)], capture_output=True, text=True, timeout=60, check=True
    )
    for (*_, words), told in zip(cases, done.stdout.splitlines(), strict=True):
        assert words in told
        assert told.endswith(" False")


def test_images_in_memory_are_adapted_on_by_one_process_unasked(tmp_path: Path, source: Source) -> None:
    """With `processes` left out, as many GPUs as there may be."""
    images = [np.random.default_rng(k).integers(0, 255, (72, 80, 3), np.uint8) for k in range(24)]
    run = jepakit.adapt(images, out=tmp_path / "run", weights=str(source.weights), **SETTINGS)
    assert json.loads((run.path / ENVIRONMENT).read_text())["processes"] == 1


def _all_errors(base: type[JepakitError] = JepakitError) -> Iterator[type[JepakitError]]:
    yield base
    for child in base.__subclasses__():
        yield from _all_errors(child)


@pytest.mark.parametrize("kind", [kind for kind in _all_errors() if kind.__module__ == errors.__name__])
def test_every_error_comes_back_as_it_was(kind: type[JepakitError], tmp_path: Path) -> None:
    extra: dict[str, Any] = {}
    if issubclass(kind, ImageError):
        extra = {"code": "too_small"}
    elif issubclass(kind, errors.ResponseError):
        extra = {"status": 429, "code": "overloaded", "param": None, "request_id": "r1"}
    with pytest.raises(kind), reporting_ending(tmp_path, 3):
        raise kind("seven of 8\nare ähnlich", **extra)
    (ending,) = read_endings(tmp_path)
    back = ending.error()
    assert type(back) is kind
    assert str(back) == r"seven of 8\x0aare ähnlich"
    assert vars(back) == extra
    assert ending.rank == 3


def test_a_full_disk_is_told_in_its_own_class(tmp_path: Path) -> None:
    """One that does not come back is taken for a lost worker, and tried again."""
    (tmp_path / "file").touch()
    saver = checkpoint.Saver(tmp_path / "file" / "checkpoints", 0.0, 0, main=True)
    with pytest.raises(errors.CheckpointError), reporting_ending(tmp_path, 0):
        saver.after_step(2, lambda: {"step": 2}, must=True)
    (ending,) = read_endings(tmp_path)
    back = ending.error()
    assert type(back) is errors.CheckpointError
    assert str(back).endswith("then the same command will start over")


def test_the_first_ending_is_told_first_and_an_unforeseen_one_with_where_it_was(tmp_path: Path) -> None:
    for rank, error in ((1, ValueError("first")), (0, KeyboardInterrupt("stopped after step 4"))):
        with pytest.raises(type(error)), reporting_ending(tmp_path, rank):
            raise error
        time.sleep(0.02)
    first, second = read_endings(tmp_path)
    assert (first.kind, first.message, first.error(), first.asked_for) == ("ValueError", "first", None, False)
    assert "test_launch.py" in first.traceback
    assert (second.message, second.asked_for, second.traceback) == ("stopped after step 4", True, "")


@pytest.fixture
def sleeping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[launch._Group]:
    """A group of two processes that do nothing for a long time."""

    def heed_ctrl_c() -> None:  # a shell starts what runs in the background with it ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def start(*_: object) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["sleep", "60"], stdin=subprocess.PIPE, preexec_fn=heed_ctrl_c)

    monkeypatch.setattr(launch._Group, "_start", start)
    group = launch._Group(2, 0, tmp_path, "run")
    yield group
    group.kill()


def test_a_signal_waits_for_no_lock(sleeping: launch._Group) -> None:
    """It can come in the midst of `poll`, which holds one: a handler that waited for it would wait for ever."""

    def ask_twice() -> None:
        for _ in range(2):
            sleeping.stop(signal.SIGINT)

    handler = threading.Thread(target=ask_twice, daemon=True)
    with sleeping.processes[0]._waitpid_lock:  # type: ignore[attr-defined]
        handler.start()
        handler.join(5)
        assert not handler.is_alive()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on(sleeping: launch._Group, number: int) -> None:
    sleeping.stop(number)
    sleeping.wait()
    assert list(sleeping.ended.values()) == [-number] * 2


def test_a_second_ctrl_c_waits_for_nobody(sleeping: launch._Group) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        sleeping.stop(number)
    sleeping.wait()
    assert not sleeping.ended
    with pytest.raises(KeyboardInterrupt):
        launch._raise_ending(sleeping)


# What follows starts processes anew for every case.


def command(source: Source, out: Path, *options: str, steps: int = 4000) -> list[str]:
    given = ["--backbone", "test_vit", "--weights", source.weights, "--image-size", "64", "--batch-size", "8", *SET]
    return [str(part) for part in (JEPAKIT, "adapt", source.images, "--out", out, *given, "--steps", steps, *options)]


@dataclass
class Training:
    """`jepakit adapt --processes 2` that has written a checkpoint."""

    out: Path
    process: subprocess.Popen[str]
    ranks: list[psutil.Process]

    @property
    def checkpoints(self) -> list[Path]:
        return sorted((self.out / CHECKPOINTS).glob("step-*"))

    def end(self) -> str:
        """Its last line, once it and all its processes are gone."""
        _, words = self.process.communicate(timeout=60)
        gone, alive = psutil.wait_procs(self.ranks, timeout=60)
        assert not alive, f"{gone} have ended"
        assert "Traceback" not in words
        return words.splitlines()[-1]


@pytest.fixture
def training(source: Source, tmp_path: Path) -> Iterator[Training]:
    out = tmp_path / "run"
    process = subprocess.Popen(
        command(source, out, "--processes", "2", "--workers", "1", "--set", "save_every_s=1"),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    ranks: list[psutil.Process] = []
    try:
        while not list((out / CHECKPOINTS).glob("step-*")):
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        ranks = psutil.Process(process.pid).children()
        assert len(ranks) == 2
        for one in (psutil.Process(process.pid), *ranks):
            heard = [link.laddr.ip for link in one.net_connections("inet") if link.status == psutil.CONN_LISTEN]
            assert all(ip in ("127.0.0.1", "::ffff:127.0.0.1") for ip in heard), heard
        yield Training(out, process, sorted(ranks, key=lambda each: int(each.environ()["RANK"])))
    finally:
        for each in ranks:
            if each.is_running():
                each.kill()
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_ends_both_after_their_step_and_the_same_command_goes_on(
    training: Training, source: Source, number: signal.Signals
) -> None:
    training.process.send_signal(number)
    last = training.end()
    found = checkpoint.load_newest(training.out / CHECKPOINTS)
    assert found is not None
    assert last == f"stopped after step {found[0]}; run the same command again to resume"
    assert training.process.returncode == 128 + number
    again = subprocess.Popen(
        command(source, training.out, "--processes", "2"),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert again.stderr is not None
    try:
        said = iter(again.stderr.readline, "")
        assert f"resuming from step {found[0]}\n" in said
    finally:
        again.send_signal(signal.SIGINT)
        again.communicate(timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_is_told_in_one_line_and_ends_the_other(training: Training, rank: int) -> None:
    training.ranks[rank].kill()
    last = training.end()
    assert last.startswith(f"error: process {rank} of 2 was ended by SIGKILL")
    assert training.process.returncode == 1


@pytest.mark.slow
def test_when_the_command_itself_is_killed_its_processes_save_and_end(training: Training) -> None:
    training.process.kill()
    training.process.wait()
    gone, alive = psutil.wait_procs(training.ranks, timeout=60)
    assert len(gone) == 2
    assert not alive
    found = checkpoint.load_newest(training.out / CHECKPOINTS)
    assert found is not None


def begun_again(source: Source, out: Path) -> subprocess.CompletedProcess[str]:
    """A finished run's command once more, after its result was removed."""
    shutil.rmtree(out / BUNDLE)
    again = command(source, out, "--processes", "2", steps=STEPS)
    return subprocess.run(again, check=False, capture_output=True, text=True)


@pytest.mark.slow
def test_an_error_of_one_process_is_told_once_and_with_a_traceback_if_unforeseen(
    source: Source, tmp_path: Path
) -> None:
    """A file where checkpoints are to lie, then metrics that are no text: rank 0 fails alone, in the middle of training."""
    out = tmp_path / "run"
    subprocess.run(command(source, out, "--processes", "2", steps=STEPS), check=True, capture_output=True)
    shutil.rmtree(out / CHECKPOINTS)
    (out / CHECKPOINTS).touch()
    done = begun_again(source, out)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: the checkpoint of step 3 could not be written")

    (out / CHECKPOINTS).unlink()
    subprocess.run(command(source, out, "--processes", "2", steps=STEPS), check=True, capture_output=True)
    shutil.rmtree(out / CHECKPOINTS)
    (out / METRICS).write_bytes(b"\xff")
    done = begun_again(source, out)
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.splitlines()[-1].startswith("error: process 0 of 2 failed: UnicodeDecodeError")


@pytest.mark.slow
def test_an_error_in_a_process_is_the_same_error_here(source: Source, tmp_path: Path) -> None:
    settings = {**SETTINGS, "backbone": "test_resnet"}
    with pytest.raises(BackboneError, match=f"^{source.weights} does not fit test_resnet: missing:"):
        jepakit.adapt(source.images, out=tmp_path / "run", weights=str(source.weights), processes=2, **settings)


@pytest.mark.slow
def test_an_error_in_a_process_is_one_line_of_the_command(source: Source, tmp_path: Path) -> None:
    wrong = ["test_resnet" if part == "test_vit" else part for part in command(source, tmp_path / "run", steps=STEPS)]
    done = subprocess.run([*wrong, "--processes", "2"], check=False, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "labels:" not in line]
    assert line.startswith(f"error: {source.weights} does not fit test_resnet")


@pytest.mark.slow
def test_torchrun_needs_nothing_else(source: Source, tmp_path: Path) -> None:
    """No variable for accelerate, without which it once trained one process on a CPU and said nothing."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE")}
    done = subprocess.run(
        [*torchrun, *command(source, tmp_path / "run", "--processes", "2", steps=STEPS)],
        env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("next: jepakit export") == 1
    run = jepakit.open_run(tmp_path / "run")
    assert json.loads((run.path / ENVIRONMENT).read_text())["processes"] == 2
    one = jepakit.adapt(source.images, out=tmp_path / "one", weights=str(source.weights), **SETTINGS)
    assert_same(run, one)


@pytest.mark.slow
def test_accelerates_own_launcher_will_do(source: Source, tmp_path: Path) -> None:
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--no_python"]
    done = subprocess.run(
        [*accelerate, *command(source, tmp_path / "run", steps=STEPS)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one = jepakit.adapt(source.images, out=tmp_path / "one", weights=str(source.weights), **SETTINGS)
    assert_same(jepakit.open_run(tmp_path / "run"), one)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {"unfreeze": "lora"}, {"anchor": 1.0}, {"average": "ema"}, {"mix": 0.5}, {"micro_batch": 2},
        {"activation_checkpointing": True}, {"compile": True},
    ],
    ids=str,
)  # fmt: skip
def test_every_way_to_train_gives_in_two_processes_what_it_gives_in_one(
    more: dict[str, Any], source: Source, tmp_path: Path
) -> None:
    settings = {"weights": str(source.weights), **SETTINGS, **more}
    two, one = (jepakit.adapt(source.images, out=tmp_path / str(n), processes=n, **settings) for n in (2, 1))
    assert_same(two, one)
    anchors = [[row["anchor"] for row in run.metrics() if "anchor" in row] for run in (two, one)]
    assert bool(anchors[0]) == ("anchor" in more)
    assert anchors[0] == pytest.approx(anchors[1], rel=1e-3, abs=1e-6)  # 1 - cosine, in float32


@pytest.mark.slow
def test_two_killed_processes_end_as_two_that_were_not_bit_for_bit(source: Source, tmp_path: Path) -> None:
    options = ["--processes", "2", "--workers", "0", "--set", "save_every_s=0"]
    whole = command(source, tmp_path / "whole", *options, steps=40)
    subprocess.run(whole, check=True, capture_output=True)
    killed, checkpoints = tmp_path / "killed", tmp_path / "killed" / CHECKPOINTS
    again = command(source, killed, *options, steps=40)

    def newest() -> str:
        return max((path.name for path in checkpoints.glob("step-*")), default="")

    for wait_s in (0.0, 0.4):
        before, deadline = newest(), time.monotonic() + 200
        process = subprocess.Popen(again, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while newest() == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(wait_s)
        for one in (*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)):
            one.kill()
        process.wait()
        assert newest() > before
    assert not Run(killed).finished
    subprocess.run(again, check=True, capture_output=True)
    one, other = (load_file(path / BUNDLE / WEIGHTS) for path in (killed, tmp_path / "whole"))
    assert one.keys() == other.keys()
    assert all((one[key] == other[key]).all() for key in one)
    steps = [row["step"] for row in Run(killed).metrics()]
    assert steps == [row["step"] for row in Run(tmp_path / "whole").metrics()] == [9, 19, 29, 39]
