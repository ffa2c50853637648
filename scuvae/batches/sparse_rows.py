"""Rows of a sparse matrix as tensors, and dense ones alike."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class SparseRows:
    """The nonzeros of a cells × genes block, row by row (CSR).

    ``starts`` (int64, one entry more than cells) says where each row begins; ``col`` (int32 or
    int64) and ``value`` (floating point) have one entry a nonzero. On a GPU the last row may have
    entries of 0 at its end, in any column, which say nothing: blocks of as many cells then have
    arrays of one size.
    """

    starts: Tensor
    col: Tensor
    value: Tensor
    n_vars: int

    @classmethod
    def from_dense(cls, x: Tensor) -> "SparseRows":
        row, col = x.nonzero(as_tuple=True)
        return cls(_starts((x != 0).sum(1)), col, x[row, col], x.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.starts) - 1, self.n_vars

    @cached_property
    def row(self) -> Tensor:
        """The row of each nonzero, int64."""
        return torch.repeat_interleave(self.starts.diff(), output_size=len(self.value))

    @cached_property
    def flat(self) -> Tensor:
        """Positions of the nonzeros in the flattened block."""
        return self.row * self.n_vars + self.col

    @cached_property
    def dense(self) -> Tensor:
        out = self.value.new_zeros(self.shape)
        # Added, since entries of 0 may meet others.
        out.view(-1).index_add_(0, self.flat, self.value)
        return out

    def matrix(self) -> Tensor:
        """As one of torch's sparse matrices, for products."""
        at = torch.stack([self.row, self.col])
        return torch.sparse_coo_tensor(
            at, self.value, self.shape, is_coalesced=True, check_invariants=False
        )

    def sum(self) -> Tensor:
        """Row totals, in counts."""
        return self.value.new_zeros(self.shape[0]).index_add_(0, self.row, self.value)

    def take(self, rows: Tensor, size: int | None = None) -> "SparseRows":
        """Some rows, in the order asked for.

        On a GPU, ``size`` entries, as many as the rows have or more, spare a wait for their number.
        """
        if self.value.device.type == "cpu":
            from scuvae.kernels.csr_rows import gather

            return SparseRows(*gather(self.starts, self.col, self.value, rows), self.n_vars)
        return self.padded(rows, size)

    def padded(self, rows: Tensor, size: int | None) -> "SparseRows":
        """Some rows, by torch's operators, and entries of 0 in the last of them up to ``size``."""
        ends, row, at, beyond = entries(self.starts, rows, size)
        at.clamp_max_(len(self.value) - 1)
        value = self.value.index_select(0, at).masked_fill_(beyond, 0.0)
        block = SparseRows(ends, self.col.index_select(0, at), value, self.n_vars)
        block.__dict__["row"] = row  # what the property would find again
        return block

    def to(self, device: torch.device) -> "SparseRows":
        """The same on a GPU, by way of pinned memory."""
        starts, col, value = (
            part.pin_memory().to(device, non_blocking=True)
            for part in (self.starts, self.col, self.value)
        )
        return SparseRows(starts, col, value, self.n_vars)

    def first(self, n: int) -> "SparseRows":
        """The first n > 0 rows. On a GPU the last of them ends with entries of 0 for all others."""
        starts, col, value = self.starts[: n + 1], self.col, self.value
        if at_hand(value):
            end = int(starts[-1])
            return SparseRows(starts, col[:end], value[:end], self.n_vars)
        ends = torch.cat([starts[:-1], self.starts[-1:]])
        value = value.masked_fill(torch.arange(len(value), device=value.device) >= starts[-1], 0.0)
        return SparseRows(ends, col, value, self.n_vars)

    def followed_by(self, other: "SparseRows") -> "SparseRows":
        """These rows, then those of another block over the same genes."""
        starts = torch.cat([self.starts, other.starts[1:] + self.starts[-1]])
        col, value = torch.cat([self.col, other.col]), torch.cat([self.value, other.value])
        return SparseRows(starts, col, value, self.n_vars)

    def select(self, genes: Tensor) -> "SparseRows":
        """The block restricted to the genes where the boolean mask ``genes`` is true."""
        found = self.entries(genes[self.col], self.value)
        return SparseRows(
            found.starts, (genes.cumsum(0) - 1)[found.col], found.value, int(genes.sum())
        )

    def entries(self, kept: Tensor, value: Tensor) -> "SparseRows":
        """The entries where the mask ``kept`` is true, with values of theirs, (nonzeros,)."""
        starts = F.pad(kept.cumsum(0), (1, 0))[self.starts]
        return SparseRows(starts, self.col[kept], value[kept], self.n_vars)


def entries(
    starts: Tensor, rows: Tensor, size: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of some rows of a CSR matrix, by torch's operators: their starts in a block of ``size``
    entries, and of each entry its row, its place in the matrix, and whether it is beyond the last.
    """
    first = starts.index_select(0, rows)
    length = starts.index_select(0, rows + 1) - first
    new_starts = _starts(length)
    if size is None:
        size = int(new_starts[-1])
    position = torch.arange(size, device=rows.device)
    beyond = position >= new_starts[-1]
    # The row of each entry, by the number of rows that end before it.
    row = torch.searchsorted(new_starts[1:], position, right=True).clamp_max_(len(rows) - 1)
    # Where a row's entries lie in the matrix, less where they lie in the new block.
    at = (first - new_starts[:-1]).index_select(0, row).add_(position)
    ends = torch.cat([new_starts[:-1], new_starts.new_full((1,), size)])
    return ends, row, at, beyond


def at_hand(values: Tensor) -> bool:
    """Whether numbers can be looked at without a wait for a device."""
    return values.is_cpu


def _starts(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0), (1, 0))


def dense(x: Tensor | SparseRows) -> Tensor:
    return x.dense if isinstance(x, SparseRows) else x


def select(x: Tensor | SparseRows, genes: Tensor) -> Tensor | SparseRows:
    """The values of the genes where the boolean mask ``genes`` is true."""
    return x.select(genes) if isinstance(x, SparseRows) else x[..., genes]


def sparse(x: Tensor | SparseRows) -> SparseRows:
    return x if isinstance(x, SparseRows) else SparseRows.from_dense(x)
