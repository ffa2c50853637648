"""A dask array, such as ``anndata.experimental.read_lazy`` makes."""

from typing import Any

import numpy as np
from scipy import sparse as sp

from scuvae.batches.stored.base import Stored


class DaskArray(Stored):
    """A dask array of numpy or scipy blocks, whose runs of rows are its chunks.

    What is asked for is computed by the thread that asks, so that chunks in memory are bounded.
    """

    @classmethod
    def takes(cls, x: Any) -> bool:
        # Or a part of one, as a view of an AnnData has it.
        kinds = (kind.__module__.split(".")[0] for kind in type(x).__mro__)
        return "dask" in kinds and getattr(x, "ndim", 0) == 2

    def __init__(self, x: Any) -> None:
        if not all(np.isfinite(size) for size in x.shape):
            raise ValueError(
                f"a dask array of shape {x.shape} does not say how many cells it has: call its "
                "compute_chunk_sizes() first"
            )
        self.array = x
        self.shape = (int(x.shape[0]), int(x.shape[1]))
        self.dtype = np.dtype(x.dtype)
        self.ends = np.cumsum(x.chunks[0])
        # What an array says it has may be another kind than what is computed of it.
        self.sparse = sp.issparse(x[:1].compute(scheduler="synchronous"))
        # Of how many values a sparse one has nothing is known.
        self.per_row = self.shape[1] / (10 if self.sparse else 1)
        self.gap = int(max(x.chunks[0]))  # whole chunks are computed anyway

    def read(self, first: int, last: int) -> Any:
        found = self.array[first:last].compute(scheduler="synchronous")
        return sp.csr_matrix(found) if self.sparse else np.asarray(found)

    def edges(self, n_rows: int, most: int | None = None) -> np.ndarray:
        # The last end of a chunk in each stretch of n_rows.
        stretch = self.ends // max(1, n_rows)
        last = np.append(stretch[1:] != stretch[:-1], True)
        return np.unique(np.append(0, self.ends[last]))
