"""Which weights a run ends with: averaged over its last steps, and mixed with those it started from."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn


class Average:
    """A running average of tensors: exponential (EMA), or of equal weights over the last steps (SWA, arXiv 1803.05407).

    tensors  what is averaged, by name; they go on changing in place
    steps    of the run; `share` of them, at its end, is what is averaged over
    """

    def __init__(self, tensors: dict[str, Tensor], kind: Literal["ema", "swa"], *, steps: int, share: float) -> None:
        over = max(1, round(share * steps))
        self._tensors, self._first = tensors, steps - over if kind == "swa" else 0
        make_step: Callable[..., Any] = (
            partial(get_ema_multi_avg_fn, 1 - 1 / over) if kind == "ema" else get_swa_multi_avg_fn
        )
        self._step = make_step()
        self._values = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self._count = 0

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in what the tensors are after `step`, counted from 0."""
        now = [tensor.detach() for tensor in self._tensors.values()]
        if step < self._first or self._count == 0:
            torch._foreach_copy_(list(self._values.values()), now)
            self._count = int(step >= self._first)
            return
        self._step(list(self._values.values()), now, torch.tensor(self._count))
        self._count += 1

    @torch.no_grad()
    def apply(self) -> None:
        """Make the tensors their average."""
        for name, tensor in self._tensors.items():
            tensor.copy_(self._values[name])

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"values": self._values, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for name, value in self._values.items():
            value.copy_(state["values"][name])
        self._count = state["count"]


@torch.no_grad()
def mix_with_start(backbone: nn.Module, start: dict[str, Tensor], mix: float) -> None:
    """Make every weight start + mix · (trained - start) (WiSE-FT, arXiv 2109.01903)."""
    # Each tensor once, whatever number of names it has.
    for name, value in (*backbone.named_parameters(), *backbone.named_buffers()):
        if name in start:
            value.copy_(torch.lerp(start[name].to(value), value, mix))
