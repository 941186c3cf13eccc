"""Checkpoints survive damage and a kill at any moment."""

from __future__ import annotations

import errno
import os
import pickle
import resource
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.forked import start
from torch import Tensor

from jepakit.errors import CheckpointError, TrainingError
from jepakit_training.run import checkpoint
from jepakit_training.run.checkpoint import Saver


def state_of(step: int) -> dict[str, Tensor | int | str]:
    return {"weights": torch.full((64, 64), float(step)), "step": step, "role": "projector"}


def flip_a_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def loaded_step(folder: Path) -> int:
    found = checkpoint.load_newest(folder)
    assert found is not None
    step, state = found
    assert torch.equal(state["weights"], torch.full((64, 64), float(step)))
    return step


def test_nothing_there(tmp_path: Path) -> None:
    assert checkpoint.load_newest(tmp_path) is None
    assert checkpoint.load_newest(tmp_path / "absent") is None


def test_the_newest_two_are_kept_and_the_newest_is_loaded(tmp_path: Path) -> None:
    for step in (9, 10, 100, 1000):
        checkpoint.save(tmp_path, step, state_of(step))
        assert loaded_step(tmp_path) == step
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000100", "step-000001000"]


def test_the_same_step_may_be_saved_twice(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 5, state_of(5))
    checkpoint.save(tmp_path, 5, state_of(5))
    assert loaded_step(tmp_path) == 5


