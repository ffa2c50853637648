"""Where a matrix holds values of some kind, without a mask of its size."""

from collections.abc import Callable
from typing import Any

import numpy as np
from anndata import AnnData
from scipy import sparse as sp

from scuvae.batches.stored.matrix import Place, StoredMatrix
from scuvae.model.likelihoods.support import fractional, negative

_LARGEST = np.finfo(np.float32).max
# Above it float32 has not every whole number; and sums of squares of values above the other may
# leave its range, whatever the likelihood.
EXACT, TOO_LARGE = np.float32(2**24), np.float32(1e10)


def slot_name(layer: str | None) -> str:
    return "adata.X" if layer is None else f"adata.layers[{layer!r}]"


def is_whole(x: Any) -> bool:
    """Whether all values are finite, non-negative and whole."""
    if isinstance(x, StoredMatrix):
        return find(x, not_whole)[0] == 0
    values = x.data if sp.issparse(x) else x
    if values.dtype.kind in "bu":
        return True
    return all(
        bool(np.isfinite(part).all() and (part >= 0).all() and (part == np.rint(part)).all())
        for part in blocks(values)
    )


def not_finite(values: Any) -> Any:
    return ~(np.abs(values) <= _LARGEST)


def not_whole(values: Any) -> Any:
    return ~((values >= 0) & (values == np.rint(values)) & (values <= _LARGEST))


def nonzero(values: Any) -> Any:
    return values != 0


def far_from_whole(values: Any) -> Any:
    return np.abs(values - np.rint(values)) > 1e-3


def inexact(values: Any) -> Any:
    return (values > EXACT) | (values < -EXACT)


def too_large(values: Any) -> Any:
    return (values > TOO_LARGE) | (values < -TOO_LARGE)


def find(x: Any, bad: Callable[[Any], Any]) -> tuple[int, Place | None]:
    """How many values of a matrix are bad, and where the first is."""
    if isinstance(x, StoredMatrix):
        # All that may be asked, in one pass.
        return x.survey([*_KINDS, bad]).found[bad]
    values = x.data if sp.issparse(x) else x
    count, first, start = 0, -1, 0
    if values.dtype.kind not in _KINDS.get(bad, "uif"):
        return 0, None
    for part in blocks(values):
        hits = np.flatnonzero(bad(part))
        if len(hits) and first < 0:
            first = start + int(hits[0])
        count += len(hits)
        start += part.size
    if not count:
        return 0, None
    if sp.issparse(x):
        row = int(np.searchsorted(x.indptr, first, side="right")) - 1
        return count, (row, int(x.indices[first]), x.data[first])
    row, column = divmod(first, x.shape[1])
    return count, (row, column, x[row, column])


# The kinds of dtype that each may hold for; other predicates for all but booleans.
_KINDS: dict[Callable[[Any], Any], str] = {
    not_finite: "f",
    fractional: "f",
    far_from_whole: "f",
    negative: "if",
    not_whole: "if",
    nonzero: "buif",
    inexact: "uif",
    too_large: "uif",
}


def any_nonzero(x: Any) -> bool:
    """Whether any value is not 0."""
    if isinstance(x, StoredMatrix):
        return find(x, nonzero)[0] > 0
    return any(bool(part.any()) for part in blocks(x.data if sp.issparse(x) else x))


def shown(place: Place, adata: AnnData, layer: str | None, genes: Any, count: int) -> str:
    """A value with its cell and gene, and how many there are such."""
    row, column, value = place
    gene = adata.var_names[column if genes is None else np.arange(adata.n_vars)[genes][column]]
    others = f" ({count} such values in all)" if count > 1 else ""
    return (
        f"{slot_name(layer)} holds {value:g} at cell {adata.obs_names[row]!r}, gene {gene!r}"
        f"{others}"
    )


def blocks(values: np.ndarray, rows: int = 2**22) -> Any:
    """Runs of at most ``rows`` values in C order, so that checks need no matrix-sized masks."""
    if values.ndim == 1:
        return (values[i : i + rows] for i in range(0, len(values), rows))
    step = max(1, rows // max(1, values.shape[1]))
    return (values[i : i + step].ravel() for i in range(0, len(values), step))
