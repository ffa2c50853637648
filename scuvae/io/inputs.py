"""AnnData in: the matrix a fit sees, checked before any work."""

from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse as sp

from scuvae._adata import check_type, obs_column
from scuvae._errors import near
from scuvae.batches.stored.matrix import StoredMatrix
from scuvae.batches.stored.registry import kind_of
from scuvae.io.values.allowed import check_values, empty_cells, not_whole, totals
from scuvae.io.values.counts_meant import warn_of_counts_meant
from scuvae.io.values.elsewhere import counts_elsewhere
from scuvae.io.values.find import is_whole, slot_name

__all__ = [
    "check_anndata",
    "check_type",
    "check_unique_genes",
    "check_values",
    "counts_elsewhere",
    "empty_cells",
    "gene_mask",
    "is_whole",
    "not_whole",
    "obs_column",
    "read_matrix",
    "slot_name",
    "totals",
    "warn_of_counts_meant",
]


def check_anndata(adata: object, *, copy: bool = True) -> AnnData:
    """``adata`` itself, if it is an AnnData with cells and genes, to which results can be added.

    ``copy``: they go to a copy, or nowhere.
    """
    checked = check_type(adata)
    if not copy and checked.is_view and checked.isbacked:
        raise ValueError(
            "adata is a view of a backed AnnData, to which nothing can be added: pass "
            "adata.to_memory(), or copy=True"
        )
    if checked.n_obs == 0 or checked.n_vars == 0:
        empty = "no cells" if checked.n_obs == 0 else "no genes"
        raise ValueError(
            f"adata is {checked.n_obs} × {checked.n_vars}, it has {empty}: "
            "was it filtered too strictly?"
        )
    return checked


def check_unique_genes(adata: AnnData) -> None:
    """Raise where a gene has no name, or another's: models and data meet by name."""
    names = adata.var_names
    if names.nlevels > 1:
        raise TypeError(
            f"adata.var_names has {names.nlevels} levels, but genes are matched by one name: set "
            "adata.var_names to the level that names them"
        )
    if names.hasnans:
        first = int(np.flatnonzero(names.isna())[0])
        raise ValueError(
            f"adata.var_names is missing for {int(names.isna().sum())} genes, first at column "
            f"{first}, but genes are matched by name: name these genes, or drop them"
        )
    names = names.astype(str)  # 1 and "1" are one name in a file
    if not names.is_unique:
        twice = names[names.duplicated()][0]
        raise ValueError(
            f"adata.var_names holds {twice!r} more than once, but genes are matched by name: call "
            "adata.var_names_make_unique() before fitting, on every AnnData alike"
        )
    unwritable = [name for name in names if "\0" in name]
    if unwritable:
        raise ValueError(
            f"adata.var_names holds {unwritable[0]!r}, and no file takes a NUL: rename this gene"
        )


def gene_mask(adata: AnnData, mask_var: Any) -> np.ndarray | None:
    """``mask_var``, a boolean column of var or a boolean array, as an array; None for all genes.

    What has an index of its own, a Series, is lined up with the genes by name.
    """
    if mask_var is None:
        return None
    name, values = "mask_var", mask_var
    if isinstance(mask_var, str):
        if mask_var not in adata.var:
            raise ValueError(
                f"mask_var={mask_var!r} is no column of adata.var. {near(mask_var, adata.var)}"
            )
        name, values = f"adata.var[{mask_var!r}]", adata.var[mask_var]
        if getattr(values, "ndim", 1) > 1:
            raise ValueError(
                f"adata.var has {values.shape[1]} columns named {mask_var!r}, which mask_var "
                "names: keep one"
            )
    elif isinstance(mask_var, pd.DataFrame):
        raise TypeError("mask_var is a DataFrame: pass one of its columns")
    elif isinstance(mask_var, pd.Series):
        values = _by_gene(adata, mask_var)
    if getattr(values, "hasnans", False):
        raise ValueError(f"{name} is missing for {int(pd.isna(values).sum())} genes: fill it")
    # pandas 2.1 makes objects of its nullable bools.
    mask = np.asarray(values, bool if pd.api.types.is_bool_dtype(values) else None)
    if mask.dtype != bool or mask.shape != (adata.n_vars,):
        hint = ""
        if mask.dtype.kind in "US" or (mask.dtype == object and isinstance(next(mask.flat), str)):
            hint = ". Of genes' names it is adata.var_names.isin(names)"
        raise ValueError(
            f"{name} has dtype {mask.dtype} and shape {mask.shape}: it must be boolean with one "
            f"entry for each of the {adata.n_vars} genes{hint}"
        )
    if not mask.any():
        raise ValueError(f"{name} selects none of the {adata.n_vars} genes: the fit needs some")
    return mask


