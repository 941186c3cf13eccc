"""A run's own precision settings: none are left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

from jepakit_training.learning.precision import mixed_precision, own_precision
from jepakit_training.setup import _where


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


def test_a_callers_interrupted_accumulation_of_gradients_stops_no_optimizer_and_is_as_it_was() -> None:
    GradientState()._set_sync_gradients(False)
    try:
        with own_precision():
            weight = torch.nn.Parameter(torch.zeros(()))
            optimizer = Accelerator(cpu=True).prepare(torch.optim.SGD([weight], lr=1.0))
            weight.sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            assert weight.item() == -1
        assert not GradientState().sync_gradients
    finally:
        GradientState()._set_sync_gradients(True)


def test_told_to_train_on_the_cpu_a_machine_with_a_gpu_takes_the_precision_of_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert PartialState().device.type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert mixed_precision("auto") == "no"
    assert "as accelerate was told to here" in _where(torch.device("cpu"))


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
