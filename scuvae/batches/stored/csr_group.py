"""A CSR matrix in an .h5ad file or a .zarr store, as anndata's backed mode hands it out."""

from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse as sp

from scuvae.batches.stored.base import Stored, root_of


class CSRGroup(Stored):
    """What ``anndata.io.sparse_dataset`` makes of a group with ``data``, ``indices``, ``indptr``.

    Row starts are kept in memory, as the file has them: four or eight bytes a cell.
    """

    sparse = True

    @classmethod
    def takes(cls, x: Any) -> bool:
        return getattr(x, "format", None) == "csr" and hasattr(x, "group")

    def __init__(self, x: Any) -> None:
        self.group = x.group
        self.shape = (int(x.shape[0]), int(x.shape[1]))
        self.values, self.columns = self.group["data"], self.group["indices"]
        self.dtype = np.dtype(self.values.dtype)
        self.starts = np.asarray(self.group["indptr"][:])
        chunk = getattr(self.values, "chunks", None)
        self.per_row = max(1.0, self.starts[-1] / max(1, self.shape[0]))
        self.chunk = chunk[0] / self.per_row if chunk else 1.0

    def read(self, first: int, last: int) -> Any:
        starts = self.starts[first : last + 1].astype(np.int64)
        here = slice(int(starts[0]), int(starts[-1]))
        arrays = self.values[here], self.columns[here], starts - starts[0]
        return sp.csr_matrix(arrays, shape=(last - first, self.shape[1]))

    def edges(self, n_rows: int, most: int | None = None) -> np.ndarray:
        return self.close_to(n_rows, most, self.chunk)

    def path(self) -> Path | None:
        return root_of(self.group)
