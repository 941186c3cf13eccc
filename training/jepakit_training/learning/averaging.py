"""The final weights of a run: averaged over its last steps, and mixed with the start weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn


class Average:
    """A running average of tensors: exponential (EMA), or of equal weights over the last steps (SWA, arXiv 1803.05407).

    tensors  the tensors to average, by name; they keep changing in place
    steps    steps of the run; the last `share` of them is averaged over
    """

    def __init__(self, tensors: dict[str, Tensor], kind: Literal["ema", "swa"], *, steps: int, share: float) -> None:
        over = max(1, round(share * steps))
        self._tensors, self._first = tensors, steps - over if kind == "swa" else 0
        self._decay = 1 - 1 / over if kind == "ema" else None
        self._values = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self._count = 0

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Include the values of the tensors after `step`, counted from 0."""
        now = [tensor.detach() for tensor in self._tensors.values()]
        if step < self._first or self._count == 0:
            torch._foreach_copy_(list(self._values.values()), now)
            self._count = int(step >= self._first)
            return
        self._next()(list(self._values.values()), now, torch.tensor(self._count))
        self._count += 1

    def _next(self) -> Callable[..., Any]:
        """torch's update of the average. An EMA of few steps is their plain mean: else the first would count like a whole time constant of steps."""
        if self._decay is None:
            step: Callable[..., Any] = get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]
            return step
        return get_ema_multi_avg_fn(min(self._decay, self._count / (self._count + 1)))  # type: ignore[no-any-return,no-untyped-call]

    @torch.no_grad()
    def apply(self) -> None:
        """Set the tensors to their average."""
        for name, tensor in self._tensors.items():
            tensor.copy_(self._values[name])

    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed run needs."""
        return {"values": self._values, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, value in self._values.items():
            value.copy_(state["values"][name])
        self._count = state["count"]


@torch.no_grad()
def mix_with_start(backbone: nn.Module, start: dict[str, Tensor], mix: float) -> None:
    """Set every weight to start + mix · (trained - start) (WiSE-FT, arXiv 2109.01903)."""
    # Each tensor once, even if it has several names.
    for name, value in (*backbone.named_parameters(), *backbone.named_buffers()):
        if name in start:
            value.copy_(torch.lerp(start[name].to(value), value, mix))
