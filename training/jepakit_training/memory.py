"""Memory: kept from step to step, how much a run took at most, and what to change when it runs out."""

from __future__ import annotations

import ctypes
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from jepakit._machine import main_memory, trim_heap
from jepakit.errors import TrainingError

GB = 10**9

# What torch says where it raises no OutOfMemoryError: its allocator of main memory, and CUDA's libraries.
_NO_MEMORY = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)

# From glibc's <malloc.h>; last the two defaults, of the threshold the most that it grows to.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER, _NONE = -1, 0
_DEFAULT_TRIM_THRESHOLD, _DEFAULT_MMAP_MAX = 64 << 20, 65536


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Have what one step frees serve the next one; at the end of the block it goes back to the system.

    glibc hands large blocks back at once, and the kernel then clears every page again: an eighth of a ViT-Ti's step on a
    CPU (docs/training-speed.md). Where there is no glibc the block runs as it is.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        yield
        return
    libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
    libc.mallopt(_M_MMAP_MAX, _NONE)
    try:
        yield
    finally:
        libc.mallopt(_M_TRIM_THRESHOLD, _DEFAULT_TRIM_THRESHOLD)
        libc.mallopt(_M_MMAP_MAX, _DEFAULT_MMAP_MAX)
        trim_heap()


@contextmanager
def memory_errors(*, micro_batch: int, activation_checkpointing: bool, image_size: int, workers: int) -> Iterator[None]:
    """Turn "out of memory" in the block into a TrainingError that names the settings to change, in order; loaders that
    were ended, or deliver nothing, into one too.

    micro_batch               images that one backbone pass works through at once, as it is now; 1 where it cannot be fewer
    activation_checkpointing  whether that is on, or cannot be
    image_size, workers       the run's
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(part in str(error) for part in _NO_MEMORY):
            where = "the GPU's memory" if "CUDA" in str(error) or "CUBLAS" in str(error) else "memory"
            raise TrainingError(
                f"out of {where} ({_asked_for(error)}); the last checkpoint is sound. "
                f"{_advice(micro_batch, activation_checkpointing, image_size)}"
            ) from error
        if "DataLoader worker" in str(error) and "Terminated" not in str(error):
            raise TrainingError(_of_a_worker(str(error), workers)) from error
        if found := re.match(r"DataLoader timed out after (\d+) seconds", str(error)):
            raise TrainingError(_of_slow_reads(found[1], workers)) from error
        raise


def peak_gb(device: torch.device) -> float:
    """The most memory that this process has held so far, in GB: of the GPU it trains on, or main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GB
    if sys.platform == "darwin":
        # In bytes there. On Linux it would count the process that started this one, too.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GB
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / GB


def memory_gb(device: torch.device) -> float:
    """Total memory in GB: the GPU's, or main memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / GB
    return main_memory() / GB


def _advice(micro_batch: int, activation_checkpointing: bool, image_size: int) -> str:
    """The exact ways first: they cost time alone. Smaller images make another model."""
    ways = []
    if micro_batch > 1:
        ways.append(f"--set micro_batch={max(1, micro_batch // 2)} (now {micro_batch}; the result is the same)")
    if not activation_checkpointing:
        ways.append("--set activation_checkpointing=true (the same result, slower)")
    ways.append(f"--image-size below {image_size}, in a new run")
    return "In this order: " + ", then ".join(ways)


def _asked_for(error: BaseException) -> str:
    """How much was asked for, where torch says so."""
    found = re.search(r"[Tt]ried to allocate ([\d.]+) (\w+)", str(error))
    if found is None:
        return str(error).strip().split("\n")[0] or type(error).__name__
    amount, unit = found.groups()
    return f"asked for {float(amount) / 1e6:.0f} MB more" if unit == "bytes" else f"asked for {amount} {unit} more"


def _of_a_worker(text: str, workers: int) -> str:
    if "Bus error" in text or "shared memory" in text:
        return (
            f"a loader's process found no room in /dev/shm; the last checkpoint is sound. Give the container more "
            f"(--shm-size), or take fewer --workers (now {workers})"
        )
    return (
        f"a loader's process was ended from outside, most likely because memory ran out ({text.splitlines()[0]}); the "
        f"last checkpoint is sound. Take fewer --workers (now {workers}), then run the same command again"
    )


def _of_slow_reads(seconds: str, workers: int) -> str:
    return (
        f"the loader's processes delivered no batch for {seconds} s: reading or decoding the images is too slow, or their file "
        "system does not answer; the last checkpoint is sound. See that the files can be read, then run the same command again. "
        f"Where reading is slow: copy the images to a local disk, store large ones as tiled files, raise --workers (now {workers}), "
        "or keep them downscaled (--set cache=FOLDER, in a new run)"
    )
