"""A run's own precision settings: none are left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from jepakit_training.learning.precision import own_precision


def test_a_block_of_its_own_precision_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with own_precision():
        callers = Accelerator(cpu=True, mixed_precision="no")
        with own_precision():
            # accelerate would refuse another precision than that of its first use in this process.
            assert Accelerator(cpu=True, mixed_precision="bf16").mixed_precision == "bf16"
            assert not torch.backends.cudnn.allow_tf32
            assert not torch.backends.cuda.matmul.allow_tf32
        assert callers.mixed_precision == "no"
        assert AcceleratorState().mixed_precision == "no"
    assert torch.backends.cudnn.allow_tf32


BACKENDS: Any = torch.backends
NEWER: tuple[Any, ...] = (BACKENDS.cuda.matmul, BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn)


@pytest.mark.parametrize("moved", [0, 1, None])
def test_torchs_newer_switches_are_read_and_put_back_too(moved: int | None) -> None:
    """A process that has moved one of them cannot read the older ones, and compiled kernels do."""
    untouched = [each.fp32_precision for each in NEWER]
    try:
        if moved is None:
            BACKENDS.fp32_precision = "tf32"
        else:
            NEWER[moved].fp32_precision = ("tf32", "ieee")[moved]
        before = [each.fp32_precision for each in NEWER]
        with own_precision():
            assert [each.fp32_precision for each in NEWER] == ["ieee"] * 3
            assert not torch.backends.cudnn.allow_tf32
            assert not torch.backends.cuda.matmul.allow_tf32
            assert torch.get_float32_matmul_precision() == "highest"
        assert [each.fp32_precision for each in NEWER] == before
    finally:
        BACKENDS.fp32_precision = "none"
        for each, precision in zip(NEWER, untouched, strict=True):
            each.fp32_precision = precision
