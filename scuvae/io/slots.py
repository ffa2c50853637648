"""Where results are written."""

from anndata import AnnData


def target(adata: AnnData, copy: bool) -> AnnData:
    """What to write to, once the results are there: a copy of a backed AnnData is in memory."""
    if not copy:
        return adata
    return adata.to_memory(copy=True) if adata.isbacked else adata.copy()
