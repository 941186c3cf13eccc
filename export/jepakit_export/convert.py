"""`Embedder` → ONNX bytes: dynamic batch, named input and output, the same bytes at every export."""

from __future__ import annotations

import logging
import mmap
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedOpsetsPass
from safetensors.numpy import save_file

from jepakit.backbones.embedder import Embedder
from jepakit.bundles.bundle import DATA
from jepakit.bundles.external import as_inputs, placed_tensors
from jepakit.bundles.manifest import INPUT, OUTPUT, TOKENS
from jepakit.errors import ExportError

INLINE_LIMIT = (2 << 30) - (64 << 20)
"""Most bytes of weights inside a graph: a protobuf is limited to 2 GB. Larger ones go to model.safetensors."""
# Smaller tensors stay in the graph: shapes and axes that a runtime needs while reading it.
_LEAST_OUTSIDE = 1024


class Sealed(NamedTuple):
    """The bytes of model.onnx, and of model.safetensors if a large model's tensors are outside the graph."""

    graph: bytes
    data: bytes | None


@contextmanager
def only_errors(*loggers: str) -> Iterator[None]:
    """Suppress warnings, and anything below an error from these loggers; the empty name is the root logger's."""
    levels = {logger: logger.level for logger in map(logging.getLogger, loggers)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in levels:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in levels.items():
                logger.setLevel(level)


def to_onnx(embedder: Embedder, example_BHWC: torch.Tensor, *, opset: int, dynamic_size: bool = False) -> ir.Model:
    """The graph `images` [batch, H, W, C] → `embeddings` float32 [batch, D] (and `tokens` [batch, N, E])."""
    model: ir.Model = _program(embedder, example_BHWC, opset, dynamic_size).model
    return model


def is_large(model: ir.Model) -> bool:
    """Whether the weights are more than a graph can hold."""
    held = [value.const_value for value in model.graph.initializers.values()]
    return sum(tensor.nbytes for tensor in held if tensor is not None) > INLINE_LIMIT


def seal(model: ir.Model, metadata: dict[str, str]) -> Sealed:
    """The graph's bytes, checked, without paths of this machine, the same at every export.

    A large `model` is consumed: its tensors are then only in the bytes of the second file.

    metadata  written into the file, so that a stray model.onnx still says what it is
    """
    data = _move_out(model) if is_large(model) else None
    _strip(model)
    proto = ir.serde.serialize_model(model)
    # torch always writes IR version 10, which older runtimes refuse even if they know all operators of the opset.
    least = onnx.helper.find_min_ir_version_for(proto.opset_import, ignore_unknown=True)
    proto.ir_version = min(proto.ir_version, least)
    onnx.helper.set_model_props(proto, metadata)
    # Deterministic serialisation: protobuf maps are otherwise written in hash order.
    graph: bytes = proto.SerializeToString(deterministic=True)
    # The checker would look on disk for tensors outside the graph, where there are none yet.
    onnx.checker.check_model(proto if data is None else as_inputs(graph, data)[0])
    return Sealed(graph, data)


def _move_out(model: ir.Model) -> bytes:
    """Move the model's big tensors into a safetensors file, to which the model then refers; returns the file's bytes.

    weights.safetensors will not do: the exporter has transposed matrices, and fp16 and int8 are different numbers. The
    file goes through the disk so that memory never holds the tensors twice: they are released before it is read.
    """
    values = model.graph.initializers
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, DATA)
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in _big(model).items()}, file)
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            table = placed_tensors(mapped)
        types = {name: tensor.dtype for name, tensor in _big(model).items()}
        for name, (_, shape, offset, length) in table.items():
            values[name].const_value = ir.ExternalTensor(
                DATA, offset, length, types[name], shape=ir.Shape(shape), name=name
            )
        return file.read_bytes()


def _big(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    held = {name: value.const_value for name, value in model.graph.initializers.items()}
    return {name: tensor for name, tensor in held.items() if tensor is not None and tensor.nbytes >= _LEAST_OUTSIDE}


def _program(embedder: Embedder, example: torch.Tensor, opset: int, dynamic_size: bool) -> Any:
    """Export; if that fails, export again with plain instead of fused attention, as BEiT, Hiera and Twins need."""
    try:
        return _export(embedder, example, opset, dynamic_size)
    except Exception:  # the exporter wraps whatever went wrong in classes of its own
        if not use_plain_attention(embedder):
            raise
        return _export(embedder, example, opset, dynamic_size)


def use_plain_attention(embedder: Embedder) -> bool:
    """Replace fused attention by plain matrix products and a softmax; returns whether there was any."""
    fused = [module for module in embedder.modules() if getattr(module, "fused_attn", False)]
    for module in fused:
        module.fused_attn = False  # type: ignore[assignment]
    return bool(fused)


def _export(embedder: Embedder, example: torch.Tensor, opset: int, dynamic_size: bool) -> Any:
    shape = {0: torch.export.Dim("batch")}
    if dynamic_size:
        shape.update({1: torch.export.Dim("height", min=16), 2: torch.export.Dim("width", min=16)})
    with only_errors("torch.onnx", "onnxscript", "torch.export"):
        program = torch.onnx.export(
            embedder,
            (example,),
            dynamo=True,
            opset_version=opset,
            verbose=False,
            input_names=[INPUT],
            output_names=[OUTPUT, TOKENS] if embedder.tokens else [OUTPUT],
            # Without a named Dim the exporter silently fixes the batch to the example's.
            dynamic_shapes=(shape,),
        )
    if program is None:
        raise ExportError("torch's exporter returned nothing")
    return program


def _strip(model: ir.Model) -> None:
    """Drop doc strings and metadata (stack traces with paths of this machine), and operator sets that no node uses: the
    quantiser declares many more."""
    model.doc_string = None
    ClearMetadataAndDocStringPass()(model)
    RemoveUnusedOpsetsPass()(model)
    parts: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for part in parts:
        for value in ir.convenience.create_value_mapping(part).values():
            value.metadata_props.clear()
