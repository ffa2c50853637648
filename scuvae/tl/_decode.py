"""tl.decode: what the decoder makes of points of the latent space."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from scuvae._checks import names
from scuvae._errors import near
from scuvae.io import inputs
from scuvae.io.fit_state import Fit, read_entry, read_fit
from scuvae.io.further_genes import read_further
from scuvae.io.genes import cells_of
from scuvae.model import VAE
from scuvae.model.extended_model import ExtendedModel, total_of
from scuvae.runtime import CHUNK, isolated, resolve_device
from scuvae.tl._denoise import checked_library_size, chosen_covariates
from scuvae.tl._embed import common_total


@isolated
def decode(
    adata: AnnData,
    z: np.ndarray | pd.DataFrame,
    *,
    key: str | None = None,
    batch: Any = None,
    covariates: Mapping[str, Any] | None = None,
    library_size: float | None = None,
    genes: Iterable[str] | None = None,
    device: str = "auto",
) -> pd.DataFrame:
    """Expected expression at latent points: along a path, at a cluster's centre, on a grid.

    E[x | z] under the fitted decoder, on the scale of the data. All points are decoded at one
    total, and as from an average over the fit's batches and other covariates, unless told which.

    Parameters
    ----------
    adata
        Fitted by :func:`scuvae.tl.fit`, or projected.
    z
        Points, (points, n_latent), in the coordinates of ``obsm["X_scuvae"]``; the rows of a
        DataFrame keep their names.
    key
        The fit; None for the default.
    batch
        A batch of the fit, several, or ``"average"``; None: the average of all.
    covariates
        Values of other covariates by column, as in :func:`scuvae.tl.denoise`; those left out are
        averaged over, numbers at their mean.
    library_size
        The total of fitted genes to decode at, in counts; None: the median of the fitted cells'
        totals.
    genes
        Names of the genes wanted; None for all that were modelled, then those that
        :func:`scuvae.tl.extend_genes` added.
    device
        As in :func:`scuvae.tl.fit`.

    Returns
    -------
    A DataFrame, points × genes, float32: counts, chances of a one, or Gaussian means. ``adata`` is
    left alone.

    Raises
    ------
    ValueError
        ``adata`` holds no fit under ``key``; ``z`` has another number of dimensions, or values that
        are not finite; an unknown gene, batch or covariate; ``library_size`` where there are no
        totals.

    Examples
    --------
    >>> import scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()
    >>> scuvae.tl.fit(adata, max_epochs=5)
    >>> z = adata.obsm["X_scuvae"][:3]
    >>> scuvae.tl.decode(adata, z, genes=["CD3D", "LYZ"], library_size=1e4).shape
    (3, 2)
    """
    fit = read_fit(inputs.check_anndata(adata), key)
    points = _points(z, fit)
    size = checked_library_size(fit, library_size)
    chosen = chosen_covariates(fit.design, batch, covariates)
    extended = read_further(adata, key, fit)
    known = fit.var_names if extended is None else extended.var_names
    columns = np.arange(len(known))
    if genes is not None:
        wanted = names("genes", genes)
        columns = known.get_indexer(wanted)
        if (columns < 0).any():
            unknown = wanted[int(np.flatnonzero(columns < 0)[0])]
            raise ValueError(f"genes: {unknown!r} was not modelled. {near(unknown, known)}")
    if size is None:
        size = _usual_total(adata, key, fit)
    where = resolve_device(device)
    settings, weights = (part.to(where) for part in _settings(fit, *chosen))
    n_fitted = len(fit.var_names)
    blocks: list[tuple[VAE | ExtendedModel, np.ndarray]] = [(fit.model, columns < n_fitted)]
    if extended is not None:
        blocks.append((extended.model, columns >= n_fitted))
    found = np.empty((len(points), len(columns)), np.float32)
    for part, own in blocks:
        if not own.any():
            continue
        model, rows = part.to(where), 0
        with torch.no_grad():
            for some in points.to(where).split(CHUNK):
                total = some.new_full((len(some),), size)
                value = some.new_zeros(len(some), int(own.sum()))
                for row, weight in zip(settings, weights, strict=True):
                    told = row.expand(len(some), -1) if fit.design.n_columns else None
                    eta = model.decoder(some, told)
                    likelihood = model.likelihood_of(told)
                    mean = likelihood.mean(eta, total_of(model, total, eta), None)
                    value += weight * mean[:, columns[own]]
                found[rows : rows + len(some), own] = value.cpu().numpy()
                rows += len(some)
    index = z.index if isinstance(z, pd.DataFrame) else None
    return pd.DataFrame(found, index, known[columns])


def _points(z: np.ndarray | pd.DataFrame, fit: Fit) -> torch.Tensor:
    if isinstance(z, str):
        raise TypeError(f"z={z!r} is a str: pass the points, such as adata.obsm[{z!r}]")
    try:
        values = np.asarray(z, dtype=np.float32)
    except (TypeError, ValueError):
        raise TypeError(
            f"z is a {type(z).__name__} of what are no numbers: pass the points, such as "
            "adata.obsm['X_scuvae']"
        ) from None
    n_latent = fit.model.n_latent
    if values.ndim != 2 or values.shape[1] != n_latent:
        raise ValueError(f"z has shape {values.shape}: pass (points, {n_latent}), as the fit has")
    if not np.isfinite(values).all():
        row = int(np.argwhere(~np.isfinite(values))[0, 0])
        raise ValueError(f"z is not finite at point {row}: leave it out")
    return torch.from_numpy(values.copy())


def _usual_total(adata: AnnData, key: str | None, fit: Fit) -> float:
    """The total that the map of the fit is at; fits of earlier versions have none."""
    embed = read_entry(adata, key).get("embed")
    return float(embed["total"]) if embed else common_total(cells_of(adata, fit).size_factor)


def _settings(
    fit: Fit, which: torch.Tensor | None, rows: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the decoder is told in turn, and the share of each."""
    usual, weights = fit.design.settings()
    if which is not None and rows is not None:
        usual = torch.cat([torch.where(which, row, usual) for row in rows])
        weights = weights.repeat(len(rows))
    return usual, weights / weights.sum()
