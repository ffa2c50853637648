"""What a fit sees of a stored matrix: some of its columns, and what one look at all of it finds."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy import sparse as sp
from torch import Tensor

from scuvae.batches.ahead import ahead
from scuvae.batches.compact_rows import is_count
from scuvae.batches.stored.base import RowsOf, Stored, state_of

logger = logging.getLogger("scuvae")

# Values that are read at once.
_AT_ONCE = 2**21

Predicate = Callable[[Any], Any]
Place = tuple[int, int, Any]
"""Row, column and value."""


@dataclass(frozen=True)
class Survey:
    """What a pass over all values finds.

    Each cell's total, float32, and its stored values, (cells,); whether all are counts; and for
    each predicate how many values it holds for, and where the first is.
    """

    totals: Tensor
    lengths: np.ndarray
    counts: bool
    found: dict[Predicate, tuple[int, Place | None]]


class StoredMatrix:
    """Some columns of a stored matrix, at places of their own among ``n_vars``.

    Parameters
    ----------
    stored
        The matrix.
    columns
        Numbers of the columns that are meant; None for all.
    places, n_vars
        Where they stand in what is read; by default one after another.
    """

    def __init__(
        self,
        stored: Stored,
        columns: np.ndarray | None = None,
        places: np.ndarray | None = None,
        n_vars: int | None = None,
    ) -> None:
        if columns is not None and places is None:
            places, n_vars = np.arange(len(columns)), len(columns)
        self.stored, self.columns, self.places = stored, columns, places
        self.shape = (stored.shape[0], stored.shape[1] if n_vars is None else n_vars)
        self.dtype, self.sparse = stored.dtype, stored.sparse
        self.path = stored.path()
        self.state = state_of(self.path)
        self._survey: Survey | None = None
        self._place_of: np.ndarray | None = None
        if columns is not None:
            self._place_of = np.full(stored.shape[1], -1, np.int32)
            self._place_of[columns] = places

    def spread(self, places: np.ndarray, n_vars: int) -> "StoredMatrix":
        """The same columns at other places."""
        columns = np.arange(self.stored.shape[1]) if self.columns is None else self.columns
        made = StoredMatrix(self.stored, columns, places, n_vars)
        made._survey = self._survey
        return made

    def part(self, rows: slice) -> "StoredMatrix":
        """Some neighbouring rows, of which nothing is known yet."""
        stored = RowsOf(self.stored, rows.start, rows.stop)
        made = StoredMatrix(stored, self.columns, self.places, self.shape[1])
        made.state = self.state
        return made

    def read(self, first: int, last: int) -> Any:
        """The rows from ``first`` to before ``last``: CSR, sorted, without zeros, or an array."""
        x = self.stored.read(first, last)
        if not self.sparse:
            if self.columns is None:
                return x
            wide = np.zeros((len(x), self.shape[1]), x.dtype)
            wide[:, self.places] = x[:, self.columns]
            return wide
        if self._place_of is not None:
            place = self._place_of[x.indices]
            kept = place >= 0
            starts = np.append(0, np.cumsum(kept))[x.indptr]
            shape = len(starts) - 1, self.shape[1]
            x = sp.csr_matrix((x.data[kept], place[kept], starts), shape=shape)
        if not x.has_canonical_format:
            x.sum_duplicates()
        if not x.data.all():  # likelihoods take every entry for a nonzero
            x.eliminate_zeros()
        return x

    def rows(self, rows: Sequence[int] | np.ndarray) -> Any:
        """A few rows, each read by itself."""
        parts = [self.read(int(row), int(row) + 1) for row in rows]
        return sp.vstack(parts, format="csr") if self.sparse else np.concatenate(parts)

    def spans(self) -> np.ndarray:
        """Edges of runs that are read at once."""
        return self.stored.edges(max(1, int(_AT_ONCE / max(1.0, self.stored.per_row))))

    def check_unchanged(self) -> None:
        """Raise where the file is another than when it was opened."""
        if self.path is not None and state_of(self.path) != self.state:
            raise OSError(
                f"{self.path} has changed while it was read: nothing was written. Call again once "
                "nobody writes to it, or read a copy"
            )

    def survey(self, predicates: Sequence[Predicate] = ()) -> Survey:
        """All that the predicates hold for, in one pass; they take arrays of stored values."""
        known = self._survey
        if known is not None and all(p in known.found for p in predicates):
            return known
        wanted = list(dict.fromkeys([*predicates, *(known.found if known else ())]))
        n_rows = self.shape[0]
        totals, lengths, whole = torch.zeros(n_rows), np.zeros(n_rows, np.int32), True
        counts = dict.fromkeys(wanted, 0)
        places: dict[Predicate, Place | None] = dict.fromkeys(wanted)
        runs = list(pairwise(self.spans().tolist()))
        logger.info("looking at all values of %s once", self.path or "a stored matrix")
        for (first, last), x in zip(runs, ahead(lambda run: self.read(*run), runs), strict=True):
            values = x.data if self.sparse else x.ravel()
            for bad in wanted:
                with np.errstate(invalid="ignore"):
                    hits = np.flatnonzero(bad(values))
                counts[bad] += len(hits)
                if len(hits) and places[bad] is None:
                    places[bad] = self._place(x, first, int(hits[0]))
            whole = whole and bool(is_count(values).all())
            totals[first:last] = _totals(x)
            lengths[first:last] = np.diff(x.indptr) if self.sparse else self.shape[1]
        self.check_unchanged()
        found = {bad: (counts[bad], places[bad]) for bad in wanted}
        self._survey = Survey(totals, lengths, whole, found)
        return self._survey

    def _place(self, x: Any, first: int, at: int) -> Place:
        if self.sparse:
            row = int(np.searchsorted(x.indptr, at, side="right")) - 1
            return first + row, int(x.indices[at]), x.data[at]
        row, column = divmod(at, x.shape[1])
        return first + row, column, x[row, column]


def _totals(x: Any) -> Tensor:
    """Row totals, added as those of matrices in memory are."""
    if not sp.issparse(x):
        return torch.as_tensor(np.array(x, np.float32, order="C")).sum(1)
    row = torch.repeat_interleave(torch.from_numpy(np.diff(x.indptr).astype(np.int64)))
    values = torch.from_numpy(x.data.astype(np.float32))
    return torch.zeros(x.shape[0]).index_add_(0, row, values)
