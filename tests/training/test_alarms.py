"""Alarms on values computed from made-up projections: each wrong distribution raises its own, a right one none."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from jepakit_training.learning.sigreg import directions, lejepa_loss
from jepakit_training.run.alarms import Alarms, projection_stats

N, K, VIEWS, LAMB = 128, 64, 4, 0.03
SETTINGS: dict[str, Any] = {
    "steps": 300, "warmup_steps": 30, "batch_size": N, "n_outputs": K, "lamb": LAMB, "lr": 1e-4,
    "workers": 1, "cached": False, "on_gpu": True, "trains": True,
}  # fmt: skip


def gaussian(step: int, *, std: float = 1.0, rank: int = K, shift: float = 0.0) -> Tensor:
    """Projections [V, N, K] of the given width and rank; views of one image differ a little."""
    random = torch.Generator().manual_seed(step)
    basis_KK = torch.linalg.qr(torch.randn(K, K, generator=torch.Generator().manual_seed(7)))[0]
    images_NR, views_VNR = torch.randn(N, rank, generator=random), torch.randn(VIEWS, N, rank, generator=random)
    proj_VNK: Tensor = std * (0.9 * images_NR + 0.19**0.5 * views_VNR) @ basis_KK[:rank] * (K / rank) ** 0.5 + shift
    return proj_VNK


def values_of(proj_VNK: Tensor, step: int) -> dict[str, float]:
    """What the loop logs, from the real loss, gradient and statistics."""
    proj_VNK = proj_VNK.clone().requires_grad_()
    slices_KS = directions(proj_VNK.shape[-1], 64, seed=0, step=step, device=torch.device("cpu"))
    loss, prediction, sigreg = lejepa_loss(proj_VNK, 2, LAMB, slices_KS)
    loss.backward()  # type: ignore[no-untyped-call]
    assert proj_VNK.grad is not None
    return {
        "loss": loss.item(), "prediction": prediction.item(), "sigreg": sigreg.item(), "data_wait": 0.1,
        "grad_norm": proj_VNK.grad.norm().item(), **{k: v.item() for k, v in projection_stats(proj_VNK.detach()).items()},
    }  # fmt: skip


def run(
    projections: Callable[[int], Tensor], changed: dict[str, float] | None = None, **settings: Any
) -> dict[int, list[str]]:
    """The warnings of a whole run, by step. Its loss falls whatever the projections."""
    alarms = Alarms(**{**SETTINGS, **settings})
    said = {}
    for step in range(9, alarms.steps, 10):
        lines = alarms.check(step, {**values_of(projections(step), step), "loss": 0.5 - step / 1000, **(changed or {})})
        if lines:
            said[step] = lines
    return said


def test_more_steps_are_advised_only_where_the_backbone_trains() -> None:
    wide = lambda step: gaussian(step, shift=0.35)  # noqa: E731
    assert any("more steps may help" in line for lines in run(wide).values() for line in lines)
    assert not any("more steps" in line for lines in run(wide, trains=False).values() for line in lines)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"std": 0.0}, "the projections collapsed: SIGReg is 51.5 .* total collapse is 51.5 with 128 images"),
        ({"std": 0.01}, "total collapse is 51.5 with 128 images"),
        ({"std": 0.2}, "too narrow: .* a larger lamb .now 0.03."),
        ({"std": 3.0}, "too wide: .* lower lr .now 0.0001."),
        ({"std": 20.0}, "no gradient left"),
        ({"rank": 1}, "vary along 1 of 64 directions"),
    ],
)  # fmt: skip
def test_each_wrong_distribution_has_its_own_warning_given_once(shape: dict[str, Any], words: str) -> None:
    said = run(lambda step: gaussian(step, **shape))
    ((step, (line,)),) = said.items()
    assert step == (209 if "rank" in shape else 79)
    assert line.startswith("warning: ")
    assert re.search(words, line), line


@pytest.mark.parametrize(
    ("shape", "noted"),
    [
        ({}, False),
        ({"std": 0.8}, True),
        ({"std": 1.2}, True),
        ({"rank": 32}, False),
        ({"rank": 4}, True),
        ({"shift": 0.1}, False),
    ],
)
def test_healthy_projections_give_no_warning_at_most_a_note_at_the_end(shape: dict[str, Any], noted: bool) -> None:
    said = run(lambda step: gaussian(step, **shape))
    assert all(line.startswith("note: SIGReg was") for lines in said.values() for line in lines)
    assert list(said) == ([299] if noted else [])


def test_four_directions_are_few_for_a_wide_projector_only() -> None:
    """The anchor: 256 images, 128 outputs, rank 4."""
    random = torch.Generator().manual_seed(0)
    proj_VNK = torch.randn(1, 256, 4, generator=random) @ torch.eye(4, 128) * 32**0.5
    values = values_of(proj_VNK, 0)
    assert values["sigreg"] == pytest.approx(14.5, rel=0.25)
    alarms = Alarms(**{**SETTINGS, "batch_size": 256, "n_outputs": 128})
    said = [line for step in range(209, 290, 10) for line in alarms.check(step, values)]
    assert len(said) == 1
    assert "vary along 4 of 128 directions" in said[0]


def test_a_short_run_that_ends_far_from_the_floor_is_told_to_take_more_steps() -> None:
    said = run(lambda step: gaussian(step, std=0.7), steps=40, warmup_steps=4)
    assert said.keys() == {39}
    assert "SIGReg was" in said[39][0]
    assert "steps = 300" in said[39][0]


@pytest.mark.parametrize(
    ("std", "words", "steps"),
    [
        *((0.001, "collapsed", steps) for steps in (10, 40, 70)),
        *((3.0, "too wide", steps) for steps in (10, 40, 70)),
        (20.0, "no gradient left", 40),
        (0.2, "too narrow", 70),
        (0.2, "more steps may help", 40),  # as projectors begin
    ],
)
def test_a_run_too_short_for_the_alarms_is_judged_at_its_end(std: float, words: str, steps: int) -> None:
    said = run(lambda step: gaussian(step, std=std), steps=steps, warmup_steps=4)
    assert said.keys() == {steps - 1}
    (line,) = said[steps - 1]
    assert words in line


def test_what_was_logged_in_the_warm_up_says_nothing_of_the_end() -> None:
    wrong_at_first = lambda step: gaussian(step, std=0.001 if step < 30 else 1.0)  # noqa: E731
    assert run(wrong_at_first, steps=40, warmup_steps=30) == {}


def test_the_first_steps_are_left_alone() -> None:
    assert run(lambda step: gaussian(step, std=0.1 if step < 50 else 1.0)) == {}


def test_one_odd_batch_is_no_reason_to_warn() -> None:
    assert run(lambda step: gaussian(step, std=0.1 if step % 50 == 9 else 1.0)) == {}


def losses(shape: Callable[[float], float], noise: float = 0.02, **settings: Any) -> list[str]:
    """Warnings of a run whose loss is the given function of its progress, from 0 to 1."""
    random = torch.Generator().manual_seed(0)
    alarms = Alarms(**{**SETTINGS, **settings})
    values = values_of(gaussian(0), 0)
    said = []
    for step in range(9, alarms.steps, 10):
        loss = shape(step / alarms.steps) + noise * torch.randn((), generator=random).item()
        said += alarms.check(step, {**values, "loss": loss})
    return said


def test_a_loss_that_falls_or_has_settled_is_no_reason_to_warn() -> None:
    assert losses(lambda part: 0.8 - 0.4 * part) == []
    assert losses(lambda part: 0.4 + 0.4 * (1 - part) ** 4) == []
    assert losses(lambda part: 0.4 + 0.4 * (1 - part) ** 4, noise=0.1) == []


def test_a_rising_loss_is_warned_of_once() -> None:
    (line,) = losses(lambda part: 0.8 - 0.8 * part if part < 0.5 else 0.4 + 2 * (part - 0.5))
    assert line.startswith("warning: the loss rises")
    assert "lower lr (now 0.0001)" in line


def test_a_loss_that_did_not_fall_is_told_at_the_end() -> None:
    (line,) = losses(lambda part: 0.5 + 0.02 * part)
    assert "did not fall" in line


def test_a_long_run_is_watched_at_no_more_than_a_millisecond_a_line() -> None:
    """A resume looks at every line that was logged before."""
    alarms, values = Alarms(**{**SETTINGS, "steps": 100_000}), values_of(gaussian(0), 0)
    began = time.process_time()
    for step in range(9, 100_000, 10):
        alarms.check(step, values)
    assert time.process_time() - began < 10


def test_a_dead_gradient() -> None:
    said = run(gaussian, {"grad_norm": 1e-9})
    assert [len(lines) for lines in said.values()] == [1]
    assert "the gradient is 1e-09" in said[79][0]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("names", [("loss", "grad_norm"), ("grad_norm",)])
def test_a_step_that_was_passed_over_says_nothing_of_the_others(number: float, names: tuple[str, ...]) -> None:
    """Logged as it was, also as the first step, the last one, and two in a row."""
    alarms, values = Alarms(**SETTINGS), values_of(gaussian(0), 0)
    for step in range(9, alarms.steps, 10):
        bad = dict.fromkeys(names, number) if step in (9, 159, 169, 299) else {}
        assert alarms.check(step, {**values, "loss": 0.5 - step / 1000, **bad}) == []


def test_a_run_whose_only_logged_step_was_passed_over_ends_without_a_word() -> None:
    values = {**values_of(gaussian(0, std=0.1), 0), "loss": float("nan")}
    assert Alarms(**{**SETTINGS, "steps": 8, "warmup_steps": 0}).check(7, values) == []


def test_beside_steps_that_were_passed_over_the_rest_is_watched() -> None:
    said = run(lambda step: gaussian(step, std=0.2) * (float("nan") if step % 40 == 9 else 1))
    ((line,),) = said.values()
    assert "too narrow" in line


@pytest.mark.parametrize(
    ("wait", "on_gpu", "warned"), [(0.25, True, 0), (0.4, True, 1), (0.4, False, 0), (0.8, False, 1)]
)
def test_waiting_for_images(wait: float, on_gpu: bool, warned: int) -> None:
    said = run(gaussian, {"data_wait": wait}, on_gpu=on_gpu)
    assert sum(map(len, said.values())) == warned
    assert all("more workers (now 1)" in line and "cache=FOLDER" in line for lines in said.values() for line in lines)
    assert all(
        "cache" not in line for lines in run(gaussian, {"data_wait": wait}, cached=True).values() for line in lines
    )


def test_statistics_of_projections() -> None:
    stats = projection_stats(gaussian(0, std=0.5, shift=3))
    assert stats["proj_std"].item() == pytest.approx(0.5, rel=0.03)
    assert K * N / (K + N) < stats["proj_rank"].item() < K * VIEWS * N / (K + VIEWS * N)
    assert projection_stats(gaussian(0, rank=4))["proj_rank"].item() == pytest.approx(4, rel=0.1)
    assert projection_stats(torch.ones(2, 8, 4)) == {"proj_std": torch.tensor(0.0), "proj_rank": torch.tensor(0.0)}
    assert projection_stats(torch.randn(2, 8, 4).bfloat16())["proj_std"].dtype == torch.float32


def test_a_loss_that_falls_late_is_not_said_to_stay_before_the_end() -> None:
    alarms = Alarms(**SETTINGS)
    for step in range(9, alarms.steps, 10):
        values = values_of(gaussian(step), step) | {"loss": 0.5 if step < 200 else 0.3}
        assert alarms.check(step, values) == []
