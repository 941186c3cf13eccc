"""A run's own precision: nothing of it is left behind."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from jepakit_training.precision import own_precision


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
