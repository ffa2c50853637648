"""What a file of an AnnData will take, known before it is written."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse as sp

# A zarr store is compressed: no matrix of counts to less than so small a share.
_LEAST_SHARE = {".zarr": 0.02}


def bytes_written(adata: AnnData, suffix: str) -> int:
    """Bytes that ``adata`` takes in a file at least, from the sizes of its arrays."""
    parts: list[Any] = [adata.X, *adata.layers.values(), adata.obs, adata.var]
    for slot in (adata.obsm, adata.varm, adata.obsp, adata.varp):
        parts += slot.values()
    if adata.raw is not None:
        parts += [adata.raw.X, adata.raw.var]
    return int(sum(map(_size, parts)) * _LEAST_SHARE.get(suffix, 1.0))


def _size(part: Any) -> int:
    if part is None:
        return 0
    if isinstance(part, pd.DataFrame):
        columns = [part.index, *(part[name] for name in dict.fromkeys(part) if name is not None)]
        return sum(_size(column) for column in columns)
    if isinstance(part, pd.Series | pd.Index):
        # Strings of any length are at least a reference each.
        return len(part) * (part.cat.codes.dtype.itemsize if hasattr(part, "cat") else 4)
    if sp.issparse(part):
        arrays = [
            getattr(part, name)
            for name in ("data", "indices", "indptr", "row", "col")
            if hasattr(part, name)
        ]
        return sum(array.nbytes for array in arrays)
    shape, dtype = getattr(part, "shape", ()), getattr(part, "dtype", np.dtype("u1"))
    return int(np.prod(shape, dtype=float) * getattr(dtype, "itemsize", 1))


def without_values(adata: AnnData) -> Iterator[tuple[str, AnnData]]:
    """Slots and what is to be written of them, each by itself, the large matrices left out."""
    empty = AnnData(
        obs=pd.DataFrame(index=adata.obs_names), var=pd.DataFrame(index=adata.var_names)
    )
    for slot in ("obs", "var", "uns"):
        one = empty.copy()
        setattr(one, slot, getattr(adata, slot))
        yield slot, one
    for slot in ("obsm", "varm"):
        tables = {k: v for k, v in getattr(adata, slot).items() if isinstance(v, pd.DataFrame)}
        if tables:
            one = empty.copy()
            getattr(one, slot).update(tables)
            yield slot, one
    if adata.raw is not None:
        one = empty.copy()
        shape = (adata.n_obs, adata.raw.n_vars)
        one.raw = AnnData(sp.csr_matrix(shape, dtype=np.float32), adata.obs, adata.raw.var)
        yield "raw", one
