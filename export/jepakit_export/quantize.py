"""fp32 graph → int8 graph for CPUs, by the method that costs each kind of network the least accuracy.

If most weights are in matrix products (ViTs, ConvNeXt), the input of each product is quantised at run time by its own
range: this needs no calibration, and was better than fixed ranges on every transformer tried. If most are in
convolutions, ranges are measured on images. Attention's own products, whose factors are both computed, stay in float:
quantising them lets ONNX Runtime fuse an 8-bit softmax, which silently gave a cosine of 0.76 on a ViT.
"""

from __future__ import annotations

import math
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir

from jepakit.bundles.manifest import INPUT
from jepakit.images import Pixels
from jepakit.inference.ort import import_ort
from jepakit.sources import evenly_spread
from jepakit_export.convert import is_large, only_errors

MOST_CALIBRATED = 128
_MATRICES = ("MatMul", "Gemm")


def to_int8(model: ir.Model, images: Pixels) -> ir.Model:
    """The graph with 8-bit weights and products; `images` [N, H, W, C] in the graph's own dtype calibrate convolutions."""
    import_ort()
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder, only_errors(""):  # the quantiser logs its advice to the root logger
        given, prepared, written = (Path(folder) / name for name in ("fp32.onnx", "prepared.onnx", "int8.onnx"))
        # Weights that do not fit into the graph are stored outside it, as the quantiser itself does for a large model.
        outside = is_large(model)
        ir.save(model, given, external_data="fp32.data" if outside else None)
        quant_pre_process(
            str(given),
            str(prepared),
            skip_symbolic_shape=True,
            save_as_external_data=outside,
            all_tensors_to_one_file=True,
            external_data_location="prepared.data" if outside else None,
        )
        graph = onnx.load(str(prepared), load_external_data=False).graph
        if _mostly_matrices(graph):
            quantize_dynamic(
                prepared,
                written,
                list(_MATRICES),
                per_channel=True,
                weight_type=QuantType.QInt8,
                use_external_data_format=outside,
            )
        else:
            some = images[evenly_spread(len(images), MOST_CALIBRATED)]
            batches = ({INPUT: np.ascontiguousarray(some[at : at + 8])} for at in range(0, len(some), 8))
            quantize_static(
                prepared,
                written,
                SimpleNamespace(get_next=partial(next, batches, None)),  # a CalibrationDataReader
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                use_external_data_format=outside,
                op_types_to_quantize=["Conv", *_MATRICES],
                nodes_to_exclude=_computed_on_both_sides(graph),
            )
        return ir.external_data.load_to_model(ir.load(written))


def _mostly_matrices(graph: onnx.GraphProto) -> bool:
    """Whether more weights lie in matrix products than in convolutions."""
    size = {tensor.name: math.prod(tensor.dims) for tensor in graph.initializer}

    def weights(*kinds: str) -> int:
        return sum(size.get(node.input[1], 0) for node in graph.node if node.op_type in kinds)

    return weights(*_MATRICES) > weights("Conv")


def _computed_on_both_sides(graph: onnx.GraphProto) -> list[str]:
    """Names of the matrix products whose second factor is not a weight."""
    weights = {tensor.name for tensor in graph.initializer}
    return [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] not in weights]
