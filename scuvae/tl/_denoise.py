"""tl.denoise: posterior mean expression."""

import numpy as np
import torch
from anndata import AnnData

from scuvae._checks import whole
from scuvae._keys import Keys
from scuvae.inference.gene_totals import DENOISING_DRAWS
from scuvae.inference.local_steps import draw, normal_points
from scuvae.io import inputs
from scuvae.io.state import read_fit, read_posterior
from scuvae.model import gaussian, raw_scale
from scuvae.tl._shared import CHUNK, cells_of, places, resolve_device, target


def denoise(
    adata: AnnData,
    *,
    key: str | None = None,
    layer_added: str | None = None,
    n_samples: int = DENOISING_DRAWS,
    device: str = "auto",
    copy: bool = False,
) -> AnnData | None:
    """Posterior mean expression: E_q[E[x | z]] for each cell and gene.

    On the scale of the data: counts at the cell's own size factor, or Gaussian means.

    Parameters
    ----------
    adata
        Fitted by :func:`scuvae.tl.fit`, or projected.
    key
        The fit; None for the default.
    layer_added
        The layer to write; None for ``"scuvae_denoised"``, or ``"k_denoised"`` with ``key="k"``.
    n_samples
        Fixed draws of z per cell; 0 decodes the posterior mean alone.
    device
        As in :func:`scuvae.tl.fit`.
    copy
        Return a copy with the result and leave ``adata`` alone.

    Returns
    -------
    None, or with ``copy=True`` the AnnData. Sets ``layers["scuvae_denoised"]``, a dense float32
    array (n_obs, n_vars): NaN at genes that were not modelled, or not observed.

    Raises
    ------
    ValueError
        ``adata`` holds no fit under ``key``, or ``layer_added`` is the layer that was fitted.

    Examples
    --------
    >>> import scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()
    >>> scuvae.tl.fit(adata, max_epochs=5)
    >>> scuvae.tl.denoise(adata)
    >>> adata.layers["scuvae_denoised"].shape
    (700, 765)
    """
    fit = read_fit(inputs.check_anndata(adata), key)
    n_samples = whole("n_samples", n_samples, at_least=0)
    layer_added = Keys.of(key).layer if layer_added is None else layer_added
    if not isinstance(layer_added, str) or not layer_added or layer_added == fit.layer:
        taken = ", the layer that was fitted" if layer_added == fit.layer else ""
        raise ValueError(
            f"layer_added={layer_added!r}{taken}: pass another name, or None for "
            f"{Keys.of(key).layer!r}"
        )
    stored = read_posterior(adata, key)
    where = resolve_device(device)
    cells = cells_of(adata, fit, device=where)
    model = fit.model.to(where)
    mean, raw = stored.mean.to(where), raw_scale(stored).to(where)
    points = normal_points(n_samples, mean) if n_samples else mean.new_zeros(1, 1, mean.shape[1])

    columns, genes = places(adata, fit, cells)
    layer = np.full(adata.shape, np.nan, np.float32)
    with torch.no_grad():
        for batch in cells.loader(torch.arange(len(cells), device=where), CHUNK):
            q = gaussian(mean[batch.index], raw[batch.index])
            expected = torch.zeros(len(batch), len(genes), device=where)
            for point in points:
                eta = model.decoder(draw(q, point), batch.covariates)
                size = model.size_factor(batch, eta)
                values = model.likelihood.mean(eta, size, batch.observed)
                expected += values[:, genes] / len(points)
            rows = batch.index.cpu().numpy()
            layer[rows[:, None], columns] = expected.cpu().numpy()

    out = target(adata, copy)
    out.layers[layer_added] = layer
    return out if copy else None
