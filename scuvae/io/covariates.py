"""Columns of obs that a model sees: batches, size factors."""

import numpy as np
import pandas as pd
from anndata import AnnData

from scuvae._errors import near
from scuvae.io.inputs import obs_column

# A column of floats with more values than this is a measurement, not a batch.
MOST_FLOAT_BATCHES = 20


def batch_codes(
    adata: AnnData,
    batch_key: str | None,
    known: list[str] | None = None,
    *,
    extend: bool = False,
) -> tuple[np.ndarray | None, list[str]]:
    """Batch membership as integers, and the batches' names, those of a fit where given.

    ``extend``: batches that the fit has not seen follow its own, sorted; otherwise they are an
    error.
    """
    if batch_key is None:
        return None, []
    if batch_key not in adata.obs:
        raise ValueError(
            f"batch_key={batch_key!r} is no column of adata.obs. {near(batch_key, adata.obs)}"
        )
    column = obs_column(adata, batch_key)
    missing = column.isna().to_numpy()
    if missing.any():
        first = adata.obs_names[int(np.flatnonzero(missing)[0])]
        raise ValueError(
            f"adata.obs[{batch_key!r}] is missing for {missing.sum()} cells, first {first!r}: "
            "give these cells a batch, or drop them"
        )
    if known is None and column.dtype.kind == "f" and column.nunique() > MOST_FLOAT_BATCHES:
        raise ValueError(
            f"adata.obs[{batch_key!r}] is {column.dtype} with {column.nunique()} values: it looks "
            "like a measurement, not a batch. Convert it with .astype(str) if it is one"
        )
    labels = column.astype(str)
    names = sorted(labels.unique()) if known is None else known
    unknown = sorted(set(labels) - set(names))
    if extend:
        names = [*names, *unknown]
    elif unknown:
        raise ValueError(
            f"adata.obs[{batch_key!r}] has batches that the fit has not seen: "
            f"{', '.join(map(repr, unknown[:5]))}. Known: {', '.join(map(repr, names[:10]))}. "
            "tl.project(..., new_batches='estimate') estimates what they add"
        )
    codes = pd.Categorical(labels, categories=names).codes
    return np.asarray(codes, np.int64), list(names)


def size_factors(adata: AnnData, key: str | None) -> np.ndarray | None:
    """A column of obs with positive expected totals, or None for each cell's own total."""
    if key is None:
        return None
    if key not in adata.obs:
        raise ValueError(
            f"size_factor_key={key!r} is no column of adata.obs. {near(key, adata.obs)}"
        )
    column = obs_column(adata, key)
    if not pd.api.types.is_numeric_dtype(column):
        raise TypeError(
            f"adata.obs[{key!r}] has dtype {column.dtype}, but size factors are numbers, the total "
            "counts expected of each cell: convert it with .astype(float)"
        )
    values = column.to_numpy(dtype=np.float32, na_value=np.nan)
    bad = ~(np.isfinite(values) & (values > 0))
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise ValueError(
            f"adata.obs[{key!r}] is {values[row]:g} at cell {adata.obs_names[row]!r}: size factors "
            "must be finite and positive, in counts"
        )
    return values
