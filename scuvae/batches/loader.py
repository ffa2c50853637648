"""Everything a model sees of a data set, a batch after another."""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from scuvae.batches.batch import Batch
from scuvae.batches.sources.base import Source
from scuvae.batches.sparse_rows import SparseRows
from scuvae.batches.spill import room


class Told(Protocol):
    """What a decoder is told of each cell."""

    def rows(self, index: Tensor) -> Tensor:
        """Of some cells, (cells, columns)."""


class Cells:
    """Everything a model sees of a data set's cells, as batches.

    Parameters
    ----------
    source
        Their values.
    size_factor
        Expected totals over all of the model's genes, (cells,); by default each cell's total over
        the observed ones.
    covariates
        What gives their covariates, or None.
    observed
        Boolean mask over the model's genes, None where all are there.
    """

    def __init__(
        self,
        source: Source,
        *,
        size_factor: Tensor | None = None,
        covariates: Told | None = None,
        observed: Tensor | None = None,
    ) -> None:
        self.source = source
        self.size_factor = source.totals() if size_factor is None else size_factor
        self.size_of_all = size_factor is not None
        self.covariates = covariates
        self.observed = observed

    def __len__(self) -> int:
        return self.source.shape[0]

    def batch(
        self,
        index: Tensor,
        on_host: Tensor | None = None,
        size: int | None = None,
        values: Tensor | SparseRows | None = None,
    ) -> Batch:
        """Some cells, by row number; ``values`` are theirs where they are at hand."""
        return Batch(
            self.source.rows(index, on_host, size) if values is None else values,
            index,
            self.size_factor.index_select(0, index),
            None if self.covariates is None else self.covariates.rows(index),
            self.observed,
            on_host,
            self.size_of_all,
        )

    def room(self, width: int, n_rows: int | None = None) -> np.ndarray:
        """Zeros on the host, a row a cell, or so many; beside cells on disk they are on disk as
        well."""
        if n_rows is None:
            n_rows = len(self)
        if self.source.streamed:
            return room(n_rows, width)
        return torch.zeros(n_rows, width).numpy()

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
        # Batches of as many cells have arrays of one size: see inference/training/cuda_graphs.py.
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
            on_host = self.cells.source.order(on_host, self.batch_size, self.generator)
            index = on_host.to(index.device)
        return zip(index.split(self.batch_size), on_host.split(self.batch_size), strict=True)

    def gather(self, index: Tensor, on_host: Tensor | None = None) -> Batch:
        """One of these batches."""
        size = None if self.sizes is None or not len(index) else int(self.sizes[len(index) - 1])
        return self.cells.batch(index, on_host, size)

    def __iter__(self) -> Iterator[Batch]:
        if not self.cells.source.streamed:
            return (self.gather(*part) for part in self.parts())
        parts = list(self.parts())
        values = self.cells.source.visit([on_host for _, on_host in parts])
        return (self.cells.batch(*part, values=x) for part, x in zip(parts, values, strict=True))
