"""Matrices as batches of cells, gathered on the device; the matrix is never densified."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy import sparse as sp
from torch import Tensor
from torch.nn import functional as F

from scuvae.model import Batch, SparseRows

logger = logging.getLogger("scuvae")

# Cells that a total is taken over at once.
_BLOCK = 2**16


class Source(ABC):
    """The values of some cells by row number."""

    shape: tuple[int, int]

    resident: bool
    """Whether all values are on the device, so that the host has no part in gathering rows."""

    @abstractmethod
    def rows(
        self, index: Tensor, on_host: Tensor | None = None, size: int | None = None
    ) -> Tensor | SparseRows:
        """Values of the rows ``index``, in that order.

        ``on_host`` is ``index`` on the host; ``size`` a number of nonzeros that the rows do not
        exceed, by which a GPU need not be asked for theirs.
        """

    def sizes(self, on_host: Tensor) -> Tensor | None:
        """The most nonzeros that 1, 2, … of these rows have together, where that is of use."""
        return None

    @abstractmethod
    def totals(self) -> Tensor:
        """Each cell's total, (cells,)."""


class DenseSource(Source):
    """A dense array, one copy at the most."""

    resident = True

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
        self.resident = _fits(8 * len(values), device)
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
        parts = (found.starts, found.col, found.value)
        starts, columns, values = (
            part.pin_memory().to(self.device, non_blocking=True) for part in parts
        )
        return SparseRows(starts, columns, values, found.n_vars)

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


def _fits(n_bytes: int, device: torch.device) -> bool:
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


SOURCES: dict[str, Callable[[Any, torch.device], Source]] = {
    "dense": DenseSource,
    "sparse": SparseSource,
}


def source_of(x: Any, device: torch.device) -> Source:
    """The source for a matrix in memory, sparse or dense."""
    return SOURCES["sparse" if sp.issparse(x) else "dense"](x, device)


class Cells:
    """Everything a model sees of a data set's cells, as batches.

    Parameters
    ----------
    source
        Their values.
    size_factor
        Expected totals over all of the model's genes, (cells,); by default each cell's total over
        the observed ones.
    codes, n_categories
        Batch membership as integers, and how many batches there are.
    observed
        Boolean mask over the model's genes, None where all are there.
    """

    def __init__(
        self,
        source: Source,
        *,
        size_factor: Tensor | None = None,
        codes: Tensor | None = None,
        n_categories: int = 0,
        observed: Tensor | None = None,
    ) -> None:
        self.source = source
        self.size_factor = source.totals() if size_factor is None else size_factor
        self.size_of_all = size_factor is not None
        self.codes = codes
        self.n_categories = n_categories
        self.observed = observed

    def __len__(self) -> int:
        return self.source.shape[0]

    def batch(self, index: Tensor, on_host: Tensor | None = None, size: int | None = None) -> Batch:
        covariates = None
        if self.codes is not None:
            covariates = F.one_hot(self.codes[index], self.n_categories).to(self.size_factor)
        return Batch(
            self.source.rows(index, on_host, size),
            index,
            self.size_factor.index_select(0, index),
            covariates,
            self.observed,
            on_host,
            self.size_of_all,
        )

    def loader(
        self, rows: Tensor, batch_size: int, generator: torch.Generator | None = None
    ) -> "Loader":
        return Loader(self, rows, batch_size, generator)


class Loader:
    """An iteration is an epoch over ``rows``: in random order with a generator, else in order."""

    def __init__(
        self, cells: Cells, rows: Tensor, batch_size: int, generator: torch.Generator | None = None
    ) -> None:
        self.cells = cells
        self.index = rows
        self.on_host = rows.cpu()
        self.batch_size = batch_size
        self.generator = generator
        # Batches of as many cells have arrays of one size: see inference/replays.py.
        self.sizes = cells.source.sizes(self.on_host)

    @property
    def device(self) -> torch.device:
        return self.index.device

    @property
    def resident(self) -> bool:
        """Whether :meth:`gather` does all that it does on the device."""
        return self.cells.source.resident

    def parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The row numbers of an epoch's batches, on the device and on the host."""
        index, on_host = self.index, self.on_host
        if self.generator is not None and self.batch_size < len(index):
            on_host = on_host[torch.randperm(len(index), generator=self.generator)]
            index = on_host.to(index.device)
        return zip(index.split(self.batch_size), on_host.split(self.batch_size), strict=True)

    def gather(self, index: Tensor, on_host: Tensor | None = None) -> Batch:
        """One of these batches."""
        size = None if self.sizes is None or not len(index) else int(self.sizes[len(index) - 1])
        return self.cells.batch(index, on_host, size)

    def __iter__(self) -> Iterator[Batch]:
        return (self.gather(*part) for part in self.parts())
