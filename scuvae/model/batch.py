"""What a model sees of the data: a batch of cells, its counts as triplets or dense."""

from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor


@dataclass(frozen=True)
class SparseRows:
    """The nonzeros of a cells × genes block, in row order.

    ``row`` and ``col`` are int64, ``value`` is floating point; all have one entry a nonzero.
    """

    row: Tensor
    col: Tensor
    value: Tensor
    shape: tuple[int, int]

    @classmethod
    def from_dense(cls, x: Tensor) -> "SparseRows":
        row, col = x.nonzero(as_tuple=True)
        return cls(row, col, x[row, col], (x.shape[0], x.shape[1]))

    @cached_property
    def dense(self) -> Tensor:
        out = self.value.new_zeros(self.shape)
        out.view(-1)[self.flat] = self.value
        return out

    @cached_property
    def flat(self) -> Tensor:
        """Positions of the nonzeros in the flattened block."""
        return self.row * self.shape[1] + self.col

    def sum(self) -> Tensor:
        """Row totals, in counts."""
        return self.value.new_zeros(self.shape[0]).index_add_(0, self.row, self.value)

    def select(self, genes: Tensor) -> "SparseRows":
        """The block restricted to the genes where the boolean mask ``genes`` is true."""
        keep = genes[self.col]
        renumbered = genes.cumsum(0) - 1
        return SparseRows(
            self.row[keep],
            renumbered[self.col[keep]],
            self.value[keep],
            (self.shape[0], int(genes.sum())),
        )


def dense(x: Tensor | SparseRows) -> Tensor:
    return x.dense if isinstance(x, SparseRows) else x


def sparse(x: Tensor | SparseRows) -> SparseRows:
    return x if isinstance(x, SparseRows) else SparseRows.from_dense(x)


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
        One-hot batch membership, (cells, categories), or None.
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
        """Some of the batch's cells, by position, each at most once."""
        x = self.x
        if isinstance(x, SparseRows):
            position = rows.new_full((x.shape[0],), -1)
            position[rows] = rows.new_tensor(range(len(rows)))
            keep = position[x.row] >= 0
            x = SparseRows(
                position[x.row[keep]], x.col[keep], x.value[keep], (len(rows), x.shape[1])
            )
        else:
            x = x[rows]
        covariates = None if self.covariates is None else self.covariates[rows]
        return replace(
            self,
            x=x,
            index=self.index[rows],
            size_factor=self.size_factor[rows],
            covariates=covariates,
            on_host=None,
        )
