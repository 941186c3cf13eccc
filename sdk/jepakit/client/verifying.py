"""What both clients' `verify` sends and expects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jepakit.bundles import golden
from jepakit.bundles.bundle import GOLDEN, Bundle, open_bundle
from jepakit.client.models import check_asked
from jepakit.embedding.results import Results
from jepakit.errors import BundleError
from jepakit.sources import ImageList, gather


def golden_request(bundle: Bundle | str | Path, model: str | None) -> tuple[ImageList, str, NDArray[np.float32]]:
    """The bundle's golden inputs, the model to ask for (the bundle's own, unless `model` pins one), torch's vectors."""
    check_asked(model)
    opened = open_bundle(bundle)
    inputs = golden.unpack(opened.read(GOLDEN))
    inputs.check(opened.manifest.preprocess, opened.manifest.embedding.dim)
    name = model or opened.name
    pinned = name if "@" in name else f"{name}@{opened.model_id}"
    return gather(inputs.images, "none"), pinned, inputs.vectors


def judge_golden(results: Results, computed: tuple[str, str], expected: NDArray[np.float32]) -> float:
    found = golden.agreement(results.embeddings().vectors, expected)
    if missed := found.misses(golden.TOLERANCES.get(computed, golden.Tolerance(relative=1e-4))):
        raise BundleError(f"the service computes other vectors than the bundle promises: {missed}")
    return found.relative_error
