"""Numeric precision: bfloat16 autocast where `precision` is bf16, or auto on a GPU that has it; float32 is never rounded to TF32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from jepakit.errors import ConfigError


def mixed_precision(asked: Literal["auto", "fp32", "bf16"]) -> Literal["bf16", "no"]:
    """The precision of accelerate's autocast; ConfigError for bfloat16 on a machine without it."""
    on_gpu = torch.cuda.is_available() and PartialState().device.type == "cuda"  # accelerate may be told to leave it
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else cpu_has_bf16()
    if asked == "bf16" and not has_bf16:
        raise ConfigError("precision = bf16: this machine has no bfloat16 instructions; use auto or fp32")
    return "bf16" if asked == "bf16" or (asked == "auto" and on_gpu and has_bf16) else "no"


def cpu_has_bf16() -> bool:
    """Whether this CPU has bfloat16 instructions; without them it is 10 times slower than float32, measured."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@contextmanager
def own_precision() -> Iterator[None]:
    """A block that computes in the requested precision, whatever this process did before; all is restored afterwards.

    Float32 means float32 in it, also on a GPU, where torch by default rounds the inputs of convolutions to 10 bits
    (TF32): what is measured is what is served. accelerate is reset: it keeps the precision of its first use, and between two
    steps of a loop that accumulates gradients and was interrupted, no optimizer takes a step.
    """
    kept = (AcceleratorState._shared_state, GradientState._shared_state)
    kept_before = [dict(state) for state in kept]
    with _no_tf32():
        try:
            for state in kept:
                state.clear()
            yield
        finally:
            for state, before in zip(kept, kept_before, strict=True):
                state.clear()
                state.update(before)


@contextmanager
def _no_tf32() -> Iterator[None]:
    """Matrix products and convolutions in full float32.

    torch has two generations of switches. The older ones set the newer; if only a newer one was set, reading the older
    one is an error, and compiled kernels read it.
    """
    cudnn: Any = torch.backends.cudnn
    newer: tuple[Any, ...] = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
    before = [each.fp32_precision for each in newer]
    products, convolutions = "highest", True  # torch's defaults
    with suppress(RuntimeError):
        products = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        convolutions = cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    cudnn.allow_tf32 = False
    for each in newer:
        each.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        cudnn.allow_tf32 = convolutions
        for each, precision in zip(newer, before, strict=True):
            each.fp32_precision = precision
