"""Where counts are, when they are not where they were looked for."""

from typing import Any

import numpy as np
from anndata import AnnData
from scipy import sparse as sp

from scuvae.io.values.find import is_whole, slot_name


def remedy(adata: AnnData, layer: str | None, fitting: bool, support: str) -> str:
    """Where counts are: a layer that holds some, or advice."""
    if support == "binary":
        return _binarised(layer, fitting)
    where, how = counts_elsewhere(adata, layer)
    if where and not fitting:
        return f"{where} holds some: put them there"
    if where == "adata.raw":
        return f"{where} holds whole counts: {how}. Or pass likelihood='gaussian'"
    if where:
        return f"{how}, which holds whole counts, or likelihood='gaussian'"
    if not fitting:
        return "Put raw counts there, as in the fit"
    return "Pass layer= with raw counts, or likelihood='gaussian'"


def _binarised(layer: str | None, fitting: bool) -> str:
    """Where zeros and ones come from."""
    binarised = f"({slot_name(layer)} > 0).astype('float32')"
    if not fitting:
        return f"Put them there, as in the fit: {binarised}"
    return (
        f"Set adata.layers['binary'] = {binarised} and pass layer='binary'. Or pass a likelihood "
        "for counts, likelihood='negative_binomial'"
    )


def counts_elsewhere(adata: AnnData, layer: str | None) -> tuple[str, str]:
    """A slot other than ``layer`` that holds whole counts, and how to fit these; or two "".

    Of all layers, then of ``adata.raw``; what is not in memory is not looked at.
    """
    for name in dict.fromkeys([None, *adata.layers]):
        if name != layer and _holds_counts(adata.X if name is None else adata.layers[name]):
            how = f"layer={name!r}" if name else "layer=None (adata.X)"
            return slot_name(name), f"Pass {how}"
    # Of raw all of adata's genes, whatever else it has: as layers are.
    raw = adata.raw
    if raw is not None and adata.var_names.isin(raw.var_names).all() and _holds_counts(raw.X):
        put = "adata.layers['counts'] = adata.raw[:, adata.var_names].X"
        return "adata.raw", f"Set {put} and pass layer='counts'"
    return "", ""


def _holds_counts(x: Any) -> bool:
    if not isinstance(getattr(x, "dtype", None), np.dtype) or x.dtype.kind not in "buif":
        return False
    return (sp.issparse(x) or isinstance(x, np.ndarray)) and is_whole(x)
