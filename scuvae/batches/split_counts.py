"""Counts split in two, molecule by molecule."""

from typing import Any

import numpy as np
from scipy import sparse as sp

# Whole numbers up to here are exact in float32.
_EXACT = 2**24


def split_counts(matrix: Any, fraction: float, generator: np.random.Generator) -> tuple[Any, Any]:
    """Two matrices that sum to ``matrix``; counts are drawn row by row, zeros not at all."""
    if not sp.issparse(matrix):
        there = matrix > 0
        counts = matrix[there].astype(np.int64)
        taken = generator.binomial(counts, fraction)
        parts = []
        for values in (taken, counts - taken):
            part = np.zeros(matrix.shape, _dtype(matrix.dtype, counts))
            part[there] = values
            parts.append(part)
        return parts[0], parts[1]
    there = matrix.data > 0
    counts = matrix.data[there].astype(np.int64)
    # Entries before each row's first, but for zeros that are stored.
    indptr = np.concatenate([[0], np.cumsum(there)])[matrix.indptr].astype(matrix.indptr.dtype)
    indices = matrix.indices[there]
    taken = generator.binomial(counts, fraction)
    dtype = _dtype(matrix.dtype, counts)
    first, second = (
        sp.csr_array((values.astype(dtype), indices.copy(), indptr.copy()), shape=matrix.shape)
        for values in (taken, counts - taken)
    )
    first.eliminate_zeros()
    second.eliminate_zeros()
    return first, second


def _dtype(dtype: np.dtype, counts: np.ndarray) -> np.dtype:
    """The counts' own, if every smaller count is exact in it."""
    if dtype.kind != "f":
        return dtype
    large = counts.size > 0 and counts.max() > _EXACT
    return np.promote_types(dtype, np.float64 if large else np.float32)
