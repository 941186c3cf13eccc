"""The exporter's promise, checked: ONNX Runtime gives torch's vectors, whatever the batch."""

from __future__ import annotations

import numpy as np
import torch

from jepakit import golden
from jepakit.backbone import Embedder
from jepakit.bundle import Manifest
from jepakit.errors import ExportError
from jepakit.images import Pixels
from jepakit.session import Session

BATCH_SIZES = (1, 2, 7, 33)


def torch_vectors(embedder: Embedder, images: Pixels) -> golden.Vectors:
    """What torch computes, float32 [N, D]."""
    with torch.inference_mode():
        vectors: golden.Vectors = embedder(torch.from_numpy(images)).numpy()
    if not np.isfinite(vectors).all():
        raise ExportError("the backbone's own vectors are not finite: its weights are damaged")
    return vectors


def check(graph: bytes, manifest: Manifest, expected: golden.Golden) -> float:
    """The worst relative error to torch over the golden inputs at several batch sizes (1, 2, 7 and 33).

    Raises ExportError above the tolerance table's limit, or when the graph has fixed the batch size.
    """
    session = Session(graph, manifest, provider="cpu")
    limit = golden.RELATIVE_TOLERANCE["fp32", "cpu"]
    images, worst = expected.inputs(manifest.preprocess), 0.0
    for size in BATCH_SIZES:
        rows = np.arange(size) % len(images)
        try:
            got = session.run(images[rows])
        except Exception as error:  # ONNX Runtime's exceptions have no common base worth naming
            raise ExportError(f"the exported graph fails at batch size {size}: {str(error).splitlines()[0]}") from None
        worst = max(worst, golden.relative_error(got, expected.vectors[rows]))
    if worst > limit:
        raise ExportError(
            f"the exported graph does not reproduce torch: relative error {worst:.2g}, at most {limit:g} is allowed"
        )
    return worst
