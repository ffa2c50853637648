"""AnnData in: the matrix a fit sees, checked before any work."""

import warnings
from collections.abc import Callable
from os import PathLike
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse as sp

from scuvae._errors import near
from scuvae.batches.stored.matrix import Place, StoredMatrix
from scuvae.batches.stored.registry import kind_of
from scuvae.model.likelihoods.support import SUPPORTS, fractional, negative

_LARGEST = np.finfo(np.float32).max
# Values may be counts for the most part: when so small a share is not whole.
_FEW_FRACTIONS = 0.1
# Cells whose values are looked at for what they are multiples of, and how many say something.
_MOST_LOOKED_AT, _FEWEST_LOOKED_AT = 50, 5


def check_type(adata: object, name: str = "adata") -> AnnData:
    """``adata`` itself, if it is an AnnData."""
    if isinstance(adata, AnnData):
        return adata
    kind = type(adata)
    if kind.__name__ == "MuData":
        modalities = ", ".join(map(repr, adata.mod))  # type: ignore[attr-defined]
        raise TypeError(
            f"{name} is a MuData with modalities {modalities}: pass one of them, mdata[modality]"
        )
    hint = "anndata.read_h5ad(path)" if isinstance(adata, str | PathLike) else "AnnData(X)"
    raise TypeError(f"{name} is a {kind.__module__}.{kind.__name__}, not an AnnData: pass {hint}")


def check_anndata(adata: object) -> AnnData:
    """``adata`` itself, if it is an AnnData with cells and genes."""
    checked = check_type(adata)
    if checked.n_obs == 0 or checked.n_vars == 0:
        empty = "no cells" if checked.n_obs == 0 else "no genes"
        raise ValueError(
            f"adata is {checked.n_obs} × {checked.n_vars}, it has {empty}: "
            "was it filtered too strictly?"
        )
    return checked


def check_unique_genes(adata: AnnData) -> None:
    """Raise where a gene's name occurs twice: models and data meet by name."""
    if not adata.var_names.is_unique:
        twice = adata.var_names[adata.var_names.duplicated()][0]
        raise ValueError(
            f"adata.var_names holds {twice!r} more than once, but genes are matched by name: call "
            "adata.var_names_make_unique() before fitting, on every AnnData alike"
        )


def slot_name(layer: str | None) -> str:
    return "adata.X" if layer is None else f"adata.layers[{layer!r}]"


def obs_column(adata: AnnData, key: str) -> pd.Series:
    """A column of obs, in memory also where ``anndata.experimental.read_lazy`` left it on disk."""
    column = adata.obs[key]
    return column if isinstance(column, pd.Series | pd.DataFrame) else column.to_pandas()


def gene_mask(adata: AnnData, mask_var: Any) -> np.ndarray | None:
    """``mask_var``, a boolean column of var or a boolean array, as an array; None for all genes."""
    if mask_var is None:
        return None
    if isinstance(mask_var, str):
        if mask_var not in adata.var:
            raise ValueError(
                f"mask_var={mask_var!r} is no column of adata.var. {near(mask_var, adata.var)}"
            )
        name, mask = f"adata.var[{mask_var!r}]", np.asarray(adata.var[mask_var])
    else:
        name, mask = "mask_var", np.asarray(mask_var)
    if mask.dtype != bool or mask.shape != (adata.n_vars,):
        raise ValueError(
            f"{name} has dtype {mask.dtype} and shape {mask.shape}: it must be boolean with one "
            f"entry for each of the {adata.n_vars} genes"
        )
    if not mask.any():
        raise ValueError(f"{name} selects none of the {adata.n_vars} genes: the fit needs some")
    return mask


def read_matrix(
    adata: AnnData, layer: str | None, genes: Any = None, *, in_memory: bool = True
) -> Any:
    """The matrix of ``layer`` restricted to ``genes``: a CSR array or an ndarray, in memory.

    A sparse matrix stays sparse; nothing is copied that need not be. Unless ``in_memory`` one that
    is not in memory stays there, a :class:`StoredMatrix`; CSC matrices on disk, which cannot be
    read by cells, are loaded all the same.
    """
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


def is_whole(x: Any) -> bool:
    """Whether all values are finite, non-negative and whole."""
    if isinstance(x, StoredMatrix):
        return _find(x, _not_whole)[0] == 0
    values = x.data if sp.issparse(x) else x
    if values.dtype.kind in "bu":
        return True
    return all(
        bool(np.isfinite(part).all() and (part >= 0).all() and (part == np.rint(part)).all())
        for part in _blocks(values)
    )


