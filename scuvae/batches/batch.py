"""A batch: some cells of a matrix, and what belongs to them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scuvae.batches.sparse_rows import SparseRows, sparse


@dataclass(frozen=True)
class Batch:
    """Some cells of a matrix.

    Parameters
    ----------
    x
        Their values, (cells, genes): sparse for counts, or dense.
    index
        Their row numbers in the fitted matrix: unamortized parameters hang on it.
    size_factor
        Expected total of each cell over the observed genes, in counts; with ``size_of_all`` over
        all of the model's.
    covariates
        What the decoder is told of them beside z, (cells, columns), or None: see
        :class:`scuvae.model.covariates.Design`.
    observed
        Boolean mask over the model's genes where the data lack some, or None.
    on_host
        ``index`` once more, on the host, where that is on another device: spares asking it.
    size_of_all
        Whether the size factor counts genes in that are not observed.
    """

    x: Tensor | SparseRows
    index: Tensor
    size_factor: Tensor
    covariates: Tensor | None = None
    observed: Tensor | None = None
    on_host: Tensor | None = None
    size_of_all: bool = False

    @property
    def host_index(self) -> Tensor:
        """``index`` on the host."""
        return self.index.cpu() if self.on_host is None else self.on_host

    def __len__(self) -> int:
        return self.index.shape[0]

    def take(self, rows: Tensor) -> "Batch":
        """Some of the batch's cells, by position."""
        x = self.x
        x = x.take(rows) if isinstance(x, SparseRows) else x[rows]
        covariates = None if self.covariates is None else self.covariates[rows]
        return replace(
            self,
            x=x,
            index=self.index[rows],
            size_factor=self.size_factor[rows],
            covariates=covariates,
            on_host=None,
        )

    def followed_by(self, other: "Batch") -> "Batch":
        """These cells, then those of another batch of the same model."""
        x, more = self.x, other.x
        covariates = self.covariates
        if covariates is not None and other.covariates is not None:
            covariates = torch.cat([covariates, other.covariates])
        if isinstance(x, SparseRows) or isinstance(more, SparseRows):
            joined: Tensor | SparseRows = sparse(x).followed_by(sparse(more))
        else:
            joined = torch.cat([x, more])
        return replace(
            self,
            x=joined,
            index=torch.cat([self.index, other.index]),
            size_factor=torch.cat([self.size_factor, other.size_factor]),
            covariates=covariates,
            on_host=None,
        )
