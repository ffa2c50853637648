"""R diag(w) Rᵀ of each cell, compiled."""

from typing import Any

import numpy as np
from torch import Tensor

from scuvae.kernels.threads import over_rows
from scuvae.kernels.vector_math import exact, f32, sums


@sums
def _dot(a: Any, b: Any) -> Any:
    total = f32(0.0)
    for g in range(len(a)):
        total += a[g] * b[g]
    return total


@exact
def _times(a: Any, b: Any, out: Any) -> None:
    for g in range(len(a)):
        out[g] = a[g] * b[g]


@exact
def _gram(first: int, last: int, weight: Any, rows: Any, out: Any) -> None:
    n_rows = rows.shape[1]
    weighted = np.empty(rows.shape[2], f32)
    for i in range(first, last):
        for k in range(n_rows):
            _times(rows[i, k], weight[i], weighted)
            for j in range(k + 1):
                out[i, k, j] = out[i, j, k] = _dot(weighted, rows[i, j])


def gram(rows: Tensor, weight: Tensor) -> Tensor:
    """R diag(w) Rᵀ of each cell's rows R, (cells, rows, genes), and weights w, (cells, genes)."""
    out = rows.new_empty(*rows.shape[:2], rows.shape[1])
    over_rows(_gram, weight, rows, out)
    return out
