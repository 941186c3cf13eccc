"""The loss against the authors' numbers, against plain autograd in float64, and over two processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from jepakit_training.learning.sigreg import directions, lejepa_loss, sigreg

GOLDEN = json.loads((Path(__file__).parent / "golden" / "sigreg.json").read_text())


def make_input(kind: str, seed: int, shape: tuple[int, ...]) -> Tensor:
    """The inputs of golden/sigreg.json, as its `how.inputs` describes them."""
    base = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    if kind == "const2":
        base = np.full(shape, 2, np.float32)
    elif kind == "scaled":
        base = np.float32(1.5) * base + np.float32(0.3)
    else:
        assert kind == "normal"
    return torch.from_numpy(base)


def make_directions(seed: int, outputs: int, slices: int) -> Tensor:
    drawn = np.random.default_rng(seed).standard_normal((outputs, slices)).astype(np.float32)
    return torch.from_numpy(drawn / np.linalg.norm(drawn, axis=0))


def plain_sigreg(proj_VNK: Tensor, directions_KS: Tensor, t_max: float = 3.0, n_nodes: int = 17) -> Tensor:
    """The paper's formula by plain autograd, in float64: the reference for the lean form."""
    nodes = torch.linspace(0, t_max, n_nodes, dtype=torch.float64)
    dt = nodes[1] - nodes[0]
    phi = torch.exp(-nodes.square() / 2)
    weights = torch.full_like(nodes, 2.0) * dt * phi
    weights[[0, -1]] /= 2
    angles = (proj_VNK.double() @ directions_KS.double())[..., None] * nodes
    cos, sin = angles.cos().mean(dim=1), angles.sin().mean(dim=1)
    per_slice = proj_VNK.shape[1] * (((cos - phi).square() + sin.square()) @ weights)
    return per_slice.mean()


