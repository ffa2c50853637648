"""A dense array in an .h5ad file or a .zarr store."""

from pathlib import Path
from typing import Any

import numpy as np

from scuvae.batches.stored.base import Stored, root_of


class DenseArray(Stored):
    """An ``h5py.Dataset`` or a ``zarr.Array`` of two dimensions."""

    sparse = False

    @classmethod
    def takes(cls, x: Any) -> bool:
        library = type(x).__module__.split(".")[0]
        return library in ("h5py", "zarr") and getattr(x, "ndim", 0) == 2

    def __init__(self, x: Any) -> None:
        self.array = x
        self.shape = (int(x.shape[0]), int(x.shape[1]))
        self.dtype = np.dtype(x.dtype)
        self.per_row = float(self.shape[1])
        chunks = getattr(x, "chunks", None)
        self.chunk = chunks[0] if chunks else 1

    def read(self, first: int, last: int) -> np.ndarray:
        return np.asarray(self.array[first:last])

    def edges(self, n_rows: int, most: int | None = None) -> np.ndarray:
        return self.close_to(n_rows, most, self.chunk)

    def path(self) -> Path | None:
        return root_of(self.array)
