"""The LeJEPA loss (arXiv 2511.08544): prediction towards the global views' mean, plus SIGReg.

Shapes: V views, N images on this rank, K projector outputs, S slices, T nodes.

SIGReg tests the projections of each view against N(0, I): along S random directions it compares the
empirical characteristic function with exp(-t²/2) by the Epps-Pulley statistic

    EP = N · Σ_k W_k · [ (C_k - φ_k)² + S_k² ],    C_k = mean cos(t_k p),  S_k = mean sin(t_k p)

and averages over directions and views. This is a lean implementation: with t_k = k·dt and θ = dt·p, cos kθ and
sin kθ follow from one cos and one sin by angle addition, the backward pass is written in closed form, and views and
slices are processed in blocks, so that the [V, N, S, T] tensor of the plain autograd form never exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from jepakit_training.data.transfer import to_device
from jepakit_training.learning.distributed import group_size
from jepakit_training.randomness import derive_seed

# Elements per array of a block; a block has about nine arrays, and takes 108 operations over both passes. On a CPU, half
# a megabyte per array: each operation has an overhead of some µs (2^16 took 1.1 to 1.2 times as long, larger blocks
# gained nothing). On a GPU a launch takes about 5 µs, and an operation on 2^23 elements moves at least 100 MB, which takes
# 33 µs at 3 TB/s and hides the launch. V = 8, N = 512, S = 1024 is then one block of 108 launches, 3.8 ms and 222 MB on
# an H100; 2^17 would make 32 blocks and 3,500 launches, an estimated 17 ms.
_CPU_NUMBERS, _GPU_NUMBERS = 1 << 17, 1 << 23
# The signs of each chain of waves, repeated.
_SIGNS = (1, -1, -1, 1)


def directions(n_outputs: int, n_slices: int, *, seed: int, step: int, device: torch.device) -> Tensor:
    """Random unit directions of one optimizer step, float32 [K, S], columns of length 1.

    Drawn on the CPU from (seed, step): every rank has the same ones without communication, and a resumed run draws
    the same as the uninterrupted one would have.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "directions", step))
    directions_KS = torch.randn(n_outputs, n_slices, generator=generator)
    return to_device(directions_KS / directions_KS.norm(dim=0, keepdim=True), device)


def sigreg(proj_VNK: Tensor, directions_KS: Tensor, *, t_max: float = 3.0, n_nodes: int = 17) -> Tensor:
    """SIGReg of every view's batch, averaged over views and directions: a scalar, about 1.05 at best.

    proj_VNK       float32 or float64 [V, N, K] (lower precision is computed in float32)
    directions_KS  [K, S], unit columns, the same on every rank
    t_max, n_nodes the quadrature: `n_nodes` equally spaced nodes on [0, t_max] (the integrand is even)

    If a torch.distributed process group is initialised, the statistics are those of the global batch; every rank
    must hold equally many images. The gradient is world_size times the local share, so that DDP's mean over ranks
    is exact. Runs outside autocast.
    """
    with torch.autocast(proj_VNK.device.type, enabled=False):
        proj_VNK = proj_VNK if proj_VNK.dtype == torch.float64 else proj_VNK.float()
        value: Tensor = _Sigreg.apply(proj_VNK, directions_KS.to(proj_VNK), t_max, n_nodes)
        return value


