"""Where counts are when a fit was given something else."""

from typing import Any

import numpy as np
from anndata import AnnData
from scipy import sparse as sp

from scuvae.io import inputs

# Whole values among those that are not zero, from which on they were likely meant as counts.
MOSTLY = 0.5
# Whole values that went through float arithmetic are off by less.
ROUNDING = 1e-3


def in_layer(adata: AnnData, layer: str | None) -> str | None:
    """The argument that fits whole counts of ``adata``, in X or a layer other than ``layer``."""
    for name in [None, *(known for known in adata.layers if known is not None)]:
        if name != layer and inputs.holds_counts(adata.X if name is None else adata.layers[name]):
            return f"layer={name!r}" if name else "layer=None (adata.X)"
    return None


def warning(adata: AnnData, layer: str | None, matrix: Any, genes: Any) -> str | None:
    """What to say where a Gaussian is taken for values that look meant as counts, or None.

    Negative values are none, whatever lies beside them.
    """
    values = matrix.data if sp.issparse(matrix) else matrix
    lowest = min((part.min() for part in inputs.blocks(values) if part.size), default=0)
    if not lowest >= 0:  # NaN is for check_values
        return None
    slot = inputs.slot_name(layer)
    taken = f"likelihood='auto' takes a Gaussian, as {slot} holds fractions"
    argument = in_layer(adata, layer)
    if argument is not None:
        return f"{taken}, but whole counts are there: pass {argument} to fit these"
    remedy = inputs.in_raw(adata)
    if remedy is not None:
        return f"{taken}, but adata.raw holds whole counts: {remedy}, to fit these"
    stored = whole = 0
    for part in inputs.blocks(values):
        some = part[part != 0]
        near_whole = np.abs(some - np.rint(some)) < ROUNDING
        stored, whole = stored + some.size, whole + int(near_whole.sum())
    if whole <= MOSTLY * stored:
        return None
    count, first = inputs.find(values, lambda v: v != np.rint(v), kinds="f")
    place = inputs.place(matrix, first, adata, layer, genes, count)
    return (
        f"likelihood='auto' takes a Gaussian, but most values are whole, or nearly, and {place}. "
        "If these are counts, round them, or pass likelihood='negative_binomial' and "
        "check_values=False"
    )
