"""Tensors that a graph keeps outside itself, in the bundle's `model.safetensors`: found, checked, passed to a runtime.

A protobuf is limited to 2 GB, so a larger model's graph names a file, an offset and a length for each big tensor. Only
one file name is allowed there; it is never followed to the disk, as its verified bytes are passed along with the graph.
The file is safetensors, whose own table repeats what lies where: graph and table must agree in every number.
"""

from __future__ import annotations

import json
import math
import operator
import re
from functools import cache
from mmap import mmap
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jepakit.bundles.bundle import DATA
from jepakit.errors import BundleError

# How a protobuf may encode the key "location" of an external tensor: tag, length, word. Both numbers may be padded and
# hold bits that runtimes drop, so anything that begins like them matches.
_EXTERNAL_KEY = re.compile(rb"(\x0a|\x8a[\x80-\xff]*[\x00-\x7f])(\x08|\x88[\x80-\xff]*[\x00-\x7f])\Z", re.DOTALL)
_EXTERNAL = 1
# ONNX's type number: safetensors' name, numpy's name.
_TYPES = {
    1: ("F32", "<f4"), 2: ("U8", "u1"), 3: ("I8", "i1"), 6: ("I32", "<i4"), 7: ("I64", "<i8"), 9: ("BOOL", "?"),
    10: ("F16", "<f2"), 11: ("F64", "<f8"),
}  # fmt: skip
# The parts of ONNX's messages used here; the parser keeps all other fields unchanged.
_MESSAGES = {
    "Model": {"graph": (7, "Graph")},
    "Graph": {"initializer": (5, "[Tensor]"), "input": (11, "[Value]")},
    "Tensor": {
        "dims": (1, "[int64]"), "data_type": (2, "int32"), "name": (8, "string"), "external_data": (13, "[Entry]"),
        "data_location": (14, "int32"),
    },
    "Entry": {"key": (1, "string"), "value": (2, "string")},
    "Value": {"name": (1, "string"), "type": (2, "Type")},
    "Type": {"tensor_type": (1, "TensorType")},
    "TensorType": {"elem_type": (1, "int32"), "shape": (2, "Shape")},
    "Shape": {"dim": (1, "[Dim]")},
    "Dim": {"dim_value": (1, "int64")},
}  # fmt: skip


class Placed(NamedTuple):
    """Where a tensor lies in a safetensors file: its type (safetensors' name), shape, byte offset and length."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


def check_external(graph: bytes, data: bytes | None) -> None:
    """BundleError unless `data`, the bytes of model.safetensors, really holds every tensor outside the graph."""
    if locations := _count_locations(graph):
        _external_tensors(_parse(graph), locations, data)


def as_inputs(graph: bytes, data: bytes) -> tuple[bytes, dict[str, NDArray[Any]]]:
    """The graph with each external tensor turned into an input, and these tensors as views of `data`.

    For a runtime that would look for external tensors on the disk. Raises BundleError as `check_external` does.
    """
    model = _parse(graph)
    tensors = {tensor.name: tensor for tensor in _external_tensors(model, _count_locations(graph), data)}
    arrays = {}
    for name, placed in placed_tensors(data).items():
        if name in tensors:
            kind = dict(_TYPES.values())[placed.dtype]
            count = math.prod(placed.shape)
            arrays[name] = np.frombuffer(data, kind, count, placed.offset).reshape(placed.shape)
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in tensors]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    for name, tensor in tensors.items():
        value = model.graph.input.add(name=name)
        value.type.tensor_type.elem_type = tensor.data_type
        for size in tensor.dims:
            value.type.tensor_type.shape.dim.add(dim_value=size)
    return model.SerializeToString(), arrays


def placed_tensors(data: bytes | mmap) -> dict[str, Placed]:
    """The table of a safetensors file, by tensor name. Raises BundleError for bytes of anything else."""
    start = 8 + int.from_bytes(data[:8], "little")
    try:
        table = json.loads(data[8:start])
        placed = {
            name: Placed(entry["dtype"], tuple(entry["shape"]), start + first, last - first)
            for name, entry in table.items()
            if name != "__metadata__"
            for first, last in [map(operator.index, entry["data_offsets"])]
        }
        if any(one.offset < start or one.length < 0 for one in placed.values()):
            raise ValueError("tensors outside the data")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BundleError(f"{DATA} is not a safetensors file: export the bundle again") from None
    return placed


def _external_tensors(model: Any, locations: int, data: bytes | None) -> list[Any]:
    """The graph's external initializers, each checked; BundleError if one is wrong or there are more elsewhere."""
    external = [tensor for tensor in model.graph.initializer if tensor.external_data or tensor.data_location]
    if len(external) != locations:
        raise BundleError(
            f"the graph keeps tensors in another file in {locations} places, of which {len(external)} are weights: "
            "do not use this bundle, jepakit did not make it"
        )
    table = None if data is None else placed_tensors(data)
    for tensor in external:
        _check(tensor, table, 0 if data is None else len(data))
    return external


