"""What gives the values of cells by row number."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from scuvae.batches.sparse_rows import SparseRows


class Source(ABC):
    """The values of some cells by row number."""

    shape: tuple[int, int]

    @classmethod
    @abstractmethod
    def takes(cls, x: Any) -> bool:
        """Whether it is for matrices such as ``x``."""

    @abstractmethod
    def __init__(self, x: Any, device: torch.device) -> None: ...

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

    streamed: bool = False
    """Whether batches are better asked for in advance, by :meth:`visit`."""

    def order(self, rows: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
        """The rows, on the host, in the random order that an epoch visits them in."""
        return rows[torch.randperm(len(rows), generator=generator)]

    def visit(self, parts: Sequence[Tensor]) -> Iterator[Tensor | SparseRows]:
        """Values of the rows of one batch after another, given on the host."""
        return (self.rows(part) for part in parts)

    def sizes(self, on_host: Tensor) -> Tensor | None:
        """The most nonzeros that 1, 2, … of these rows have together, where that is of use."""
        return None

    @abstractmethod
    def totals(self) -> Tensor:
        """Each cell's total, (cells,)."""
