"""`Embedder` → ONNX bytes: dynamic batch, named input and output, the same bytes at every export."""

from __future__ import annotations

import io
import logging
import warnings
from typing import Any

import onnx
import torch

from jepakit.backbone import Embedder
from jepakit.errors import ExportError

INPUT, OUTPUT, TOKENS = "images", "embeddings", "tokens"
# Above it a protobuf cannot hold the weights.
_MOST_BYTES = (2 << 30) - (64 << 20)


def to_onnx(embedder: Embedder, example_BHWC: torch.Tensor, *, opset: int, dynamic_size: bool = False) -> bytes:
    """The graph `images` [batch, H, W, C] → `embeddings` float32 [batch, D] (and `tokens` [batch, N, E]), as one
    ONNX file's bytes. Raises ExportError for a model of 2 GB or more, whose weights one file cannot hold.
    """
    size = sum(value.numel() * value.element_size() for value in embedder.state_dict().values())
    if size > _MOST_BYTES:
        raise ExportError(
            f"the weights take {size / 2**30:.1f} GB, and an ONNX file holds 2 at most: export with --precision fp16, or choose a smaller backbone"
        )
    program = _program(embedder, example_BHWC, opset, dynamic_size)
    buffer = io.BytesIO()
    program.save(buffer, external_data=False)
    return buffer.getvalue()


def sealed(data: bytes, metadata: dict[str, str]) -> bytes:
    """The same graph checked, without paths of this machine, the same bytes at every export.

    metadata  written into the file, so that a stray model.onnx still says what it is
    """
    graph = onnx.load_model_from_string(data)
    _strip(graph)
    onnx.helper.set_model_props(graph, metadata)
    onnx.checker.check_model(graph)
    # Deterministic serialisation: protobuf maps are otherwise written in hash order.
    written: bytes = graph.SerializeToString(deterministic=True)
    return written


def _program(embedder: Embedder, example: torch.Tensor, opset: int, dynamic_size: bool) -> Any:
    """Export; a second time with plain attention where the fused one cannot be decomposed (BEiT, Hiera, Twins)."""
    try:
        return _export(embedder, example, opset, dynamic_size)
    except Exception:  # the exporter wraps whatever went wrong in classes of its own
        fused = [module for module in embedder.modules() if getattr(module, "fused_attn", False)]
        if not fused:
            raise
        for module in fused:
            module.fused_attn = False  # type: ignore[assignment]
        return _export(embedder, example, opset, dynamic_size)


def _export(embedder: Embedder, example: torch.Tensor, opset: int, dynamic_size: bool) -> Any:
    shape = {0: torch.export.Dim("batch")}
    if dynamic_size:
        shape.update({1: torch.export.Dim("height", min=16), 2: torch.export.Dim("width", min=16)})
    with warnings.catch_warnings(), _quiet("torch.onnx", "onnxscript", "torch.export"):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            embedder, (example,), dynamo=True, opset_version=opset, verbose=False,
            input_names=[INPUT], output_names=[OUTPUT, TOKENS] if embedder.tokens else [OUTPUT],
            # Without a named Dim the exporter silently fixes the batch to the example's.
            dynamic_shapes=(shape,),
        )  # fmt: skip
    if program is None:
        raise ExportError("torch's exporter returned nothing")
    return program


def _strip(graph: onnx.ModelProto) -> None:
    """Drop node metadata and doc strings: stack traces with paths of this machine."""
    graph.doc_string = ""
    for part in (graph.graph, *graph.functions):
        part.doc_string = ""
        for node in part.node:
            node.doc_string = ""
            del node.metadata_props[:]
        for value in (
            *getattr(part, "value_info", ()),
            *getattr(part, "input", ()),
            *getattr(part, "output", ()),
        ):
            if hasattr(value, "metadata_props"):
                del value.metadata_props[:]
        if hasattr(part, "metadata_props"):
            del part.metadata_props[:]


class _quiet:  # noqa: N801 (a context manager, used like a function)
    def __init__(self, *names: str) -> None:
        self._loggers = [logging.getLogger(name) for name in names]

    def __enter__(self) -> None:
        self._levels = [logger.level for logger in self._loggers]
        for logger in self._loggers:
            logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        for logger, level in zip(self._loggers, self._levels, strict=True):
            logger.setLevel(level)