def lejepa_loss(proj_VNK: Tensor, n_global: int, lamb: float, directions_KS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(1 - λ)·prediction + λ·SIGReg; returns (total, prediction, sigreg), float32 scalars.

    proj_VNK  [V, N, K], the first `n_global` views are the global ones. Their mean is every view's target:
              no stop-gradient, no predictor, no teacher. The prediction term is a mean over K, not a sum.
    """
    with torch.autocast(proj_VNK.device.type, enabled=False):
        proj_VNK = proj_VNK if proj_VNK.dtype == torch.float64 else proj_VNK.float()
        target_NK = proj_VNK[:n_global].mean(dim=0)
        prediction = (target_NK - proj_VNK).square().mean()
        regulariser = sigreg(proj_VNK, directions_KS)
        return (1 - lamb) * prediction + lamb * regulariser, prediction, regulariser


class _Quadrature(NamedTuple):
    """The nodes k = 1 … n_nodes - 1, in the order of `_waves`; at t = 0 the integrand is always 0."""

    dt: float
    phi_T: Tensor
    """±φ(t_k), with the signs of the waves, so that it can be subtracted from their means."""
    weights_T: Tensor
    """W_k."""
    slopes_T: Tensor
    """W_k · k."""


@cache
def _quadrature(t_max: float, n_nodes: int, device: torch.device, dtype: torch.dtype) -> _Quadrature:
    # Made once, as copying numbers to a GPU waits for it.
    dt, order = t_max / (n_nodes - 1), [*range(1, n_nodes, 2), *range(2, n_nodes, 2)]
    nodes = torch.tensor(order, dtype=torch.float64)
    phi = torch.exp(-(dt * nodes).square() / 2)
    weights = 2 * dt * phi
    weights[nodes.argmax()] /= 2
    signs = torch.tensor([_SIGNS[(k - 1) // 2 % 4] for k in order])
    return _Quadrature(dt, *(each.to(device, dtype) for each in (signs * phi, weights, weights * nodes)))


class _Sigreg(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, proj_VNK: Tensor, directions_KS: Tensor, t_max: float, n_nodes: int) -> Tensor:
        views, images, _ = proj_VNK.shape
        rule = _quadrature(t_max, n_nodes, proj_VNK.device, proj_VNK.dtype)
        steps_SK = _steps(directions_KS, rule.dt)

        # ±C_k and ±S_k over the global batch.
        stats_T2VS = proj_VNK.new_empty(len(rule.phi_T), 2, views, len(steps_SK))
        for block in _blocks(proj_VNK, len(steps_SK)):
            for stats, wave in zip(stats_T2VS, _waves(_angles(proj_VNK, steps_SK, block), n_nodes), strict=True):
                torch.mean(wave, dim=-1, out=stats[:, *block])
        world = group_size()
        if world > 1:
            dist.all_reduce(stats_T2VS)
            stats_T2VS /= world

        stats_T2VS[:, 0] -= rule.phi_T[:, None, None]
        ctx.save_for_backward(proj_VNK, directions_KS, stats_T2VS)
        ctx.quadrature = (t_max, n_nodes, world)
        per_slice = torch.einsum("k,kcvs->vs", rule.weights_T, stats_T2VS.square())
        return images * world * per_slice.mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """dL/dθ_n = 2/(V·S) · Σ_k W_k k [ S_k cos kθ_n - (C_k - φ_k) sin kθ_n ], and dθ_n/dz_n = dt·a.

        With N_global in front of EP and 1/N_global in the means this is world_size times the gradient of
        the mean over ranks, so the factor is applied here once. The signs of waves and statistics cancel.
        """
        proj_VNK, directions_KS, stats_T2VS = ctx.saved_tensors
        t_max, n_nodes, world = ctx.quadrature
        rule = _quadrature(t_max, n_nodes, proj_VNK.device, proj_VNK.dtype)
        steps_SK = _steps(directions_KS, rule.dt)
        (grad,) = grads
        factor_T = rule.slopes_T * grad * 2 * world
        factor_T /= stats_T2VS[0, 0].numel()
        slopes_T2VS1 = (factor_T[:, None, None, None] * stats_T2VS.flip(1))[..., None]
        slopes_T2VS1[:, 1].neg_()

        grad_VNK = torch.zeros_like(proj_VNK)
        for views, slices in _blocks(proj_VNK, len(steps_SK)):
            angles = _angles(proj_VNK, steps_SK, (views, slices))
            grad_angles = torch.zeros_like(angles)
            for slopes, wave in zip(slopes_T2VS1[:, :, views, slices], _waves(angles, n_nodes), strict=True):
                for slope, part in zip(slopes, wave, strict=True):
                    grad_angles.addcmul_(slope, part)
            grad_VNK[views].baddbmm_(grad_angles.mT, steps_SK[slices].expand(len(angles), -1, -1))
        return grad_VNK, None, None, None


def _steps(directions_KS: Tensor, dt: float) -> Tensor:
    """The matrix that maps projector outputs to angles θ: dt times the directions, one per row."""
    return (dt * directions_KS).T.contiguous()


def _blocks(proj_VNK: Tensor, slices: int) -> list[tuple[slice, slice]]:
    """Views and slices of each block: as many slices of one view as fit, or several views if all slices do."""
    views, images, _ = proj_VNK.shape
    numbers = _CPU_NUMBERS if proj_VNK.device.type == "cpu" else _GPU_NUMBERS
    width = min(slices, max(1, numbers // images))
    height = max(1, numbers // (images * width))
    return [
        (slice(view, view + height), slice(start, start + width))
        for view in range(0, views, height)
        for start in range(0, slices, width)
    ]


def _angles(proj_VNK: Tensor, steps_SK: Tensor, block: tuple[slice, slice]) -> Tensor:
    """θ of a block, [V', S', N]: images last, where their means are sums of neighbours in memory."""
    views, slices = block
    return steps_SK[slices] @ proj_VNK[views].mT


def _waves(angles: Tensor, n_nodes: int) -> Iterator[Tensor]:
    """Yield ±(cos kθ, sin kθ), [2, *θ], for the odd k, then for the even ones.

    A yielded wave is overwritten two steps later: use it at once.
    """
    cos, sin = angles.cos(), angles.sin()
    cos_2 = 1 - 2 * sin.square()
    yield from _chain(torch.stack([cos, -sin]), torch.stack([cos, sin]), cos_2, n_nodes // 2)
    sin_2 = cos.mul_(sin).mul_(2)
    one, zero = torch.ones_like(cos), torch.zeros_like(cos)
    yield from _chain(torch.stack([one, zero]), torch.stack([cos_2, sin_2]), cos_2, (n_nodes - 1) // 2)


def _chain(previous: Tensor, wave: Tensor, cos_2: Tensor, count: int) -> Iterator[Tensor]:
    """Waves k, k + 2, … by c_{k+2} = 2 cos 2θ · c_k - c_{k-2}, and likewise for sin; signs + - - + + - - + …

    Steps of 2θ cost the same as steps of θ, with an eighth of the rounding error in the gradient. With these
    signs a step is one multiply-add in place; without them it would also take a negation.
    """
    for place in range(count):
        if place:
            previous.addcmul_(cos_2, wave, value=-2 if place % 2 else 2)
            previous, wave = wave, previous
        yield wave