@pytest.mark.parametrize(
    "damage", ["flip", "cut", "no state", "no manifest", "torn manifest", "other manifest", "empty", "zeroed manifest"]
)
def test_a_damaged_one_is_passed_over_for_the_older_and_kept(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint.save(tmp_path, 1, state_of(1))
    checkpoint.save(tmp_path, 2, state_of(2))
    newest = tmp_path / "step-000000002"
    state, manifest = newest / "state.pt", newest / "manifest.json"
    if damage == "flip":
        flip_a_byte(state)
    elif damage == "cut":
        state.write_bytes(state.read_bytes()[:-100])
    elif damage == "no state":
        state.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "torn manifest":
        manifest.write_text(manifest.read_text()[:10])
    elif damage == "other manifest":
        manifest.write_text("[]")
    elif damage == "zeroed manifest":
        manifest.write_bytes(bytes(len(manifest.read_bytes())))  # what a power cut leaves on some file systems
    else:
        state.unlink()
        manifest.unlink()
    assert loaded_step(tmp_path) == 1
    checkpoint.set_aside_newer(tmp_path, 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"warning: {newest} is damaged or incomplete and is passed over; it is kept as damaged-{newest.name}"
    for step in (2, 3, 4):
        checkpoint.save(tmp_path, step, state_of(step))
    names = ["damaged-step-000000002", "step-000000003", "step-000000004"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("unreadable", ["checkpoints", "manifest.json", "state.pt"])
def test_one_that_cannot_be_read_is_an_error_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, unreadable: str
) -> None:
    """It is sound, for all we know: neither an older one nor a new beginning takes its place."""
    folder = tmp_path / "checkpoints"
    for step in (1, 2):
        checkpoint.save(folder, step, state_of(step))

    def refusing(real: Any) -> Any:
        def call(path: Path, *args: Any, **kwargs: Any) -> Any:
            if path.name == unreadable:
                raise OSError(code, os.strerror(code), str(path))
            return real(path, *args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("open", "read_text", "iterdir"):
            patch.setattr(Path, name, refusing(getattr(Path, name)))
        path = folder if unreadable == "checkpoints" else folder / "step-000000002" / unreadable
        with pytest.raises(CheckpointError) as raised:
            checkpoint.load_newest(folder)
    assert str(raised.value).startswith(f"{path} could not be read ({os.strerror(code)})")
    assert "run the same command again" in str(raised.value)
    assert loaded_step(folder) == 2


def test_one_set_aside_before_makes_way(tmp_path: Path) -> None:
    for step in (7, 8):
        checkpoint.save(tmp_path, 2, state_of(step))
        checkpoint.set_aside_newer(tmp_path, 1)
    assert torch.load(tmp_path / "damaged-step-000000002" / "state.pt")["step"] == 8


def test_one_that_cannot_be_set_aside_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    checkpoint.save(tmp_path, 2, state_of(2))
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(CheckpointError, match=r"step-000000002 is damaged .*\(Read-only file system\): move it away"):
        checkpoint.set_aside_newer(tmp_path, 0)


class Bomb:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._path),)


def test_one_that_would_run_code_is_an_error_and_runs_none(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 5, {"bomb": Bomb(tmp_path / "ran")})
    with pytest.raises(CheckpointError, match=r"step-000000005.*holds more than tensors and numbers"):
        checkpoint.load_newest(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_all_damaged_means_none(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, state_of(1))
    flip_a_byte(tmp_path / "step-000000001" / "state.pt")
    assert checkpoint.load_newest(tmp_path) is None


def test_damaged_newer_ones_do_not_push_out_what_was_just_saved(tmp_path: Path) -> None:
    for step in (10, 20):
        checkpoint.save(tmp_path, step, state_of(step))
        flip_a_byte(tmp_path / f"step-{step:09d}" / "state.pt")
    checkpoint.set_aside_newer(tmp_path, 0)
    checkpoint.save(tmp_path, 3, state_of(3))  # the run had to start over
    assert loaded_step(tmp_path) == 3


def test_leftovers_of_a_killed_save_are_swept(tmp_path: Path) -> None:
    (tmp_path / ".tmp-7-123").mkdir()
    (tmp_path / ".tmp-7-123" / "state.pt").write_bytes(b"half")
    checkpoint.save(tmp_path, 8, state_of(8))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000008"]


def test_a_save_that_fails_leaves_the_older_one_and_no_litter(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, state_of(1))
    with pytest.raises((pickle.PicklingError, AttributeError), match=r"pickle|local object"):
        checkpoint.save(tmp_path, 2, {"function": lambda: None})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]
    assert loaded_step(tmp_path) == 1


def test_kill_9_during_saving_leaves_a_loadable_checkpoint(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, state_of(1))
    reached = 1
    for attempt in range(12):
        child = os.fork()
        if child == 0:
            try:
                for step in range(reached + 1, reached + 10_000):
                    checkpoint.save(tmp_path, step, state_of(step))
            finally:
                os._exit(1)
        time.sleep(0.02 + 0.007 * attempt)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert loaded_step(tmp_path) >= reached
        reached = loaded_step(tmp_path)
    assert reached > 1
    checkpoint.save(tmp_path, reached + 1, state_of(reached + 1))
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("where", ["model", "optimizer"])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_saved(tmp_path: Path, where: str, number: float) -> None:
    checkpoint.save(tmp_path, 1, state_of(1))
    state = {"model": {"w": torch.ones(7), "n": torch.tensor(3)}, "optimizer": {"state": [{"m": torch.ones(2, 2)}]}}
    checkpoint.save(tmp_path, 2, state)
    (state["model"]["w"] if where == "model" else state["optimizer"]["state"][0]["m"])[-1] = number  # type: ignore[index]
    with pytest.raises(TrainingError, match="not finite after step 3"):
        checkpoint.save(tmp_path, 3, state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000001", "step-000000002"]


def test_empty_whole_and_half_precision_tensors_are_saved(tmp_path: Path) -> None:
    state = {"empty": torch.empty(0), "whole": torch.arange(3), "half": torch.ones(3, dtype=torch.bfloat16)}
    checkpoint.save(tmp_path, 1, state)
    found = checkpoint.load_newest(tmp_path)
    assert found is not None
    assert all(torch.equal(found[1][key], value) for key, value in state.items())


def state_larger_than_the_disk(tmp_path: Path) -> dict[str, Tensor]:
    """A tensor over a sparse file too large for the disk: it takes no memory and no disk space."""
    count = shutil.disk_usage(tmp_path).total // 4 + (1 << 20)
    return {"weights": torch.from_file(str(tmp_path / "sparse"), shared=True, size=count, dtype=torch.float32)}


def test_a_disk_that_is_too_small_is_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoints"
    checkpoint.save(folder, 1, state_of(1))
    monkeypatch.setattr(checkpoint, "_check_finite", lambda *_: None)  # it would read all of the file
    state = state_larger_than_the_disk(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"step 2 .*No space left.* needs [\d,.]+ MB .* [\d,.]+ MB are free"
    ) as raised:
        checkpoint.save(folder, 2, state)
    assert str(folder) in str(raised.value)
    assert f"{state['weights'].nbytes / 1e6:,.1f} MB" in str(raised.value)
    assert loaded_step(folder) == 1
    assert len(list(folder.iterdir())) == 1


def fill(folder: Path, most_bytes: int, *, must_at: int) -> None:
    """Save step after step under a limit on file size, which the third state exceeds."""
    saver = Saver(folder, 0.0, 0, main=True)
    for step in range(1, 7):
        size = 1000 if step in (3, 4, 6) else 64
        state: dict[str, Any] = {"weights": torch.full((size, size), float(step)), "step": step}
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, resource.RLIM_INFINITY))
        saver.after_step(step, partial(dict, state), must=step == must_at)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(
            f"step {step}: newest {saver.newest}, on disk {sorted(path.name for path in folder.iterdir())}", flush=True
        )


