"""tl.project: q for cells that a fit has not seen."""

import copy as copying
import warnings
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import anndata
import torch
from anndata import AnnData
from torch.distributions import Distribution

from scuvae._checks import flag, one_of, whole
from scuvae._keys import Keys
from scuvae.inference.refine import likeliest_start, refine
from scuvae.inference.validation import encoded, start
from scuvae.io import inputs
from scuvae.io.sources import Cells
from scuvae.io.state import moments, read_entry, read_fit, write_posterior
from scuvae.model import VAE, Batch
from scuvae.model.gaussian import COVARIANCES
from scuvae.tl._shared import CHUNK, cells_of, resolve_device, step_options, target


def project(
    adata: AnnData,
    reference: AnnData | str | PathLike[str],
    *,
    key: str | None = None,
    layer: str | None = None,
    key_added: str | None = None,
    amortized: bool = False,
    covariance: str | None = None,
    max_steps: int | None = None,
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
        A fitted AnnData, or the path of one (``.h5ad`` or ``.zarr``). Its cells are not used.
    key
        The reference's fit; None for the default.
    layer
        Where the new cells' values are; None: where the reference's were.
    key_added
        Name of the projection's slots; None for the default names.
    amortized
        True: the encoder's q as it is. False: local steps from the likeliest of some hundred draws
        of the prior, and from the encoder where there is one; the better is kept for each cell.
    covariance
        ``"full"`` or ``"diagonal"``; None: as in the fit.
    max_steps
        Local steps at most. None: 20 natural ones, of which a cell takes as many as it needs, or
        for another rule its own number.
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
    keys = Keys.of(key_added)
    flag("amortized", amortized)
    if max_steps is not None:
        max_steps = whole("max_steps", max_steps)
    if covariance is not None:
        one_of("covariance", covariance, COVARIANCES)
    reference = read_reference(reference)
    fit = read_fit(reference, key)
    entry = copying.deepcopy(read_entry(reference, key))
    if layer is not None:
        entry["params"]["layer"] = layer
    if covariance is None:
        covariance = str(fit.params["covariance"])
    options = step_options(str(fit.params["local_step"]), max_steps, fit.params)
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
    found = projected(model, cells, covariance, amortized=amortized, **options)
    parts = [q for _, q in found]
    if model.likelihood.counts:
        empty = int((cells.source.totals() == 0).sum())
        if empty:
            warnings.warn(
                f"{empty} cells have no counts in the fit's genes: they say nothing about z",
                stacklevel=2,
            )
    out = target(adata, copy)
    keys.clear(out)
    write_posterior(out, key_added, moments(parts, covariance))
    out.uns[keys.uns] = entry
    return out if copy else None


@torch.no_grad()
def projected(
    model: VAE, cells: Cells, covariance: str, *, amortized: bool = False, **options: Any
) -> Iterator[tuple[Batch, Distribution]]:
    """The cells a chunk at a time, in order, and their q."""
    everyone = torch.arange(len(cells), device=cells.size_factor.device)
    for batch in cells.loader(everyone, CHUNK):
        if amortized:
            yield batch, encoded(model, batch, covariance)
            continue
        starts = [likeliest_start(model, batch, covariance)]
        if model.encoder is not None and batch.observed is None:
            starts.append(start(model, batch, covariance))
        yield batch, refine(model, batch, starts, **options)


def read_reference(reference: AnnData | str | PathLike[str]) -> AnnData:
    """A reference in memory, or read from the file that it is the path of."""
    if isinstance(reference, str | PathLike):
        reference = _read(reference)
    inputs.check_type(reference, "reference")
    return reference


def _read(path: str | PathLike[str]) -> AnnData:
    if not Path(path).exists():
        raise FileNotFoundError(
            f"reference={str(path)!r} does not exist: pass a fitted AnnData, or the path of one"
        )
    if Path(path).is_dir():
        return anndata.read_zarr(str(path))
    return anndata.read_h5ad(path)
