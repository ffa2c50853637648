"""A sparse matrix kept small: whole counts take three bytes a nonzero."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scuvae.batches.sparse_rows import SparseRows, entries
from scuvae.kernels.csr_rows import ESCAPE, narrow, widen

# The last of the whole numbers that float32 holds one by one.
_MOST = np.float32(2**24)  # half precision, compared with a whole number, would overflow


def is_count(values: np.ndarray) -> np.ndarray:
    """Which values are whole, not negative, and in float32 as they are."""
    return (values >= 0) & (values == np.rint(values)) & (values <= _MOST)


@dataclass(frozen=True)
class CompactRows:
    """The nonzeros of a cells × genes block, row by row (CSR), exactly.

    A column takes two bytes (four where there are more than 65,536 genes). A count takes one:
    from 255 on it stands in ``large``, and its place among all entries, ascending, in
    ``large_at``. Values that are no counts are float32.
    """

    starts: np.ndarray
    col: np.ndarray
    value: np.ndarray
    large_at: np.ndarray
    large: np.ndarray
    n_vars: int

    @classmethod
    def of(cls, x: Any, *, counts: bool) -> "CompactRows":
        """Those of a CSR matrix without entries of 0; ``counts``: all are what ``is_count`` says.

        At most as many values at a time are written out in float32.
        """
        room = Room(np.diff(x.indptr), x.shape[1], counts=counts)
        for first in range(0, len(x.data), 2**22):
            here = slice(first, first + 2**22)
            room.add(x.indices[here], x.data[here])
        return room.filled()

    @property
    def nbytes(self) -> int:
        arrays = (self.starts, self.col, self.value, self.large_at, self.large)
        return sum(array.nbytes for array in arrays)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.starts) - 1, self.n_vars

    def take(self, rows: Tensor) -> SparseRows:
        """Some rows, in the order asked for."""
        arrays = (self.starts, self.col, self.value, self.large_at, self.large)
        return SparseRows(*widen(*arrays, rows), self.n_vars)

    def totals(self) -> Tensor:
        """Each row's total, (cells,)."""
        rows = torch.arange(self.shape[0]).split(2**14)
        return torch.cat([self.take(some).sum() for some in rows])

    def to(self, device: torch.device) -> "CompactTensors":
        # torch gathers no unsigned numbers of more than a byte: these are taken for signed ones.
        col = torch.from_numpy(self.col.view(f"i{self.col.itemsize}"))
        arrays = (self.starts, self.value, self.large_at, self.large)
        starts, value, large_at, large = (torch.from_numpy(array).to(device) for array in arrays)
        return CompactTensors(starts, col.to(device), value, large_at, large, self.n_vars)


@dataclass(frozen=True)
class CompactTensors:
    """:class:`CompactRows` on a device, its columns as signed numbers of as many bits."""

    starts: Tensor
    col: Tensor
    value: Tensor
    large_at: Tensor
    large: Tensor
    n_vars: int

    def padded(self, rows: Tensor, size: int | None) -> SparseRows:
        """Some rows, as :meth:`SparseRows.padded` has them."""
        ends, row, at, beyond = entries(self.starts, rows, size)
        at.clamp_max_(len(self.value) - 1)
        col = self.col.index_select(0, at).int()
        if self.col.dtype is torch.int16:
            col.bitwise_and_(0xFFFF)
        value = self.value.index_select(0, at).float()
        if len(self.large):
            k = torch.searchsorted(self.large_at, at).clamp_max_(len(self.large) - 1)
            found = self.large_at.index_select(0, k) == at
            value = torch.where(found, self.large.index_select(0, k), value)
        block = SparseRows(ends, col, value.masked_fill_(beyond, 0.0), self.n_vars)
        block.__dict__["row"] = row  # what the property would find again
        return block


class Room:
    """Room for the entries of rows of known lengths, filled from the first on."""

    def __init__(self, lengths: np.ndarray, n_vars: int, *, counts: bool) -> None:
        self.starts = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=self.starts[1:])
        self.n_vars, self.counts = n_vars, counts
        self.col = np.empty(self.starts[-1], index_type(n_vars))
        self.value = np.empty(self.starts[-1], np.uint8 if counts else np.float32)
        self.at = 0
        self.large_at: list[np.ndarray] = [np.empty(0, np.int64)]
        self.large: list[np.ndarray] = [np.empty(0, np.float32)]

    @property
    def left(self) -> int:
        return len(self.col) - self.at

    def add(self, col: np.ndarray, value: np.ndarray) -> None:
        """The next entries."""
        value = np.ascontiguousarray(value, np.float32)
        here = slice(self.at, self.at + len(value))
        self.at = here.stop
        if not self.counts:
            self.col[here], self.value[here] = col, value
            return
        small = self.value[here]
        if narrow(np.ascontiguousarray(col, np.int32), value, self.col[here], small):
            large = np.flatnonzero(small == ESCAPE)
            self.large_at.append(large + here.start)
            self.large.append(value[large])

    def filled(self) -> CompactRows:
        large_at, large = np.concatenate(self.large_at), np.concatenate(self.large)
        return CompactRows(self.starts, self.col, self.value, large_at, large, self.n_vars)


def index_type(n_vars: int) -> Any:
    """The unsigned type that holds the numbers of so many columns."""
    return np.uint16 if n_vars <= 2**16 else np.uint32
