"""Matrices in memory or on a device; they are never densified."""

import logging
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy import sparse as sp
from torch import Tensor

from scuvae.batches.sources.base import Source
from scuvae.batches.sparse_rows import SparseRows

logger = logging.getLogger("scuvae")

# Cells that a total is taken over at once.
_BLOCK = 2**16


class DenseSource(Source):
    """A dense array, one copy at the most."""

    resident = True

    @classmethod
    def takes(cls, x: Any) -> bool:
        return isinstance(x, np.ndarray)

    def __init__(self, x: np.ndarray, device: torch.device) -> None:
        self.shape = (x.shape[0], x.shape[1])
        self.x = torch.as_tensor(np.array(x, np.float32, order="C"), device=device)

    def rows(self, index: Tensor, on_host: Tensor | None = None, size: int | None = None) -> Tensor:
        return self.x.index_select(0, index)

    def totals(self) -> Tensor:
        return self.x.sum(1)


class SparseSource(Source):
    """A CSR matrix, its three arrays on the device; on a CPU the matrix's own, not copies.

    Where they would take more than half of a GPU's free memory, indices and values stay on the
    host in pinned memory, and those of a batch are sent when it is asked for.
    """

    @classmethod
    def takes(cls, x: Any) -> bool:
        return bool(sp.issparse(x))

    def __init__(self, x: Any, device: torch.device) -> None:
        x = sp.csr_array(x)
        if not x.data.all():  # likelihoods take every entry for a nonzero
            x = x.copy()
            x.eliminate_zeros()
        self.shape = (x.shape[0], x.shape[1])
        self.device = device
        starts = _shared(x.indptr, np.int64)
        self.host_lengths = starts.diff()
        columns, values = _shared(x.indices, np.int32), _shared(x.data, np.float32)
        self.resident = fits(8 * len(values), device)
        if self.resident:
            starts, columns, values = starts.to(device), columns.to(device), values.to(device)
        else:
            columns, values = columns.pin_memory(), values.pin_memory()
        self.matrix = SparseRows(starts, columns, values, self.shape[1])

    def rows(
        self, index: Tensor, on_host: Tensor | None = None, size: int | None = None
    ) -> SparseRows:
        if self.resident:
            return self.matrix.take(index, size)
        found = self.matrix.take(index.cpu() if on_host is None else on_host)
        return found.to(self.device)

    def sizes(self, on_host: Tensor) -> Tensor | None:
        if self.device.type == "cpu" or not self.resident:
            return None
        return self.host_lengths[on_host].sort(descending=True).values.cumsum(0)

    def totals(self) -> Tensor:
        # By blocks of cells: a row number for every nonzero would outweigh the matrix.
        starts, values = self.matrix.starts, self.matrix.value
        out = values.new_zeros(self.shape[0])
        ends = [*starts[::_BLOCK].tolist(), len(values)]
        for k, (first, last) in enumerate(pairwise(ends)):
            cells = slice(k * _BLOCK, (k + 1) * _BLOCK)
            length = starts[k * _BLOCK : (k + 1) * _BLOCK + 1].diff()
            row = torch.repeat_interleave(length)
            out[cells].index_add_(0, row, values[first:last])
        return out.to(self.device)


def fits(n_bytes: int, device: torch.device) -> bool:
    """Whether a matrix of so many bytes goes to the device, which is logged with the sizes."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    fits = n_bytes <= free / 2
    logger.info(
        "the matrix takes %.2f GB, %s has %.2f GB free: it %s",
        n_bytes / 1e9,
        device,
        free / 1e9,
        "moves there" if fits else "stays in pinned memory, and batches are sent one by one",
    )
    return fits


def _shared(values: np.ndarray, dtype: Any) -> Tensor:
    """A tensor over the same memory where the type is right: a fit only reads its matrix."""
    values = np.ascontiguousarray(values, dtype)
    return torch.from_numpy(values if values.flags.writeable else values.copy())