def not_whole(x: Any, adata: AnnData, layer: str | None) -> str:
    """The first value that is no whole count, with its cell and gene, and how many; or ""."""
    count, place = _find(x, _not_whole)
    return _shown(place, adata, layer, None, count) if place else ""


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
) -> None:
    """Raise where ``x`` holds what the likelihood cannot have; names the first cell and gene.

    ``fitting=False``: values for a model that is there. The likelihood is then no longer open,
    and a matrix of zeros is as good as another. ``support``: a key of
    :data:`scuvae.model.likelihoods.support.SUPPORTS`; ``fractions`` lets counts be no whole ones.
    """
    count, place = _find(x, _not_finite)
    if place:
        shown = _shown(place, adata, layer, genes, count)
        raise ValueError(f"{shown}, which is no finite number in float32. Impute it, or drop it")
    for outside in SUPPORTS[support].outside:
        tolerable = outside is fractional
        if fractions and tolerable:
            continue
        count, place = _find(x, outside)
        if place:
            raise ValueError(
                f"{_shown(place, adata, layer, genes, count)}: likelihood={likelihood!r} needs "
                f"{SUPPORTS[support].needs}. {_remedy(adata, layer, fitting, support)}"
                + (". check_values=False fits it all the same" if tolerable and fitting else "")
            )
    if fitting and not _any(x):
        raise ValueError(
            f"{slot_name(layer)} is zero everywhere: there is nothing to fit. Pass layer= with "
            "the values to fit"
        )


def empty_cells(x: Any) -> int:
    """How many cells have a total of 0."""
    if isinstance(x, StoredMatrix):
        return int((x.survey().totals == 0).sum())
    return int((np.asarray(x.sum(axis=1)).ravel() == 0).sum())


def _not_finite(values: Any) -> Any:
    return ~(np.abs(values) <= _LARGEST)


def _not_whole(values: Any) -> Any:
    return ~((values >= 0) & (values == np.rint(values)) & (values <= _LARGEST))


def _nonzero(values: Any) -> Any:
    return values != 0


def _positive(values: Any) -> Any:
    return values > 0


def _fraction(values: Any) -> Any:
    return np.abs(values - np.rint(values)) > 1e-3


def _find(x: Any, bad: Callable[[Any], Any]) -> tuple[int, Place | None]:
    """How many values of a matrix are bad, and where the first is."""
    if isinstance(x, StoredMatrix):
        # All that may be asked, in one pass.
        return x.survey([*_KINDS, bad]).found[bad]
    values = x.data if sp.issparse(x) else x
    count, first, start = 0, -1, 0
    if values.dtype.kind not in _KINDS.get(bad, "uif"):
        return 0, None
    for part in _blocks(values):
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
    _not_finite: "f",
    fractional: "f",
    _fraction: "f",
    negative: "if",
    _not_whole: "if",
    _positive: "uif",
    _nonzero: "buif",
}


def _any(x: Any) -> bool:
    """Whether any value is not 0."""
    if isinstance(x, StoredMatrix):
        return _find(x, _nonzero)[0] > 0
    return any(bool(part.any()) for part in _blocks(x.data if sp.issparse(x) else x))


def _shown(place: Place, adata: AnnData, layer: str | None, genes: Any, count: int) -> str:
    """A value with its cell and gene, and how many there are such."""
    row, column, value = place
    gene = adata.var_names[column if genes is None else np.arange(adata.n_vars)[genes][column]]
    others = f" ({count} such values in all)" if count > 1 else ""
    return (
        f"{slot_name(layer)} holds {value:g} at cell {adata.obs_names[row]!r}, gene {gene!r}"
        f"{others}"
    )


def _remedy(adata: AnnData, layer: str | None, fitting: bool, support: str) -> str:
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


def warn_of_counts_meant(x: Any, adata: AnnData, layer: str | None, genes: Any) -> None:
    """Warn, at the line that called the verb, where real values stand for counts.

    ``x`` has values that are no whole counts. Where they are all non-negative, and counts lie
    elsewhere, or nearly all of them are whole, or each cell's are multiples of one (normalised
    counts) or the logarithm of that, a Gaussian is hardly what was meant.
    """
    if _find(x, negative)[0]:
        return
    where, how = counts_elsewhere(adata, layer)
    present, _ = _find(x, _positive)
    count, place = _find(x, fractional)
    rounded, _ = _find(x, _fraction)
    if place and rounded < _FEW_FRACTIONS * present:
        shown = _shown(place, adata, layer, genes, count)
        found = f"{shown}, nearly all else is whole"
    elif _multiples(x):
        found = f"{slot_name(layer)} seems to hold normalised counts"
    elif where:
        found = f"{slot_name(layer)} holds no whole numbers"
    else:
        return
    advice = f"{how}: {where} holds whole counts" if where else "Pass layer= with raw counts"
    warnings.warn(
        f"{found}: likelihood='auto' takes a Gaussian. {advice}. Or pass likelihood='gaussian' to "
        "fit these values without this warning",
        stacklevel=6,
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


def _blocks(values: np.ndarray, rows: int = 2**22) -> Any:
    """Runs of at most ``rows`` values in C order, so that checks need no matrix-sized masks."""
    if values.ndim == 1:
        return (values[i : i + rows] for i in range(0, len(values), rows))
    step = max(1, rows // max(1, values.shape[1]))
    return (values[i : i + step].ravel() for i in range(0, len(values), step))
