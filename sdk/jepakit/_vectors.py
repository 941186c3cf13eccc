"""Arithmetic on vectors that several modules share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jepakit._progress import Steps

AT_A_TIME = 4096
"""The most vectors that are worked on at a time, so that memory grows with what is kept, not with what is computed."""
_QUERIES = 256
"""The most queries compared with these at a time; each pair takes about 12 bytes, and 48 more if it may be among the nearest."""


def blocks(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `count` rows in order."""
    return (slice(first, min(first + size, count)) for first in range(0, count, size))


def unit_length(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """`vectors` [N, D] scaled to length 1; zeros stay zeros."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: NDArray[np.float64] = vectors / np.where(lengths > 0, lengths, 1)
    return unit


def most_similar(queries: NDArray[Any], vectors: NDArray[Any], k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """For each query [Q, D], the k most similar vectors [N, D]: indices and cosines [Q, k], most similar first.

    Ties go to the lower index. Memory grows with Q · k only; many queries show progress.
    """
    places, cosines = np.empty((len(queries), k), np.int64), np.empty((len(queries), k), np.float32)
    with Steps(len(queries), what="query", progress=len(queries) > _QUERIES) as bar:
        for block in blocks(len(queries), _QUERIES):
            places[block], cosines[block] = _most_similar(unit_length(queries[block].astype(np.float64)), vectors, k)
            bar.update(block.stop)
    return places, cosines


def _most_similar(
    queries: NDArray[np.float64], vectors: NDArray[Any], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    best, best_cosines = np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0), np.float32)
    for rows in blocks(len(vectors), AT_A_TIME):
        block = unit_length(vectors[rows].astype(np.float64))
        # In double precision, so that equal vectors get exactly the same float32 cosine.
        cosines = (queries @ block.T).astype(np.float32)
        if best.shape[1] == k:
            is_better = cosines > best_cosines[:, -1:]
        else:
            last = len(block) - min(k, len(block))
            is_better = cosines >= np.partition(cosines, last, axis=1)[:, last : last + 1]
        better = np.nonzero(is_better)
        of_query = np.concatenate([np.repeat(np.arange(len(queries)), best.shape[1]), better[0]])
        places = np.concatenate([best.ravel(), rows.start + better[1]])
        near = np.concatenate([best_cosines.ravel(), cosines[better]])
        order = np.lexsort((places, -near, of_query))
        starts = np.searchsorted(of_query[order], np.arange(len(queries)))
        chosen = order[starts[:, None] + np.arange(min(k, best.shape[1] + len(block)))]
        best, best_cosines = places[chosen], near[chosen]
    return best, best_cosines


def float32_tuple(values: NDArray[Any]) -> tuple[float, ...]:
    """Numbers [D] rounded to float32, as stored in a bundle's records."""
    return tuple(map(float, values.astype(np.float32)))