def _check(tensor: Any, table: dict[str, Placed] | None, size: int) -> None:
    entries = [(entry.key, entry.value) for entry in tensor.external_data]
    told = dict(entries)
    location = told.get("location")
    if location != DATA:
        raise BundleError(
            f"the graph keeps tensor {tensor.name[:80]!r} in another file, {str(location)[:80]!r}: a bundle's graph holds "
            f"its tensors itself or in {DATA}; export it again"
        )
    if table is None:
        raise BundleError(f"the graph keeps its tensors in {DATA}, which the bundle lacks: export it again")
    placed = table.get(tensor.name)
    if placed is None:
        raise BundleError(
            f"{DATA} has no tensor {tensor.name[:80]!r}, which the graph asks for: export the bundle again"
        )
    dtype, numpys = _TYPES.get(tensor.data_type, ("", "V0"))
    needed = math.prod(tensor.dims) * np.dtype(numpys).itemsize
    agree = (
        tensor.data_location == _EXTERNAL
        and sorted(entries) == [("length", str(placed.length)), ("location", DATA), ("offset", str(placed.offset))]
        and (dtype, tuple(tensor.dims)) == (placed.dtype, placed.shape)
        and min(tensor.dims, default=0) >= 0
        and placed.length == needed
        and placed.offset + placed.length <= size
    )
    if not agree:
        raise BundleError(
            f"the graph and {DATA} disagree about tensor {tensor.name[:80]!r} (type, shape, offset or length): export the "
            "bundle again"
        )


def _count_locations(graph: bytes) -> int:
    words = re.finditer(b"location", graph)
    return sum(bool(_EXTERNAL_KEY.search(graph[max(0, word.start() - 32) : word.start()])) for word in words)


def _parse(graph: bytes) -> Any:
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        return _model_class().FromString(graph)
    except DecodeError:
        raise BundleError("the graph cannot be read: export the bundle again") from None


@cache
def _model_class() -> Any:
    """A class for the few ONNX fields needed here: ONNX Runtime brings protobuf, so that a service needs no onnx."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory  # type: ignore[import-untyped]

    described = descriptor_pb2.FileDescriptorProto(name="jepakit/onnx.proto", package="jepakit", syntax="proto2")
    field_types = descriptor_pb2.FieldDescriptorProto
    scalars = {"int32": field_types.TYPE_INT32, "int64": field_types.TYPE_INT64, "string": field_types.TYPE_STRING}
    for name, fields in _MESSAGES.items():
        message = described.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            plain = kind.strip("[]")
            added = message.field.add(name=field, number=number)
            added.label = field_types.LABEL_REPEATED if kind != plain else field_types.LABEL_OPTIONAL
            if plain in scalars:
                added.type = scalars[plain]
            else:
                added.type, added.type_name = field_types.TYPE_MESSAGE, f".jepakit.{plain}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(described)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("jepakit.Model"))
