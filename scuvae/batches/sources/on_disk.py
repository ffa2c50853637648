"""Cells of a matrix that is not in memory: read in blocks, shuffled in a buffer.

Order. An epoch visits the blocks, runs of neighbouring rows, in random order; as many as fill the
buffer are shuffled together, cell by cell, and batches are taken from there. Every cell is visited
once an epoch. The buffer holds 256 blocks, or 64 where a file's chunks are long, that were drawn at
random: of a file in which like cells stand together, the share p of a kind in the buffer varies
with a standard deviation of √(p (1 − p) / blocks) at most. For as many blocks as a batch has cells
that is what the share in a random batch varies by.

What fits the buffer as a whole is read once and kept, and shuffled as a matrix in memory is.
"""

import logging
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scuvae.batches.ahead import ahead
from scuvae.batches.compact_rows import Room, index_type
from scuvae.batches.sources.base import Source
from scuvae.batches.sources.compact import CompactSource
from scuvae.batches.sources.in_memory import DenseSource
from scuvae.batches.sparse_rows import SparseRows
from scuvae.batches.spill import release
from scuvae.batches.stored.matrix import StoredMatrix

logger = logging.getLogger("scuvae")

# Bytes of values that are in memory at once: two windows, one in use and one being read.
BUFFER = 2**27
# Blocks that a window of shuffled cells is drawn from; where a file's chunks are longer than such a
# block, fewer; and the rows of the shortest.
BLOCKS, FEWEST, SHORTEST = 256, 64, 16
# Rows of a window where cells are visited in their own order.
_IN_ORDER = 8192


class OnDiskSource(Source):
    """A :class:`StoredMatrix`, in windows of some cells, each read while the last is in use."""

    @classmethod
    def takes(cls, x: Any) -> bool:
        return isinstance(x, StoredMatrix)

    def __init__(self, x: StoredMatrix, device: torch.device) -> None:
        self.matrix, self.device, self.shape = x, device, x.shape
        survey = x.survey()
        self.lengths, self.counts = survey.lengths, survey.counts
        of_value = index_type(x.shape[1])().nbytes + (1 if self.counts else 4)
        n_bytes = int(of_value * self.lengths.mean(dtype=float)) + 8 if x.sparse else 4 * x.shape[1]
        self.window = max(1, BUFFER // 2 // n_bytes)
        self.held: Source | None = None
        if n_bytes * x.shape[0] <= BUFFER:
            self.held = self.read(np.arange(x.shape[0]), device)
        else:
            logger.info(
                "%d cells are read from disk as they are needed, %d at a time",
                x.shape[0],
                self.window,
            )
        self.streamed = self.held is None
        self.resident = self.held is not None and self.held.resident

    def totals(self) -> Tensor:
        return self.matrix.survey().totals.to(self.device)

    def sizes(self, on_host: Tensor) -> Tensor | None:
        return None if self.held is None else self.held.sizes(on_host)

    def rows(
        self, index: Tensor, on_host: Tensor | None = None, size: int | None = None
    ) -> Tensor | SparseRows:
        if self.held is not None:
            return self.held.rows(index, on_host, size)
        part = index.cpu() if on_host is None else on_host
        return self._taken(self._window([part]), part)

    def order(self, rows: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
        window = self.window // batch_size * batch_size or batch_size
        if self.held is not None or len(rows) <= window:
            return super().order(rows, batch_size, generator)
        edges = self.matrix.stored.edges(max(SHORTEST, window // BLOCKS), window // FEWEST)
        blocks = rows.tensor_split(torch.searchsorted(rows, torch.from_numpy(edges[1:-1])))
        order = torch.randperm(len(blocks), generator=generator).tolist()
        windows = torch.cat([blocks[k] for k in order]).split(window)
        return torch.cat([rows[torch.randperm(len(rows), generator=generator)] for rows in windows])

    def visit(self, parts: Sequence[Tensor]) -> Iterator[Tensor | SparseRows]:
        windows = list(self._windows(parts))
        for some, window in zip(windows, ahead(self._window, windows), strict=True):
            for part in some:
                yield self._taken(window, part)
            release()

    def _taken(self, window: tuple[Tensor, Source], part: Tensor) -> Tensor | SparseRows:
        rows, source = window
        values = source.rows(torch.searchsorted(rows, part))
        return values if self.device.type == "cpu" else values.to(self.device)

    def _windows(self, parts: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Parts that are read together."""
        ordered = all(bool((part.diff() > 0).all()) for part in parts[:2])
        most = min(self.window, _IN_ORDER) if ordered else self.window
        some: list[Tensor] = []
        n_rows = 0
        for part in parts:
            if some and n_rows + len(part) > most:
                yield some
                some, n_rows = [], 0
            some.append(part)
            n_rows += len(part)
        if some:
            yield some

    def _window(self, parts: Sequence[Tensor]) -> tuple[Tensor, Source]:
        rows = torch.cat(list(parts)).unique()
        return rows, self.read(rows.numpy(), torch.device("cpu"))

    def read(self, rows: np.ndarray, device: torch.device) -> Source:
        """A source in memory of some rows, which ascend."""
        matrix = self.matrix
        dense = np.empty((0 if matrix.sparse else len(rows), self.shape[1]), np.float32)
        room = Room(self.lengths[rows] if matrix.sparse else [], self.shape[1], counts=self.counts)
        for first, last in pairwise(self._runs(rows)):
            run = rows[first:last]
            x = matrix.read(int(run[0]), int(run[-1]) + 1)
            if len(run) < x.shape[0]:
                x = x[run - run[0]]
            if not matrix.sparse:
                dense[first:last] = x
                continue
            if x.nnz != room.starts[last] - room.at:
                matrix.check_unchanged()
                raise OSError(f"rows {run[0]} to {run[-1]} are not what they were when first read")
            room.add(x.indices, x.data)
        matrix.check_unchanged()
        return CompactSource(room.filled(), device) if matrix.sparse else DenseSource(dense, device)

    def _runs(self, rows: np.ndarray) -> list[int]:
        """Where, among ``rows``, each run begins that is read at once, and the end."""
        span = np.searchsorted(self.matrix.spans(), rows, side="right")
        cut = (np.diff(span) > 0) | (np.diff(rows) > self.matrix.stored.gap)
        return [0, *(np.flatnonzero(cut) + 1).tolist(), len(rows)]
