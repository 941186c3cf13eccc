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

INPUT, OUTPUT = "images", "embeddings"


def to_onnx(embedder: Embedder, example_BHWC: torch.Tensor, *, opset: int, metadata: dict[str, str]) -> bytes:
    """The graph `images` uint8 [batch, H, W, C] → `embeddings` float32 [batch, D], as one ONNX file's bytes.

    metadata  written into the file, so that a stray model.onnx still says what it is
    """
    program = _program(embedder, example_BHWC, opset)
    buffer = io.BytesIO()
    program.save(buffer, external_data=False)
    graph = onnx.load_model_from_string(buffer.getvalue())
    _strip(graph)
    onnx.helper.set_model_props(graph, metadata)
    onnx.checker.check_model(graph)
    # Deterministic serialisation: protobuf maps are otherwise written in hash order.
    data: bytes = graph.SerializeToString(deterministic=True)
    return data


def _program(embedder: Embedder, example: torch.Tensor, opset: int) -> Any:
    """Export; a second time with plain attention where the fused one cannot be decomposed (BEiT, Hiera, Twins)."""
    try:
        return _export(embedder, example, opset)
    except Exception:  # the exporter wraps whatever went wrong in classes of its own
        fused = [module for module in embedder.modules() if getattr(module, "fused_attn", False)]
        if not fused:
            raise
        for module in fused:
            module.fused_attn = False  # type: ignore[assignment]
        return _export(embedder, example, opset)


def _export(embedder: Embedder, example: torch.Tensor, opset: int) -> Any:
    with warnings.catch_warnings(), _quiet("torch.onnx", "onnxscript", "torch.export"):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            embedder, (example,), dynamo=True, opset_version=opset, verbose=False,
            input_names=[INPUT], output_names=[OUTPUT],
            # Without a named Dim the exporter silently fixes the batch to the example's.
            dynamic_shapes=({0: torch.export.Dim("batch")},),
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
