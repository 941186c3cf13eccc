"""An evenly spread sample of a list."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def evenly_spread(count: int, most: int) -> NDArray[np.intp]:
    """At most `most` of the indices 0 … count - 1, including the first and the last if there are two or more."""
    return np.linspace(0, count - 1, min(count, most)).astype(np.intp)
