"""Which values a fit can have."""

import warnings
from typing import Any

import numpy as np
from anndata import AnnData

from scuvae.batches.stored.matrix import StoredMatrix
from scuvae.io.values import find as seen
from scuvae.io.values.elsewhere import remedy
from scuvae.io.values.find import find, shown, slot_name
from scuvae.model.likelihoods.support import SUPPORTS, fractional


def not_whole(x: Any, adata: AnnData, layer: str | None) -> str:
    """The first value that is no whole count, with its cell and gene, and how many; or ""."""
    count, place = find(x, seen.not_whole)
    return shown(place, adata, layer, None, count) if place else ""


def check_values(
    x: Any,
    adata: AnnData,
    layer: str | None,
    genes: Any,
    *,
    likelihood: str,
    support: str,
    fractions: bool = False,
    fitting: bool = True,
    stacklevel: int = 5,
) -> None:
    """Raise where ``x`` holds what the likelihood cannot have; names the first cell and gene.

    ``fitting=False``: values for a model that is there. The likelihood is then no longer open,
    and a matrix of zeros is as good as another. ``support``: a key of
    :data:`scuvae.model.likelihoods.support.SUPPORTS`; ``fractions`` lets counts be no whole ones.
    """
    count, place = find(x, seen.not_finite)
    if place:
        what = shown(place, adata, layer, genes, count)
        raise ValueError(f"{what}, which is no finite number in float32. Impute it, or drop it")
    large, _ = find(x, seen.inexact)
    if large:
        count, place = find(x, seen.too_large)
        if place:
            raise ValueError(
                f"{shown(place, adata, layer, genes, count)}, too large to be computed with in "
                f"float32, whose limit here is {seen.TOO_LARGE:g}. Is it a measurement? Correct or "
                "drop it, or divide all values by one number"
            )
    for outside in SUPPORTS[support].outside:
        tolerable = outside is fractional
        if fractions and tolerable:
            continue
        count, place = find(x, outside)
        if place:
            raise ValueError(
                f"{shown(place, adata, layer, genes, count)}: likelihood={likelihood!r} needs "
                f"{SUPPORTS[support].needs}. {remedy(adata, layer, fitting, support)}"
                + (". check_values=False fits it all the same" if tolerable and fitting else "")
            )
    if large and support == "counts":
        _, place = find(x, seen.inexact)
        assert place is not None
        warnings.warn(
            f"{shown(place, adata, layer, genes, large)}: above {int(seen.EXACT):,} float32 has "
            "not every whole number, so that such counts are rounded. Are they counts?",
            stacklevel=stacklevel,
        )
    if fitting and not seen.any_nonzero(x):
        raise ValueError(
            f"{slot_name(layer)} is zero everywhere: there is nothing to fit. Pass layer= with "
            "the values to fit"
        )


def totals(x: Any) -> np.ndarray:
    """Each cell's total."""
    if isinstance(x, StoredMatrix):
        return np.asarray(x.survey().totals)
    return np.asarray(x.sum(axis=1, dtype=np.float64)).ravel()


def empty_cells(x: Any) -> int:
    """How many cells have a total of 0."""
    return int((totals(x) == 0).sum())
