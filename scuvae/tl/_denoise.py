"""tl.denoise: posterior mean expression."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch.nn import functional as F

from scuvae._checks import flag, names, real, whole
from scuvae._errors import near
from scuvae._keys import Keys
from scuvae.inference.gene_totals import DENOISING_DRAWS
from scuvae.inference.local_steps import draw, normal_points
from scuvae.io import inputs
from scuvae.io.state import Fit, read_fit, read_posterior
from scuvae.model import Batch, gaussian, raw_scale
from scuvae.tl._shared import CHUNK, cells_of, places, resolve_device, target


def denoise(
    adata: AnnData,
    *,
    key: str | None = None,
    layer_added: str | None = None,
    library_size: float | None = None,
    genes: Sequence[str] | None = None,
    batch: str | Sequence[str] | None = None,
    return_scale: bool = False,
    n_samples: int = DENOISING_DRAWS,
    device: str = "auto",
    copy: bool = False,
) -> AnnData | pd.DataFrame | tuple[pd.DataFrame, pd.DataFrame] | None:
    """Posterior mean expression: E_q[E[x | z]] for each cell and gene.

    On the scale of the data: counts at the cell's own size factor, or Gaussian means. Every gene's
    means add up to its counts over all cells of a fit to counts.

    Parameters
    ----------
    adata
        Fitted by :func:`scuvae.tl.fit`, or projected.
    key
        The fit; None for the default.
    layer_added
        The layer to write; None for ``"scuvae_denoised"``, or ``"k_denoised"`` with ``key="k"``.
    library_size
        A total over the fit's genes, in counts, that every cell is given: 1 for shares, 1e4 for
        what scanpy normalises to. None: the cell's own.
    genes
        Names of genes: their means are returned as a DataFrame, and nothing is written.
    batch
        For fits with batches: the name of one that every cell is decoded as if it came from, or a
        list of names to average over. None: the cell's own.
    return_scale
        With ``genes``: return also the posterior standard deviations of the means.
    n_samples
        Fixed draws of z per cell; 0 decodes the posterior mean alone.
    device
        As in :func:`scuvae.tl.fit`.
    copy
        Return a copy with the result and leave ``adata`` alone.

    Returns
    -------
    With ``genes`` a DataFrame, (n_obs, genes), float32, and with ``return_scale`` another one, of
    the standard deviations of E[x | z] under q. Else None, or with ``copy=True`` the AnnData. Sets
    ``layers["scuvae_denoised"]``, a dense float32 array (n_obs, n_vars): NaN at genes that were not
    modelled, or not observed.

    Raises
    ------
    ValueError, TypeError
        ``adata`` holds no fit under ``key``, ``layer_added`` is the layer that was fitted, a gene
        or a batch is none of the fit's, or a Gaussian fit is given a ``library_size``.

    Examples
    --------
    >>> import scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()
    >>> scuvae.tl.fit(adata, max_epochs=5)
    >>> scuvae.tl.denoise(adata)
    >>> adata.layers["scuvae_denoised"].shape
    (700, 765)
    >>> scuvae.tl.denoise(adata, genes=["CD3D", "LYZ"], library_size=1e4).shape
    (700, 2)
    """
    fit = read_fit(inputs.check_anndata(adata), key)
    n_samples = whole("n_samples", n_samples, at_least=0)
    flag("return_scale", return_scale)
    flag("copy", copy)
    layer_added = Keys.of(key).layer if layer_added is None else layer_added
    if not isinstance(layer_added, str) or not layer_added or layer_added == fit.layer:
        taken = ", the layer that was fitted" if layer_added == fit.layer else ""
        raise ValueError(
            f"layer_added={layer_added!r}{taken}: pass another name, or None for "
            f"{Keys.of(key).layer!r}"
        )
    if library_size is not None:
        library_size = real("library_size", library_size, above=0.0)
        if not fit.model.likelihood.counts:
            raise ValueError(
                f"library_size={library_size:g}, but the fit is {fit.model.likelihood.name}, whose "
                "means have no total: pass None"
            )
    if return_scale and genes is None:
        raise ValueError("return_scale=True returns a DataFrame: pass genes= as well")
    codes = _codes(fit, batch)
    stored = read_posterior(adata, key)
    where = resolve_device(device)
    cells = cells_of(adata, fit, device=where)
    model = fit.model.to(where)
    mean, raw = stored.mean.to(where), raw_scale(stored).to(where)
    points = normal_points(n_samples, mean) if n_samples else mean.new_zeros(1, 1, mean.shape[1])

    columns, found = places(adata, fit, cells)
    if genes is not None:
        columns, found = _chosen(adata, names("genes", genes), columns, found)
    shape = adata.shape if genes is None else (adata.n_obs, len(found))
    layer = np.full(shape, np.nan, np.float32)
    scale = np.zeros(shape, np.float32) if return_scale else None
    at = columns if genes is None else np.arange(len(found))
    with torch.no_grad():
        for own in cells.loader(torch.arange(len(cells), device=where), CHUNK):
            q = gaussian(mean[own.index], raw[own.index])
            expected = torch.zeros(len(own), len(found), device=where)
            squares = torch.zeros_like(expected) if return_scale else None
            for point in points:
                z = draw(q, point)
                values = torch.zeros_like(expected)
                for covariates in _covariates(fit, own, codes):
                    eta = model.decoder(z, covariates)
                    size = model.size_factor(own, eta)
                    if library_size is not None:
                        # Of a total over all genes the observed ones have their share.
                        size = torch.full_like(size, library_size)
                        if own.observed is not None:
                            share = eta[:, own.observed].logsumexp(-1) - eta.logsumexp(-1)
                            size = size * share.exp()
                    values += model.likelihood.mean(eta, size, own.observed)[:, found]
                values /= max(1, len(codes))
                expected += values / len(points)
                if squares is not None:
                    squares += values.square() / len(points)
            rows = own.index.cpu().numpy()
            layer[rows[:, None], at] = expected.cpu().numpy()
            if scale is not None and squares is not None:
                spread = (squares - expected.square()).clamp_min(0).sqrt()
                scale[rows[:, None], at] = spread.cpu().numpy()

    if genes is not None:
        frames = [
            pd.DataFrame(part, index=adata.obs_names, columns=adata.var_names[columns])
            for part in (layer, scale)
            if part is not None
        ]
        return (frames[0], frames[1]) if return_scale else frames[0]
    out = target(adata, copy)
    out.layers[layer_added] = layer
    return out if copy else None


def _codes(fit: Fit, batch: str | Sequence[str] | None) -> list[int]:
    """The batches to decode as if from, by their place among the fit's; none for cells' own."""
    if batch is None:
        return []
    chosen = [batch] if isinstance(batch, str) else [str(name) for name in batch]
    if not fit.batches:
        raise ValueError(f"batch={batch!r}, but the fit knows no batches: pass None")
    if not chosen:
        raise ValueError("batch=[] names none of the fit's batches: pass some, or None")
    for name in chosen:
        if name not in fit.batches:
            raise ValueError(
                f"batch={name!r} is none of the fit's batches. {near(name, fit.batches)}"
            )
    return [fit.batches.index(name) for name in chosen]


def _covariates(fit: Fit, batch: Batch, codes: list[int]) -> list[torch.Tensor | None]:
    """What the decoder is told: the cells' own batches, or each of some in turn."""
    if not codes:
        return [batch.covariates]
    every = torch.tensor(codes, device=batch.index.device)
    one_hot = F.one_hot(every, len(fit.batches)).to(batch.size_factor)
    return [row.expand(len(batch), -1) for row in one_hot]


def _chosen(
    adata: AnnData, wanted: list[str], columns: np.ndarray, found: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Of the genes that are modelled and observed those that are wanted, in that order."""
    there = adata.var_names[columns]
    position = there.get_indexer(wanted)
    if (position < 0).any():
        name = wanted[int((position < 0).argmax())]
        raise ValueError(
            f"genes: {name!r} is none of the {len(there)} genes that are modelled and observed. "
            f"{near(name, there)}"
        )
    return columns[position], found[position]