def relative_l2(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("case", GOLDEN["sigreg_fixed_A"], ids=lambda case: case["name"])
def test_sigreg_gives_the_authors_loss_and_gradient(case: dict[str, Any]) -> None:
    proj = make_input(case["kind"], case["seed_x"], tuple(case["shape"]))
    proj_VNK = (proj if proj.ndim == 3 else proj[None]).requires_grad_()
    loss = sigreg(proj_VNK, make_directions(case["seed_A"], proj.shape[-1], case["S"]))
    (grad,) = torch.autograd.grad(loss, proj_VNK)
    assert loss.item() == pytest.approx(case["loss_f64"], rel=1e-5)
    assert grad.norm().item() == pytest.approx(case["grad_l2"], rel=1e-5)
    assert grad.double().sum().item() == pytest.approx(case["grad_sum"], rel=1e-5)
    np.testing.assert_allclose(grad.flatten()[:8], case["grad_first8"], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("case", GOLDEN["lejepa_loss"], ids=lambda case: f"lambda={case['lamb']}")
def test_lejepa_loss_gives_the_authors_numbers(case: dict[str, Any]) -> None:
    proj = make_input(case["kind"], case["seed"], (case["V"], case["N"], case["K"])).requires_grad_()
    slices = make_directions(case["seed_A"], case["K"], case["S"])
    total, prediction, regulariser = lejepa_loss(proj, case["Vg"], case["lamb"], slices)
    (grad,) = torch.autograd.grad(total, proj)
    assert total.item() == pytest.approx(case["total"], rel=1e-5)
    assert prediction.item() == pytest.approx(case["inv"], rel=1e-5)
    assert regulariser.item() == pytest.approx(case["sigreg"], rel=1e-5)
    assert grad.norm().item() == pytest.approx(case["grad_l2"], rel=1e-5)
    np.testing.assert_allclose(grad.flatten()[:8], case["grad_first8"], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("kind", ["normal", "scaled"])
@pytest.mark.parametrize("shape", [(1, 16, 4), (8, 64, 32), (3, 256, 128)])
def test_the_whole_gradient_equals_plain_autograd(kind: str, shape: tuple[int, int, int]) -> None:
    proj = make_input(kind, 7, shape).requires_grad_()
    slices = make_directions(8, shape[-1], 300)
    (lean,) = torch.autograd.grad(sigreg(proj, slices), proj)
    (plain,) = torch.autograd.grad(plain_sigreg(proj, slices), proj)
    assert relative_l2(lean, plain) < 1e-5


def test_gradcheck_in_float64() -> None:
    proj = make_input("scaled", 3, (2, 5, 3)).double().requires_grad_()
    slices = make_directions(4, 3, 6).double()
    assert torch.autograd.gradcheck(lambda p: sigreg(p, slices), (proj,))


@pytest.mark.parametrize("numbers", [1, 32 * 7, 32 * 100 * 3], ids=["one slice", "some slices", "three views"])
def test_blocks_change_neither_loss_nor_gradient(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    proj, slices = make_input("scaled", 5, (4, 32, 16)).requires_grad_(), make_directions(6, 16, 100)
    whole = sigreg(proj, slices)
    (whole_grad,) = torch.autograd.grad(whole, proj)
    monkeypatch.setattr("jepakit_training.learning.sigreg._CPU_NUMBERS", numbers)
    value = sigreg(proj, slices)
    assert value.item() == pytest.approx(whole.item(), rel=1e-6)
    assert relative_l2(torch.autograd.grad(value, proj)[0], whole_grad) < 1e-6


@pytest.mark.parametrize("n_nodes", [2, 3, 8, 16, 17])
def test_any_number_of_nodes(n_nodes: int) -> None:
    proj, slices = make_input("scaled", 9, (2, 20, 6)).double().requires_grad_(), make_directions(10, 6, 12).double()
    lean, plain = sigreg(proj, slices, t_max=2.5, n_nodes=n_nodes), plain_sigreg(proj, slices, 2.5, n_nodes)
    assert lean.item() == pytest.approx(plain.item(), rel=1e-12)
    assert relative_l2(*(torch.autograd.grad(value, proj)[0] for value in (lean, plain))) < 1e-12


def test_rounding_stays_small_where_the_gradient_nearly_vanishes() -> None:
    """At 4096 Gaussian projections: 8e-6 by steps of θ, 1e-6 by cos and sin of every multiple, and by ours."""
    proj = make_input("normal", 11, (1, 4096, 64)).requires_grad_()
    slices = make_directions(12, 64, 64)
    lean, plain = (torch.autograd.grad(form(proj, slices), proj)[0] for form in (sigreg, plain_sigreg))
    assert relative_l2(lean, plain) < 3e-6


@pytest.mark.parametrize(
    ("scale", "per_image"), [(0.0, 0.40205), (0.5, 0.151), (0.8, 0.0218), (1.5, 0.084), (2.0, 0.236)]
)
def test_anchors_of_too_narrow_and_too_wide_projections(scale: float, per_image: float) -> None:
    proj = scale * torch.randn(1, 20_000, 8, generator=torch.Generator().manual_seed(0))
    value = sigreg(proj, directions(8, 64, seed=0, step=0, device=torch.device("cpu")))
    assert value.item() / 20_000 == pytest.approx(per_image, rel=0.02)


def test_the_floor_of_gaussian_projections_is_1_05_whatever_the_batch() -> None:
    for images in (64, 1024):
        proj = torch.randn(16, images, 64, generator=torch.Generator().manual_seed(images))
        value = sigreg(proj, directions(64, 512, seed=0, step=0, device=torch.device("cpu")))
        assert value.item() == pytest.approx(1.0525, abs=0.08)


def test_directions_depend_on_seed_and_step_alone_and_have_unit_length() -> None:
    cpu = torch.device("cpu")
    first = directions(16, 40, seed=1, step=2, device=cpu)
    torch.testing.assert_close(first.norm(dim=0), torch.ones(40))
    assert torch.equal(first, directions(16, 40, seed=1, step=2, device=cpu))
    assert not torch.equal(first, directions(16, 40, seed=1, step=3, device=cpu))
    assert not torch.equal(first, directions(16, 40, seed=2, step=2, device=cpu))


def test_bfloat16_projections_are_computed_in_float32() -> None:
    proj = make_input("normal", 51, (1, 256, 128))
    slices = make_directions(52, 128, 256)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = sigreg(proj, slices)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(sigreg(proj, slices).item(), rel=1e-6)


def test_the_loss_of_bfloat16_projections_is_float32_too() -> None:
    proj, slices = make_input("normal", 51, (3, 64, 32)).bfloat16(), make_directions(52, 32, 64)
    for half, whole in zip(lejepa_loss(proj, 2, 0.5, slices), lejepa_loss(proj.float(), 2, 0.5, slices), strict=True):
        assert half.dtype == torch.float32
        assert half.item() == whole.item()
