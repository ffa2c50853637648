"""likelihood="auto" where real values stand for counts."""

import warnings
from typing import Any

import numpy as np
from anndata import AnnData
from scipy import sparse as sp

from scuvae.batches.stored.matrix import StoredMatrix
from scuvae.io.values.elsewhere import counts_elsewhere
from scuvae.io.values.find import far_from_whole, find, nonzero, not_whole, shown, slot_name
from scuvae.model.likelihoods.support import negative

# Values may be counts for the most part: when so small a share is not whole.
_FEW_FRACTIONS = 0.1
# Values that are never negative and so often zero are those of molecules, in whatever unit.
_MANY_ZEROS = 0.05
# Cells whose values are looked at for what they are multiples of, and how many say something.
_MOST_LOOKED_AT, _FEWEST_LOOKED_AT = 50, 5


def warn_of_counts_meant(x: Any, adata: AnnData, layer: str | None, genes: Any) -> None:
    """Warn, at the line that called the verb, where real values stand for counts.

    ``x`` has values that are no whole counts. A Gaussian is hardly what was meant where counts lie
    elsewhere, or nearly all values are counts, or where none is negative and each cell's are
    multiples of one (normalised counts) or the logarithm of that, or many are exactly zero.
    """
    where, how = counts_elsewhere(adata, layer)
    present, _ = find(x, nonzero)
    count, place = find(x, not_whole)
    below, _ = find(x, negative)
    rounded, _ = find(x, far_from_whole)
    n_values = x.shape[0] * x.shape[1]
    if place and below + rounded < _FEW_FRACTIONS * present:
        found = f"{shown(place, adata, layer, genes, count)}, nearly all else is whole"
    elif not below and _multiples(x):
        found = f"{slot_name(layer)} seems to hold normalised counts"
    elif place and not below and present < (1 - _MANY_ZEROS) * n_values:
        share = 1 - present / n_values
        found = (
            f"{shown(place, adata, layer, genes, count)}, but none is negative and {share:.0%} are "
            "zero, as estimated or normalised counts are"
        )
    elif where:
        found = f"{slot_name(layer)} holds no whole numbers"
    else:
        return
    advice = f"{how}: {where} holds whole counts" if where else "Pass layer= with raw counts"
    warnings.warn(
        f"{found}: likelihood='auto' takes a Gaussian. {advice}. Or pass likelihood='gaussian' to "
        "fit these values without this warning",
        stacklevel=5,
    )


def _multiples(x: Any) -> bool:
    """Whether each of some cells' values, or what they are the log(1 + ·) of, are whole multiples
    of its smallest."""
    rows = np.linspace(0, x.shape[0] - 1, min(x.shape[0], _MOST_LOOKED_AT)).astype(int)
    several = []
    for row in np.unique(rows):
        one = x.read(row, row + 1) if isinstance(x, StoredMatrix) else x[[row]]
        values = one.toarray().ravel() if sp.issparse(one) else np.asarray(one).ravel()
        values = values[values > 0].astype(np.float64)
        if len(np.unique(values)) > 1:
            several.append(values)

    def whole(values: np.ndarray) -> bool:
        ratio = values / values.min()
        return bool(np.all(np.abs(ratio - np.rint(ratio)) < 1e-3 * ratio))

    if len(several) < _FEWEST_LOOKED_AT:
        return False
    # A cell whose smallest count is not one is none of these.
    return any(
        np.mean([whole(change(values)) for values in several]) > 0.5
        for change in (np.array, np.expm1)
    )
