"""Checkpoints survive damage and a kill at any moment."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from jepakit_training import checkpoint


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
    "damage", ["flip", "cut", "no state", "no manifest", "torn manifest", "empty", "zeroed manifest"]
)
def test_a_damaged_one_is_passed_over_for_the_older(tmp_path: Path, damage: str) -> None:
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
    elif damage == "zeroed manifest":
        manifest.write_bytes(bytes(len(manifest.read_bytes())))  # what a power cut leaves on some file systems
    else:
        state.unlink()
        manifest.unlink()
    assert loaded_step(tmp_path) == 1


def test_all_damaged_means_none(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, state_of(1))
    flip_a_byte(tmp_path / "step-000000001" / "state.pt")
    assert checkpoint.load_newest(tmp_path) is None


def test_damaged_newer_ones_do_not_push_out_what_was_just_saved(tmp_path: Path) -> None:
    for step in (10, 20):
        checkpoint.save(tmp_path, step, state_of(step))
        flip_a_byte(tmp_path / f"step-{step:09d}" / "state.pt")
    checkpoint.save(tmp_path, 3, state_of(3))  # the run had to start over
    assert loaded_step(tmp_path) == 3


def test_leftovers_of_a_killed_save_are_swept(tmp_path: Path) -> None:
    (tmp_path / ".tmp-7-123").mkdir()
    (tmp_path / ".tmp-7-123" / "state.pt").write_bytes(b"half")
    checkpoint.save(tmp_path, 8, state_of(8))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000008"]


def test_a_save_that_fails_leaves_the_older_one_and_no_litter(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, state_of(1))
    with pytest.raises(Exception, match="pickle"):
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
