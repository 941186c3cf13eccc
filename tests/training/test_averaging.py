"""Averages of weights against explicit sums, and the mix with the start."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from jepakit_training.learning.averaging import Average, mix_with_start


def averaged(kind: str, values: list[float], *, steps: int, share: float, resume_at: int | None = None) -> float:
    weight = torch.zeros(1)
    average = Average({"weight": weight}, kind, steps=steps, share=share)  # type: ignore[arg-type]
    for step, value in enumerate(values):
        if step == resume_at:
            state = average.state_dict()
            average = Average({"weight": weight}, kind, steps=steps, share=share)  # type: ignore[arg-type]
            average.load_state_dict(state)
        weight.fill_(value)
        average.update(step)
    average.apply()
    return float(weight)


def test_equal_weights_are_the_mean_of_the_last_steps() -> None:
    values = [float(step**2) for step in range(10)]
    assert averaged("swa", values, steps=10, share=0.3) == pytest.approx((49 + 64 + 81) / 3)
    assert averaged("swa", values, steps=10, share=1.0) == pytest.approx(sum(values) / 10)


def test_exponential_weights_forget_within_their_share_of_the_steps() -> None:
    values = [float(step**2) for step in range(10)]
    expected = sum(values[:4]) / 4
    for value in values[4:]:
        expected += (value - expected) / 4
    assert averaged("ema", values, steps=10, share=0.4) == pytest.approx(expected)
    assert averaged("ema", values, steps=10, share=1.0) == pytest.approx(sum(values) / 10)


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_a_share_of_less_than_a_step_is_the_last_step(kind: str) -> None:
    assert averaged(kind, [float(step**2) for step in range(10)], steps=10, share=0.04) == 81


@pytest.mark.parametrize("kind", ["ema", "swa"])
@pytest.mark.parametrize("resume_at", [3, 8])
def test_a_resumed_average_is_the_uninterrupted_one(kind: str, resume_at: int) -> None:
    values = [float(step**2) for step in range(10)]
    whole = averaged(kind, values, steps=10, share=0.5)
    assert averaged(kind, values, steps=10, share=0.5, resume_at=resume_at) == whole


def test_the_mix_lies_between_the_start_and_what_was_trained() -> None:
    module = nn.Linear(2, 2)
    start: dict[str, Tensor] = {name: value.clone() for name, value in module.state_dict().items()}
    with torch.no_grad():
        module.weight += 4
    mix_with_start(module, start, 0.25)
    torch.testing.assert_close(module.weight.detach(), start["weight"] + 1)
    assert torch.equal(module.bias, start["bias"])


def test_a_layer_of_several_names_is_mixed_once() -> None:
    layer, norm = nn.Linear(2, 2), nn.BatchNorm1d(2)
    module = nn.Sequential(layer, norm, layer)
    assert norm.running_mean is not None
    start = {name: value.clone() for name, value in module.state_dict().items() if value.is_floating_point()}
    with torch.no_grad():
        for value in (*module.parameters(), norm.running_mean):
            value += 1
    mix_with_start(module, start, 0.5)
    moved = {name: float((value - start[name]).mean()) for name, value in module.state_dict().items() if name in start}
    assert moved == pytest.approx({name: 0.0 if name == "1.running_var" else 0.5 for name in start}, abs=1e-6)
