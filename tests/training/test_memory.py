"""Really out of memory, on a CPU with a limited address space."""

from __future__ import annotations

import errno
import os
import re
import resource
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from tests.training.forked import start

from jepakit.errors import TrainingError
from jepakit_training.alone import own_process
from jepakit_training.loader_limits import more_open_files
from jepakit_training.memory import forget_peaks, freed_memory_kept, memory_errors, peak_gb
from jepakit_training.run import checkpoint


def train(folder: Path, *, micro_batch: int = 64, activation_checkpointing: bool = False) -> None:
    """Steps of a small network on ever larger batches, with 400 MB of address space left."""
    layers = torch.nn.Sequential(*(torch.nn.Conv2d(3, 3, 3, padding=1) for _ in range(20)))
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + 400_000_000, resource.RLIM_INFINITY))
    with memory_errors(
        micro_batch=micro_batch, activation_checkpointing=activation_checkpointing, image_size=224, workers=1
    ):
        for step in range(1, 10):
            layers(torch.randn(4**step, 3, 224, 224)).mean().backward()
            checkpoint.save(folder, step, layers.state_dict())


@pytest.mark.parametrize("tuned", [False, True])
def test_out_of_memory_names_what_to_change_and_keeps_the_checkpoint(tmp_path: Path, tuned: bool) -> None:
    log = tmp_path / "log"
    settings = {"micro_batch": 1, "activation_checkpointing": True} if tuned else {}
    process = start(train, tmp_path / "checkpoints", log=log, **settings)
    process.join()
    assert process.exitcode == 1
    last = log.read_text().splitlines()[-1]
    assert re.match(r"jepakit.errors.TrainingError: out of memory \(asked for \d+ MB more\); ", last)
    assert "the last checkpoint is intact" in last
    ways = ("micro_batch=32 (now 64", "activation_checkpointing=true", "image_size below 224")
    places = [last.find(way) for way in ways]
    assert places == sorted(places) if not tuned else places[:2] == [-1, -1]
    assert places[2] > 0
    assert checkpoint.load_newest(tmp_path / "checkpoints") is not None


def test_a_gpu_that_is_full_before_or_after_training_is_told() -> None:
    with (
        pytest.raises(TrainingError, match=r"outside of training \(asked for 20\.00 MiB more\): end .*nvidia-smi"),
        own_process(),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of")


def test_no_librarys_warning_reaches_a_run_or_a_dry_run() -> None:
    with own_process():
        warnings.warn_explicit("not for users", UserWarning, "layers.py", 1, module="timm.layers")


def pages_of_steps(count: int) -> int:
    """Pages that the kernel hands out while each of `count` steps takes 256 MB and frees them."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        torch.ones(64 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_freed_memory_serves_the_next_step_and_goes_back_in_the_end() -> None:
    step = (256 << 20) // resource.getpagesize()
    with freed_memory_kept():
        taken, kept = pages_of_steps(12), resident()
    # A freed block may be a few bytes too short for the next one to be aligned: a few of them are taken, not twelve.
    assert taken < 5 * step
    assert resident() < kept - (128 << 20)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def words(error: BaseException) -> str:
    with (
        pytest.raises(TrainingError) as raised,
        memory_errors(micro_batch=8, activation_checkpointing=False, image_size=224, workers=4),
    ):
        raise error
    return str(raised.value)


def test_what_torch_says_on_a_gpu() -> None:
    """Texts as torch 2.15 words them."""
    text = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.2 GiB is free. "
        "Process 1 has 77 GiB memory in use."
    )
    told = words(torch.OutOfMemoryError(text))
    assert told.startswith("out of the GPU's memory (asked for 2.00 GiB more); ")
    assert "micro_batch=4" in told
    assert "the GPU's memory" in words(
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")
    )


def test_a_killed_loader_process_is_told_from_a_full_dev_shm() -> None:
    killed = words(RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. "))
    assert "fewer workers (now 4)" in killed
    shm = words(
        RuntimeError("DataLoader worker (pid 12) is killed by signal: Bus error. It is possible that dataloader's ")
    )
    assert "--shm-size" in shm


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Too many open files. Communication with the workers is no longer possible."),
        RuntimeError("received 0 items of ancdata"),
        OSError(errno.EMFILE, os.strerror(errno.EMFILE)),
    ],
)
def test_too_many_open_files_are_told_with_the_limit(error: Exception) -> None:
    told = words(error)
    assert f"may have ({resource.getrlimit(resource.RLIMIT_NOFILE)[0]})" in told
    assert "ulimit -n" in told
    assert "fewer workers" in told


def test_training_may_open_as_many_files_as_the_process_can_allow_itself() -> None:
    before, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if most == resource.RLIM_INFINITY else min(most, 65_536)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, 500), most))
    try:
        with more_open_files():
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (wanted, most)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(wanted, 500), most)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, most))
    with more_open_files(), more_open_files():
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= wanted


def test_a_loader_that_waits_in_vain_says_what_may_be_slow() -> None:
    from torch.utils.data import DataLoader, Dataset

    class Slow(Dataset[int]):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, _: int) -> int:
            time.sleep(30)
            return 0

    with pytest.raises(RuntimeError) as raised:
        next(iter(DataLoader(Slow(), num_workers=1, timeout=1)))
    told = words(raised.value)
    assert told.startswith("the loader's processes delivered no batch for 1 s")
    assert "file system does not answer" in told
    assert "cache=FOLDER" in told
    assert "tiled files" in told


def test_other_errors_pass() -> None:
    for error in (RuntimeError("shapes differ"), ValueError("no")):
        with (
            pytest.raises(type(error), match=str(error)) as raised,
            memory_errors(micro_batch=8, activation_checkpointing=False, image_size=224, workers=4),
        ):
            raise error
        assert raised.value is error


def hold_200_mb_more(file: Path) -> None:
    """Write down the peak before it and then."""
    before = peak_gb(torch.device("cpu"))
    held = torch.ones(int(before * 1e9) // 4 + 50_000_000)
    file.write_text(f"{before} {peak_gb(torch.device('cpu'))}")
    assert held.sum() > 0


def test_peak_memory_grows_by_what_is_held(tmp_path: Path) -> None:
    """In a process that has held little before."""
    process = start(hold_200_mb_more, tmp_path / "peaks", log=tmp_path / "log")
    process.join(120)
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    before, after = map(float, (tmp_path / "peaks").read_text().split())
    assert after >= before + 0.2


def forget_what_was_held(file: Path) -> None:
    before = peak_gb(torch.device("cpu"))
    held = torch.ones(int(before * 1e9) // 4 + 50_000_000)
    assert held.sum() > 0
    del held
    forget_peaks()
    file.write_text(f"{before} {peak_gb(torch.device('cpu'))}")


def test_the_peak_of_an_earlier_run_is_not_that_of_the_next(tmp_path: Path) -> None:
    process = start(forget_what_was_held, tmp_path / "peaks", log=tmp_path / "log")
    process.join(120)
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    before, after = map(float, (tmp_path / "peaks").read_text().split())
    assert after < before + 0.1


def test_where_there_is_no_proc_peak_memory_is_what_the_system_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(resource, "getrusage", lambda _: resource.struct_rusage([0, 0, 1_500_000_000, *[0] * 13]))
    assert peak_gb(torch.device("cpu")) == 1.5
