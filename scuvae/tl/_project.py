"""tl.project: q for cells that a fit has not seen."""

from os import PathLike
from typing import Any

import anndata
import torch
from anndata import AnnData

from scuvae._checks import one_of, whole
from scuvae._keys import Keys
from scuvae.inference.refine import as_family, concatenate, prior_start, refine
from scuvae.inference.validation import start
from scuvae.io import inputs
from scuvae.io.state import read_entry, read_fit, write_posterior
from scuvae.model.gaussian import COVARIANCES
from scuvae.tl._shared import CHUNK, cells_of, resolve_device, target


def project(
    adata: AnnData,
    reference: AnnData | str | PathLike[str],
    *,
    key: str | None = None,
    layer: str | None = None,
    key_added: str | None = None,
    amortized: bool = False,
    covariance: str | None = None,
    max_steps: int = 20,
    device: str = "auto",
    copy: bool = False,
) -> AnnData | None:
    """Find the posteriors of new cells under a fitted model, its decoder untouched.

    Genes are matched by name. Genes that ``adata`` lacks are left out of the likelihood, which is
    exact conditioning on the observed ones; genes that the reference does not know are not used.
    A cell's posterior depends on no other cell.

    Parameters
    ----------
    adata
        New cells.
    reference
        A fitted AnnData, or the path of one (``.h5ad`` or ``.zarr``).
    key
        The reference's fit; None for the default.
    layer
        Where the new cells' values are; None: where the reference's were.
    key_added
        Name of the projection's slots; None for the default names.
    amortized
        True: the encoder's q as it is. False: local steps from the prior, and from the encoder
        where there is one; the better is kept for each cell.
    covariance
        ``"full"`` or ``"diagonal"``; None: as in the fit.
    max_steps
        Local steps at most; a cell stops when it has converged.
    device
        As in :func:`scuvae.tl.fit`.
    copy
        Return a copy with the result and leave ``adata`` alone.

    Returns
    -------
    None, or with ``copy=True`` the AnnData. Sets ``obsm["X_scuvae"]``, ``obsm["X_scuvae_scale"]``,
    for a full covariance ``obsm["X_scuvae_covariance"]``, and ``uns["scuvae"]`` with the
    reference's model, so that ``adata`` can be scored and denoised by itself.

    Raises
    ------
    ValueError
        The reference holds no fit; no gene in common; a batch that the fit has not seen; values
        that its likelihood cannot have; ``amortized=True`` without an encoder or with genes
        missing.

    Examples
    --------
    >>> import scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()
    >>> old, new = adata[:600].copy(), adata[600:, ::2].copy()
    >>> scuvae.tl.fit(old, max_epochs=5)
    >>> scuvae.tl.project(new, old)
    >>> new.obsm["X_scuvae"].shape
    (100, 10)
    """
    inputs.check_anndata(adata)
    if isinstance(reference, str | PathLike):
        reference = _read(reference)
    inputs.check_anndata(reference)
    fit = read_fit(reference, key)
    covariance = one_of("covariance", covariance or fit.params["covariance"], COVARIANCES)
    max_steps = whole("max_steps", max_steps)
    where = resolve_device(device)
    cells = cells_of(adata, fit, layer, where)
    if amortized and (fit.model.encoder is None or cells.observed is not None):
        lacks = (
            "the fit has no encoder"
            if fit.model.encoder is None
            else f"{int((~cells.observed).sum())} of the encoder's genes are missing"  # type: ignore[operator]
        )
        raise ValueError(f"amortized=True, but {lacks}: pass amortized=False")

    model = fit.model.to(where)
    parts = []
    everyone = torch.arange(len(cells), device=where)
    with torch.no_grad():
        for batch in cells.loader(everyone, CHUNK):
            if amortized:
                parts.append(as_family(model.encode(batch), covariance))
                continue
            starts = [prior_start(model, len(batch), covariance)]
            if model.encoder is not None and batch.observed is None:
                starts.append(start(model, batch, covariance))
            parts.append(
                refine(
                    model,
                    batch,
                    starts,
                    local_step=str(fit.params["local_step"]),
                    **_steps(fit.params, max_steps),
                )
            )

    out = target(adata, copy)
    keys = Keys.of(key_added)
    keys.clear(out)
    write_posterior(out, key_added, concatenate(parts), covariance)
    entry = read_entry(reference, key)
    params = dict(entry["params"])
    if layer is not None:
        params["layer"] = layer
    out.uns[keys.uns] = {**entry, "params": {**params, "covariance": covariance}}
    return out if copy else None


def _steps(params: dict[str, Any], max_steps: int) -> dict[str, Any]:
    # Gradient steps have no way to tell that a cell has converged: their own number stands.
    steps = {} if params["local_step"] == "gradient" else {"max_steps": max_steps}
    return {**steps, "kl_weight": float(params["kl_weight"])}


def _read(path: str | PathLike[str]) -> AnnData:
    if str(path).rstrip("/").endswith(".zarr"):
        return anndata.read_zarr(str(path))
    return anndata.read_h5ad(path)
