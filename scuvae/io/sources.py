"""Matrices as batches of cells, gathered on the device; the matrix is never densified."""

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


# Cells that a total is taken over at once.
_BLOCK = 2**16


class Source(ABC):
    """The values of some cells by row number."""

    shape: tuple[int, int]

    @abstractmethod
    def rows(self, index: Tensor) -> Tensor | SparseRows:
        """Values of the rows ``index``, in that order."""

    @abstractmethod
    def totals(self) -> Tensor:
        """Each cell's total, (cells,)."""


class DenseSource(Source):
    """A dense array, one copy at the most."""

    def __init__(self, x: np.ndarray, device: torch.device) -> None:
        self.shape = (x.shape[0], x.shape[1])
        self.x = torch.as_tensor(np.array(x, np.float32, order="C"), device=device)

    def rows(self, index: Tensor) -> Tensor:
        return self.x[index]

    def totals(self) -> Tensor:
        return self.x.sum(1)


class SparseSource(Source):
    """A CSR matrix, its three arrays on the device; on a CPU the matrix's own, not copies."""

    def __init__(self, x: Any, device: torch.device) -> None:
        x = sp.csr_array(x)
        if not x.data.all():  # likelihoods take every entry for a nonzero
            x = x.copy()
            x.eliminate_zeros()
        self.shape = (x.shape[0], x.shape[1])
        self.starts = _shared(x.indptr, np.int64).to(device)
        self.columns = _shared(x.indices, np.int32).to(device)
        self.values = _shared(x.data, np.float32).to(device)

    def rows(self, index: Tensor) -> SparseRows:
        start = self.starts.index_select(0, index)
        length = self.starts.index_select(0, index + 1) - start
        row = torch.repeat_interleave(length)
        # Where a row's entries lie in the matrix, less where they lie in the batch.
        shift = start - (length.cumsum(0) - length)
        at = torch.arange(len(row), device=row.device).add_(shift.index_select(0, row))
        return SparseRows(
            row,
            self.columns.index_select(0, at).long(),
            self.values.index_select(0, at),
            (len(index), self.shape[1]),
        )

    def totals(self) -> Tensor:
        # By blocks of cells: a row number for every nonzero would outweigh the matrix.
        out = self.values.new_zeros(self.shape[0])
        ends = self.starts[:: _BLOCK].tolist() + [len(self.values)]
        for k, (first, last) in enumerate(pairwise(ends)):
            cells = slice(k * _BLOCK, (k + 1) * _BLOCK)
            length = self.starts[k * _BLOCK : (k + 1) * _BLOCK + 1].diff()
            row = torch.repeat_interleave(length)
            out[cells].index_add_(0, row, self.values[first:last])
        return out


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
        Expected totals, (cells,); by default each cell's total.
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
        self.codes = codes
        self.n_categories = n_categories
        self.observed = observed

    def __len__(self) -> int:
        return self.source.shape[0]

    def batch(self, index: Tensor) -> Batch:
        covariates = None
        if self.codes is not None:
            covariates = F.one_hot(self.codes[index], self.n_categories).to(self.size_factor)
        return Batch(
            self.source.rows(index), index, self.size_factor[index], covariates, self.observed
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
        self.batch_size = batch_size
        self.generator = generator

    def __iter__(self) -> Iterator[Batch]:
        index = self.index
        if self.generator is not None and self.batch_size < len(index):
            order = torch.randperm(len(index), generator=self.generator)
            index = index[order.to(index.device)]
        for part in index.split(self.batch_size):
            yield self.cells.batch(part)
