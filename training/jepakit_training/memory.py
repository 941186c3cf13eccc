"""Memory: keeping it from step to step, a run's peak, and what to change when it runs out."""

from __future__ import annotations

import ctypes
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from jepakit._machine import main_memory, trim_heap
from jepakit._messages import lines_of
from jepakit.errors import NoMemoryError, TrainingError
from jepakit_training.loader_limits import is_of_files, many_files, no_room

GB = 10**9

# Messages of errors other than OutOfMemoryError that mean the same: from torch's CPU allocator and from CUDA's libraries.
_NO_MEMORY = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "ALLOCATION_FAILED",
)

# From glibc's <malloc.h>, then the two defaults (for the threshold, the most that it grows to).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER, _NONE = -1, 0
_DEFAULT_TRIM_THRESHOLD, _DEFAULT_MMAP_MAX = 64 << 20, 65536


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Let each step reuse the memory that the one before freed; at the end of the block it is returned to the system.

    glibc returns large blocks at once, and the kernel then clears every page again: an eighth of a ViT-Ti's step on a
    CPU (docs/training-speed.md). Without glibc, this does nothing.
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
    """Turn "out of memory" in the block into a TrainingError that names the settings to change, in order; also loader
    processes that were killed, deliver nothing, or need more open files than there may be.

    micro_batch               images per backbone pass at present; 1 if there cannot be fewer
    activation_checkpointing  whether it is on, or cannot be used
    image_size, workers       the run's settings
    """
    try:
        with loader_errors(workers):
            yield
    except NoMemoryError:  # of an image, which no setting named here would help
        raise
    except (torch.OutOfMemoryError, MemoryError, RuntimeError, OSError) as error:
        if _is_of_memory(error):
            where = "the GPU's memory" if any(name in str(error) for name in ("CUDA", "CUBLAS", "CUDNN")) else "memory"
            raise TrainingError(
                f"out of {where} ({_asked_for(error)}); the last checkpoint is intact. "
                f"{_advice(micro_batch, activation_checkpointing, image_size)}"
            ) from error
        raise


@contextmanager
def loader_errors(workers: int) -> Iterator[None]:
    """Turn what a loader's processes die of, or wait for in vain, in the block into a TrainingError."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        if _is_of_memory(error):
            raise
        if is_of_files(error):
            raise TrainingError(many_files()) from error
        if "DataLoader worker" in str(error) and "Terminated" not in str(error):
            raise TrainingError(_of_a_worker(str(error), workers)) from error
        if found := re.match(r"DataLoader timed out after (\d+) seconds", str(error)):
            raise TrainingError(_of_slow_reads(found[1], workers)) from error
        raise


def _is_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(part in str(error) for part in _NO_MEMORY)


@contextmanager
def full_gpu_explained() -> Iterator[None]:
    """Turn a lack of GPU memory in the block, where no setting of the run would help, into a TrainingError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"out of the GPU's memory outside of training ({_asked_for(error)}): end other programs that use it (nvidia-smi), or "
            "choose another GPU (CUDA_VISIBLE_DEVICES), then run the same command again"
        ) from error


def forget_peaks() -> None:
    """Reset the peaks of memory, main and GPUs': an earlier run of this process may have reached higher ones."""
    with suppress(OSError):  # on Linux, what `peak_gb` reads
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)


def peak_gb(device: torch.device) -> float:
    """Peak memory of this process so far, in GB: of the GPU that it trains on, or main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GB
    if sys.platform == "darwin":
        # In bytes on macOS. On Linux it would include the parent process.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GB
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / GB


def memory_gb(device: torch.device) -> float:
    """Total memory in GB: the GPU's, or main memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / GB
    return main_memory() / GB


def _advice(micro_batch: int, activation_checkpointing: bool, image_size: int) -> str:
    """Exact remedies first, which only cost time. Smaller images give another model."""
    ways = []
    if micro_batch > 1:
        ways.append(f"micro_batch={max(1, micro_batch // 2)} (now {micro_batch}; the result is the same)")
    if not activation_checkpointing:
        ways.append("activation_checkpointing=true (the same result, slower)")
    ways.append(f"image_size below {image_size}, in a new run")
    return "In this order: " + ", then ".join(ways)


def _asked_for(error: BaseException) -> str:
    """How much was asked for, if torch says so."""
    found = re.search(r"[Tt]ried to allocate ([\d.]+) (\w+)", str(error))
    if found is None:
        return lines_of(error)[0]
    amount, unit = found.groups()
    return f"asked for {float(amount) / 1e6:.0f} MB more" if unit == "bytes" else f"asked for {amount} {unit} more"


def _of_a_worker(text: str, workers: int) -> str:
    if "Bus error" in text or "shared memory" in text:
        return no_room()
    return (
        f"a loader's process was ended from outside, most likely because memory ran out ({text.splitlines()[0]}); the "
        f"last checkpoint is intact. Take fewer workers (now {workers}), then run the same command again"
    )


def _of_slow_reads(seconds: str, workers: int) -> str:
    return (
        f"the loader's processes delivered no batch for {seconds} s: reading or decoding the images is too slow, or their file "
        "system does not answer; the last checkpoint is intact. See that the files can be read, then run the same command again. "
        f"Where reading is slow: copy the images to a local disk, store large ones as tiled files, raise workers (now {workers}), "
        "or keep them downscaled (cache=FOLDER, in a new run)"
    )
