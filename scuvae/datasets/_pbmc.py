"""Real counts that come with scanpy, so that nothing is downloaded."""

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

SHAPE = (700, 765)
# scanpy's copy holds log1p(counts per 10,000) rounded to three decimals, in float32.
TARGET_SUM = 1e4
ROUNDING = 0.5e-3 + 1e-6

OBS_COLUMNS = {
    "bulk_labels": "cell_type",
    "n_counts": "n_counts",
    "n_genes": "n_genes",
    "percent_mito": "percent_mito",
}


def pbmc68k_counts() -> AnnData:
    """Counts of 700 blood cells over 765 genes, from the copy inside scanpy.

    :func:`scanpy.datasets.pbmc68k_reduced` holds log-normalised values. Their counts are
    recovered as ``expm1(raw.X) * n_counts / 1e4``, rounded to whole numbers, and the recovery is
    checked on every call. Nothing is downloaded.

    Returns
    -------
    AnnData
        ``X``
            Counts (unique molecular identifiers), whole numbers in a float32 CSR matrix.
        ``obs``
            ``cell_type``, categorical, ten levels: scanpy's ``bulk_labels``, by similarity to
            bulk-sorted populations. ``n_counts``, ``n_genes``, ``percent_mito``: of the whole
            transcriptome, of which these 765 genes hold about a fifth. Row sums of ``X`` are
            therefore smaller than ``n_counts``.
        ``uns``
            ``cell_type_colors`` as scanpy plots them, and the source in ``pbmc68k_counts``.

    Raises
    ------
    RuntimeError
        If scanpy's copy no longer yields exact counts.

    References
    ----------
    Zheng et al. (2017), Massively parallel digital transcriptional profiling of single cells,
    Nature Communications 8, 14049.

    Examples
    --------
    >>> import scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()
    >>> adata.shape, int(adata.X.sum())
    ((700, 765), 486651)
    >>> adata.obs["cell_type"].value_counts().head(2).to_dict()
    {'Dendritic': 240, 'CD14+ Monocyte': 129}
    """
    # Seconds to import, so only on use.
    import scanpy as sc

    reduced = sc.datasets.pbmc68k_reduced()
    missing = set(OBS_COLUMNS).difference(reduced.obs)
    if missing:
        raise _changed(f"obs lacks {sorted(missing)}")
    if reduced.raw is None or reduced.raw.shape != SHAPE:
        found = None if reduced.raw is None else reduced.raw.shape
        raise _changed(f"raw has shape {found}, not {SHAPE}")

    adata = AnnData(
        _counts(reduced.raw.X, reduced.obs["n_counts"].to_numpy(np.float64)),
        obs=reduced.obs[list(OBS_COLUMNS)].rename(columns=OBS_COLUMNS).rename_axis(None),
        var=pd.DataFrame(index=reduced.raw.var_names).rename_axis(None),
    )
    adata.uns["pbmc68k_counts"] = {
        "source": "scanpy.datasets.pbmc68k_reduced",
        "reference": "Zheng et al. 2017, doi:10.1038/ncomms14049",
        "recovered_as": "rint(expm1(raw.X) * n_counts / 1e4)",
    }
    if "bulk_labels_colors" in reduced.uns:
        adata.uns["cell_type_colors"] = np.array(reduced.uns["bulk_labels_colors"], dtype=object)
    return adata


def _counts(lognorm: object, totals: np.ndarray) -> sparse.csr_matrix:
    """Invert log1p(count / total * 1e4), or fail: a count off by one must never pass."""
    counts = sparse.csr_matrix(lognorm, dtype=np.float64, copy=True)
    counts.sort_indices()
    if not ((totals > 0) & (totals == np.rint(totals))).all():
        raise _changed("obs['n_counts'] holds values that are not positive whole numbers")
    per_count = np.repeat(TARGET_SUM / totals, np.diff(counts.indptr))
    unrounded = np.expm1(counts.data) / per_count
    whole = np.rint(unrounded)

    # Rounded logs leave large counts a little off; a quarter is still unambiguous.
    off = np.abs(unrounded - whole)
    if not (off < 0.25).all():
        raise _changed(f"a recovered value is {np.max(off):.3g} away from a whole count")
    if not (whole >= 1).all():
        raise _changed(f"a stored value is a count of {np.min(whole):.0f}")
    error = np.abs(np.log1p(whole * per_count) - counts.data)
    if not (error <= ROUNDING).all():
        raise _changed(f"re-normalised counts differ from raw.X by up to {np.max(error):.3g}")
    counts.data = whole
    if not (np.asarray(counts.sum(axis=1)).ravel() <= totals).all():
        raise _changed("a cell's counts exceed its obs['n_counts']")
    return counts.astype(np.float32)


def _changed(what: str) -> RuntimeError:
    return RuntimeError(
        "Exact counts cannot be recovered from scanpy.datasets.pbmc68k_reduced(): "
        f"{what}. The copy that this scanpy ships differs from the one in scanpy 1.10 to 1.12."
    )
