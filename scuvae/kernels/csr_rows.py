"""Rows of a CSR matrix, gathered by compiled loops, and its entries made small."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from scuvae.kernels.vector_math import exact, f32

# A count that says to look for the real one among those that one byte does not hold.
ESCAPE = 255


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


@exact
def _narrow(col: Any, value: Any, small_col: Any, small: Any) -> int:
    n_large = 0
    for k in range(len(value)):
        small_col[k] = col[k]
        large = value[k] >= f32(ESCAPE)
        small[k] = ESCAPE if large else np.uint8(value[k])
        n_large += large
    return n_large


@exact
def _widen(
    starts: Any, col: Any, small: Any, large_at: Any, large: Any, rows: Any
) -> tuple[Any, Any, Any]:
    new_starts = np.zeros(len(rows) + 1, np.int64)
    for i in range(len(rows)):
        new_starts[i + 1] = new_starts[i] + starts[rows[i] + 1] - starts[rows[i]]
    new_col, new_value = np.empty(new_starts[-1], np.int32), np.empty(new_starts[-1], f32)
    for i in range(len(rows)):
        at, first = np.uint64(starts[rows[i]]), np.uint64(new_starts[i])
        n = np.uint64(new_starts[i + 1]) - first
        for k in range(n):
            new_col[first + k] = col[at + k]
        n_large = 0
        for k in range(n):
            new_value[first + k] = small[at + k]
            n_large += small[at + k] == ESCAPE
        if n_large and len(large):
            j = np.searchsorted(large_at, np.int64(at))
            for k in range(j, j + n_large):
                new_value[first + (np.uint64(large_at[k]) - at)] = large[k]
    return new_starts, new_col, new_value


def gather(
    starts: Tensor, col: Tensor, value: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Some rows of a CSR matrix, as its three arrays."""
    first, second, third = _gather(
        *(array.detach().numpy() for array in (starts, col, value, rows))
    )
    return torch.from_numpy(first), torch.from_numpy(second), torch.from_numpy(third)


def narrow(col: np.ndarray, value: np.ndarray, small_col: np.ndarray, small: np.ndarray) -> int:
    """Whole counts ≥ 0, float32, into ``small``, a byte each, and columns into ``small_col``.

    Counts from :data:`ESCAPE` on become that; returned is how many they are.
    """
    return int(_narrow(col, value, small_col, small))


def widen(
    starts: np.ndarray,
    col: np.ndarray,
    small: np.ndarray,
    large_at: np.ndarray,
    large: np.ndarray,
    rows: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Some rows of a CSR matrix of such counts, as its three arrays in their usual types.

    ``large_at``, ascending, are the places of those that ``small`` does not hold, ``large`` they
    themselves. Where there are none ``small`` may be of any type.
    """
    first, second, third = _widen(starts, col, small, large_at, large, rows.numpy())
    return torch.from_numpy(first), torch.from_numpy(second), torch.from_numpy(third)
