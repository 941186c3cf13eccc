"""A twin of the backbone for training: its frozen part made cheaper, its trained parameters shared.

Frozen BatchNorms are folded into the convolutions before them (1.3 times the images/s of a MobileNetV2 on a
CPU); where the CPU has bfloat16 instructions, the frozen layers before the first trained one compute in it.
What is measured and exported is the backbone itself, never the twin.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from jepakit_training.learning.batchnorm import batch_norms

_MOST_ERROR_FOLDED, _MOST_ERROR_BF16 = 1e-4, 0.1
"""Relative L2 error of the features of noise; more means that an architecture is not as assumed."""


def twin_of(backbone: nn.Module, example_BCHW: Tensor, *, bf16: bool) -> nn.Module:
    """A copy of `backbone` that shares its trained parameters and computes the same features with less work.

    backbone      some of it frozen, the statistics of its BatchNorms too
    example_BCHW  an example input; noise will do
    bf16          whether frozen layers before the first trained one compute in bfloat16 (float32 where they add up)

    A step that changes the features of the example is left out: the twin is correct for every architecture, and
    cheaper for most.
    """
    twin = _copy(backbone.eval())
    steps = [(_fold_batch_norms, _MOST_ERROR_FOLDED), *([(_to_bf16, _MOST_ERROR_BF16)] if bf16 else [])]
    with torch.no_grad():
        expected = backbone(example_BCHW)
        for step, most in steps:
            cheaper = _copy(twin)
            try:
                step(cheaper, example_BCHW)
                error = (cheaper(example_BCHW) - expected).norm() / expected.norm()
            except (AttributeError, RuntimeError, TypeError):  # it accesses a layer that has been replaced
                continue
            if error < most:
                twin = cheaper
    return twin


def _copy(module: nn.Module) -> nn.Module:
    shared = {id(parameter): parameter for parameter in module.parameters() if parameter.requires_grad}
    return copy.deepcopy(module, shared)


def _fold_batch_norms(module: nn.Module, example_BCHW: Tensor) -> None:
    """Fold every frozen BatchNorm into the frozen convolution before it; its activation is kept."""
    made_by: dict[int, tuple[str, Tensor]] = {}  # holding the tensor keeps its id from being used again
    pairs: list[tuple[str, str]] = []

    def note_output(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: Tensor) -> None:
            made_by[id(output)] = name, output

        return hook

    def note_input(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any) -> None:
            if id(args[0]) in made_by:
                pairs.append((made_by[id(args[0])][0], name))

        return hook

    norms = set(map(id, batch_norms(module)))
    with _hooks() as hooks:
        for name, part in module.named_modules():
            if isinstance(part, nn.Conv2d) and not _trains(part):
                hooks.append(part.register_forward_hook(note_output(name)))
            elif id(part) in norms and not _trains(part):
                hooks.append(part.register_forward_pre_hook(note_input(name)))
        module(example_BCHW)
    for convolution, norm in pairs:
        left = module.get_submodule(norm)
        module.set_submodule(convolution, fuse_conv_bn_eval(module.get_submodule(convolution), left))  # type: ignore[type-var, arg-type]
        # timm's BatchNormAct2d holds the activation that follows.
        module.set_submodule(
            norm, nn.Sequential(*(getattr(left, part) for part in ("drop", "act") if hasattr(left, part)))
        )


def _to_bf16(module: nn.Module, example_BCHW: Tensor) -> None:
    """Make the frozen layers before the first trained one compute in bfloat16, and cast each layer's input to match."""
    order: list[nn.Module] = []
    with _hooks() as hooks:
        for part in module.modules():
            if not any(part.children()) and any(True for _ in part.parameters()):
                hooks.append(part.register_forward_pre_hook(lambda layer, _: order.append(layer)))
        module(example_BCHW)
    first_trained = next((place for place, layer in enumerate(order) if _trains(layer)), len(order))
    for layer in dict.fromkeys(order):
        early = layer in order[:first_trained] and layer not in order[first_trained:]
        dtype = torch.bfloat16 if early else torch.float32
        layer.to(dtype).register_forward_pre_hook(_cast_to(dtype))


def _cast_to(dtype: torch.dtype) -> Callable[..., Any]:
    def cast(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(arg.to(dtype) if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args)

    return cast


def _trains(part: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in part.parameters())


@contextmanager
def _hooks() -> Iterator[list[Any]]:
    hooks: list[Any] = []
    try:
        yield hooks
    finally:
        for hook in hooks:
            hook.remove()
