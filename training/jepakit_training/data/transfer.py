"""Moving tensors to the training device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(numbers: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to `device` without waiting: a plain copy to a GPU would wait for all of its earlier work."""
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)