def _by_gene(adata: AnnData, values: pd.Series) -> pd.Series:
    """A Series in the order of the genes, by its index."""
    index = values.index.astype(str)
    if not index.is_unique:
        twice = index[index.duplicated()][0]
        raise ValueError(f"mask_var has {twice!r} twice in its index: keep one")
    lacking = adata.var_names.astype(str).difference(index)
    if len(lacking):
        raise ValueError(
            f"mask_var is a Series that lacks {len(lacking)} of adata's genes in its index, first "
            f"{lacking[0]!r}: it is lined up with adata.var_names by name. Without names pass "
            "mask_var.to_numpy()"
        )
    return values.set_axis(index).reindex(adata.var_names.astype(str))


def read_matrix(
    adata: AnnData, layer: str | None, genes: Any = None, *, in_memory: bool = True
) -> Any:
    """The matrix of ``layer`` restricted to ``genes``: a CSR array or an ndarray, in memory.

    A sparse matrix stays sparse; nothing is copied that need not be. Unless ``in_memory`` one that
    is not in memory stays there, a :class:`StoredMatrix`; CSC matrices on disk, which cannot be
    read by cells, are loaded all the same.
    """
    if layer is not None and not isinstance(layer, str):
        raise TypeError(
            f"layer={layer!r} is a {type(layer).__name__}: pass the name of one of adata.layers, "
            "or None for adata.X"
        )
    name = slot_name(layer)
    if layer is not None and layer not in adata.layers:
        raise ValueError(f"{name} does not exist. {near(layer, adata.layers)}")
    x = adata.X if layer is None else adata.layers[layer]
    if x is None:
        raise ValueError(
            f"adata.X is None: pass layer= with the values to fit. {near('counts', adata.layers)}"
        )
    kind = f"{type(x).__module__}.{type(x).__name__}"
    stored = None if in_memory else kind_of(x)
    if stored is not None:
        _check_dtype(x, name)
        columns = genes if genes is None else np.arange(adata.n_vars)[genes]
        return StoredMatrix(stored(x), columns)
    if kind.startswith("dask"):
        raise TypeError(f"{name} is a dask array: load it first, adata = adata.to_memory()")
    if hasattr(x, "to_memory"):
        x = x.to_memory()
    elif kind.startswith("h5py") or kind.startswith("zarr"):
        x = x[:]
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array: fill it first, x.filled(0)")
    if sp.issparse(x):
        if x.format not in ("csr", "csc"):
            raise TypeError(f"{name} is a sparse {x.format.upper()} matrix: convert it, x.tocsr()")
    elif not isinstance(x, np.ndarray):
        raise TypeError(f"{name} is a {kind}: pass a numpy array or a scipy CSR or CSC matrix")
    _check_dtype(x, name)
    if genes is not None:
        x = x[:, genes]
    if not sp.issparse(x):
        return np.asarray(x)
    x = sp.csr_array(x)
    if not x.has_canonical_format:
        x = x.copy()
        x.sum_duplicates()
    return x


def rows_of(x: Any, rows: slice) -> Any:
    """Some neighbouring rows of such a matrix; one that is on disk stays there."""
    return x.part(rows) if isinstance(x, StoredMatrix) else x[rows]


def _check_dtype(x: Any, name: str) -> None:
    if x.dtype.kind not in "biuf":
        raise TypeError(
            f"{name} has dtype {x.dtype}, but values must be real numbers: convert it, "
            "x.astype('float32')"
        )
