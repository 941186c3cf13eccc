"""Arithmetic on vectors that several modules share."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def unit_length(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """`vectors` [N, D] scaled to length 1; zeros stay zeros."""
    unit: NDArray[np.float64] = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return unit


def float32_tuple(values: NDArray[Any]) -> tuple[float, ...]:
    """Numbers [D] rounded to float32, as the records of a bundle keep them."""
    return tuple(map(float, values.astype(np.float32)))
