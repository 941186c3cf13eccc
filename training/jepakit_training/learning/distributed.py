"""What ranks exchange besides gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def group_size() -> int:
    """How many ranks share the batch; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of `x` over ranks, with its gradient from all of them."""
    if group_size() == 1:
        return x
    total: Tensor = _AllReduceSum.apply(x)
    return total / group_size()


class SharedFlag:
    """Asks over the CPU whether a flag is set on any rank: a GPU would answer only after all of its queued work.

    Every rank must create one and ask equally often.
    """

    def __init__(self) -> None:
        alone = group_size() == 1 or dist.get_backend() == "gloo"
        self._group = None if alone else dist.new_group(backend="gloo")

    def any(self, flag: bool) -> bool:
        """Whether any rank called this with True; waits until all have called it."""
        if group_size() == 1:
            return flag
        flags_up = torch.tensor(int(flag))
        dist.all_reduce(flags_up, group=self._group)  # type: ignore[arg-type]  # every rank is in it
        return bool(flags_up)


class _AllReduceSum(torch.autograd.Function):
    """A differentiable sum over ranks: every rank's loss depends on every rank's input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total
