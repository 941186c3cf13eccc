"""The LeJEPA loss (arXiv 2511.08544): prediction towards the global views' mean, plus SIGReg.

Shapes: V views, N images on this rank, K projector outputs, S slices, T nodes.

SIGReg holds the projections of each view against N(0, I): along S random directions it compares the
empirical characteristic function with exp(-t²/2) by the Epps-Pulley statistic

    EP = N · Σ_k W_k · [ (C_k - φ_k)² + S_k² ],    C_k = mean cos(t_k p),  S_k = mean sin(t_k p)

and averages over directions and views. This is the lean form: cos and sin of the multiples of t_1 follow
from one cos and one sin by angle addition, the backward pass is written in closed form, and slices are
worked through in chunks, so that the [V, N, S, T] tensor of the plain autograd form never exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from jepakit_training.randomness import derive_seed

# Numbers per chunk: the work set of a chunk (about six such arrays) stays in a core's L2 cache.
_CHUNK_NUMBERS = 1 << 16


def directions(n_outputs: int, n_slices: int, *, seed: int, step: int, device: torch.device) -> Tensor:
    """Random unit directions of one optimizer step, float32 [K, S], columns of length 1.

    Drawn on the CPU from (seed, step): every rank has the same ones without talking, and a resumed run
    draws what the uninterrupted one would have drawn.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "directions", step))
    directions_KS = torch.randn(n_outputs, n_slices, generator=generator)
    unit_KS: Tensor = directions_KS / directions_KS.norm(dim=0, keepdim=True)
    return unit_KS.to(device)


def sigreg(proj_VNK: Tensor, directions_KS: Tensor, *, t_max: float = 3.0, n_nodes: int = 17) -> Tensor:
    """SIGReg of every view's batch, averaged over views and directions: a scalar, about 1.05 at best.

    proj_VNK       float32 or float64 [V, N, K] (lower precision is computed in float32)
    directions_KS  [K, S], unit columns, the same on every rank
    t_max, n_nodes the quadrature: `n_nodes` equally spaced nodes on [0, t_max] (the integrand is even)

    Where a torch.distributed process group is initialised the statistics are those of the global batch;
    every rank must hold equally many images. The gradient is world_size times the local share, which the
    gradient mean of DDP makes exactly right. Runs outside autocast.
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


def _quadrature(t_max: float, n_nodes: int, like: Tensor) -> tuple[float, Tensor, Tensor]:
    """Step dt, φ(t_k) and W_k of the nodes k = 1 … n_nodes - 1; at t = 0 the integrand is always 0."""
    dt = t_max / (n_nodes - 1)
    nodes = dt * torch.arange(1, n_nodes, device=like.device, dtype=torch.float64)
    phi = torch.exp(-nodes.square() / 2)
    weights = 2 * dt * phi
    weights[-1] /= 2
    return dt, phi.to(like.dtype), weights.to(like.dtype)


class _Sigreg(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, proj_VNK: Tensor, directions_KS: Tensor, t_max: float, n_nodes: int) -> Tensor:
        views, images, _ = proj_VNK.shape
        slices = directions_KS.shape[1]
        dt, phi_T, weights_T = _quadrature(t_max, n_nodes, proj_VNK)

        # stats[0] holds the means of cos, stats[1] those of sin, over the global batch.
        stats = proj_VNK.new_empty(2, n_nodes - 1, views, slices)
        for chunk in _chunks(slices, views * images):
            cos_1, sin_1 = _first_node(proj_VNK, directions_KS[:, chunk], dt)
            for k, (cos_k, sin_k) in enumerate(_multiples(cos_1, sin_1, n_nodes - 1)):
                torch.mean(cos_k, dim=1, out=stats[0, k, :, chunk])
                torch.mean(sin_k, dim=1, out=stats[1, k, :, chunk])
        world = _world_size()
        if world > 1:
            dist.all_reduce(stats)
            stats /= world

        stats[0] -= phi_T[:, None, None]
        ctx.save_for_backward(proj_VNK, directions_KS, stats)
        ctx.quadrature = (t_max, n_nodes, world)
        per_slice = torch.einsum("k,ckvs->vs", weights_T, stats.square())
        return images * world * per_slice.mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """dL/dp_n = 2/(V·S) · Σ_k W_k t_k [ S_k cos(t_k p_n) - (C_k - φ_k) sin(t_k p_n) ].

        With N_global in front of EP and 1/N_global in the means this is world_size times the gradient of
        the mean over ranks, so the factor is applied here once.
        """
        proj_VNK, directions_KS, stats = ctx.saved_tensors
        t_max, n_nodes, world = ctx.quadrature
        views, images, _ = proj_VNK.shape
        slices = directions_KS.shape[1]
        dt, _, weights_T = _quadrature(t_max, n_nodes, proj_VNK)
        nodes_T = dt * torch.arange(1, n_nodes, device=proj_VNK.device, dtype=proj_VNK.dtype)
        slopes = stats * (weights_T * nodes_T)[:, None, None]

        grad_VNK = torch.zeros_like(proj_VNK)
        for chunk in _chunks(slices, views * images):
            part_KS = directions_KS[:, chunk]
            cos_1, sin_1 = _first_node(proj_VNK, part_KS, dt)
            grad_p = torch.zeros_like(cos_1)
            for k, (cos_k, sin_k) in enumerate(_multiples(cos_1, sin_1, n_nodes - 1)):
                grad_p.addcmul_(slopes[1, k, :, None, chunk], cos_k)
                grad_p.addcmul_(slopes[0, k, :, None, chunk], sin_k, value=-1)
            grad_VNK += grad_p @ part_KS.T
        (grad,) = grads
        return grad_VNK * (grad * 2 * world / (views * slices)), None, None, None


def _chunks(slices: int, rows: int) -> list[slice]:
    size = max(1, _CHUNK_NUMBERS // rows)
    return [slice(start, min(start + size, slices)) for start in range(0, slices, size)]


def _first_node(proj_VNK: Tensor, directions_KS: Tensor, dt: float) -> tuple[Tensor, Tensor]:
    """cos and sin of dt · p, each [V, N, S']."""
    angles = (proj_VNK @ directions_KS).mul_(dt)
    return angles.cos(), angles.sin()


def _multiples(cos_1: Tensor, sin_1: Tensor, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (cos kθ, sin kθ) for k = 1 … count by c_{k+1} = 2 c_1 c_k - c_{k-1}, in two buffers each.

    A yielded pair is overwritten two steps later: use it at once. `cos_1` and `sin_1` are used up.
    """
    two_cos = 2 * cos_1
    previous, current = (torch.ones_like(cos_1), torch.zeros_like(sin_1)), (cos_1, sin_1)
    yield current
    for _ in range(count - 1):
        for old, now in zip(previous, current, strict=True):
            old.neg_().addcmul_(two_cos, now)
        previous, current = current, previous
        yield current


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