def test_a_full_disk_is_outlived_in_the_middle_and_an_error_at_the_end(tmp_path: Path) -> None:
    folder, log = tmp_path / "checkpoints", tmp_path / "log"
    process = start(fill, folder, 1_000_000, must_at=6, log=log)
    process.join()
    assert process.exitcode == 1
    lines = log.read_text().splitlines()
    assert [line for line in lines if line.startswith("step")] == [
        "step 1: newest 1, on disk ['step-000000001']",
        "step 2: newest 2, on disk ['step-000000001', 'step-000000002']",
        "step 3: newest 2, on disk ['step-000000001', 'step-000000002']",
        "step 4: newest 2, on disk ['step-000000001', 'step-000000002']",
        "step 5: newest 5, on disk ['step-000000002', 'step-000000005']",
    ]
    (warning,) = [line for line in lines if line.startswith("warning")]
    assert f"checkpoint of step 3 could not be written to {folder}" in warning
    assert "(File too large): it needs 4.0 MB" in warning
    assert "would resume from step 2 after a stop" in warning
    assert lines[-1].startswith("jepakit.errors.CheckpointError: the checkpoint of step 6")
    assert lines[-1].endswith("then the same command will resume from step 5")
    assert loaded_step(folder) == 5
    assert len(list(folder.iterdir())) == 2


def test_a_disk_that_fills_up_again_is_told_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "checkpoints"
    saver = Saver(folder, 0.0, 0, main=True)
    told = []
    for step in range(1, 6):
        with pytest.MonkeyPatch.context() as patch:
            if step != 3:
                patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
            saver.after_step(step, lambda step=step: state_of(step))  # type: ignore[misc]
        told.append("warning" in capsys.readouterr().err)
    assert told == [True, False, False, True, False]


def test_shared_weights_need_room_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.ones(1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9000, 4000, 5000))
    checkpoint.save(tmp_path, 1, {"whole": weights, "half": weights[:500]})
    assert checkpoint.load_newest(tmp_path) is not None


def test_a_folder_that_cannot_be_written_to_is_outlived_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    saver = Saver(tmp_path / "file" / "checkpoints", 0.0, 0, main=True)
    saver.after_step(1, lambda: state_of(1))
    assert "(Not a directory)" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="will start over"):
        saver.after_step(2, lambda: state_of(2), must=True)


class Clock:
    """A `time` that the tests control; a save takes `save_s`."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("every_s", "step_s", "save_s", "saved"),
    [
        (300, 1, 0, []),
        (25, 5, 0, [5, 10, 15, 20]),
        (0, 1, 0, list(range(1, 21))),
        (300, 11, 0, list(range(1, 21))),
        (300, 11, 12, [1]),  # saving takes longer than the step: not after every one
        (300, 9, 0, []),
    ],
)  # fmt: skip
def test_when_it_is_time_to_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every_s: float, step_s: float, save_s: float, saved: list[int]
) -> None:
    clock, asked = Clock(), []
    monkeypatch.setattr(checkpoint, "time", clock)
    saver = Saver(tmp_path, every_s, 0, main=True)

    def state(step: int) -> dict[str, Any]:
        asked.append(step)
        clock.now += save_s
        return state_of(step)

    for step in range(1, 21):
        clock.now += step_s
        saver.after_step(step, partial(state, step))
    assert asked == saved
    assert saver.newest == (asked[-1] if asked else 0)


def test_other_ranks_save_nothing(tmp_path: Path) -> None:
    saver = Saver(tmp_path / "checkpoints", 0.0, 0, main=False)
    saver.after_step(1, lambda: pytest.fail("asked for its state"), must=True)
    assert not (tmp_path / "checkpoints").exists()
