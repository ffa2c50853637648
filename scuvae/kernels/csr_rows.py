"""Rows of a CSR matrix, gathered by a compiled loop."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from scuvae.kernels.vector_math import exact


@exact
def _gather(starts: Any, col: Any, value: Any, rows: Any) -> tuple[Any, Any, Any]:
    new_starts = np.zeros(len(rows) + 1, np.int64)
    for i in range(len(rows)):
        new_starts[i + 1] = new_starts[i] + starts[rows[i] + 1] - starts[rows[i]]
    new_col, new_value = np.empty(new_starts[-1], col.dtype), np.empty(new_starts[-1], value.dtype)
    for i in range(len(rows)):
        # In loops: a slice that is given a slice takes longer than a row of some hundred numbers.
        at, first = np.uint64(starts[rows[i]]), np.uint64(new_starts[i])
        for k in range(np.uint64(new_starts[i + 1]) - first):
            new_col[first + k] = col[at + k]
        for k in range(np.uint64(new_starts[i + 1]) - first):
            new_value[first + k] = value[at + k]
    return new_starts, new_col, new_value


def gather(
    starts: Tensor, col: Tensor, value: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Some rows of a CSR matrix, as its three arrays."""
    first, second, third = _gather(
        *(array.detach().numpy() for array in (starts, col, value, rows))
    )
    return torch.from_numpy(first), torch.from_numpy(second), torch.from_numpy(third)
