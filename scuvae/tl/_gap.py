"""tl.amortization_gap: what the encoder costs each cell."""

import numpy as np
import torch
from anndata import AnnData

from scuvae._checks import whole
from scuvae._keys import Keys
from scuvae.inference.local_steps import THOROUGH
from scuvae.inference.refine import refine
from scuvae.io import inputs
from scuvae.io.state import read_fit
from scuvae.tl._shared import CHUNK, cells_of, elbo_gain, resolve_device, target


def amortization_gap(
    adata: AnnData,
    *,
    key: str | None = None,
    max_steps: int = 20,
    n_samples: int = 32,
    device: str = "auto",
    copy: bool = False,
) -> AnnData | None:
    """What the encoder costs each cell: the best ELBO in its family less that of its own q.

    The decoder is frozen; the best q is found by local steps from the encoder's. Both ELBOs are
    taken over the same draws (Cremer, Li & Duvenaud, ICML 2018).

    Parameters
    ----------
    adata
        Fitted by :func:`scuvae.tl.fit` with ``amortized=True`` or ``"semi"``, or projected.
    key
        The fit; None for the default.
    max_steps
        Local steps at most.
    n_samples
        Draws of z per cell for both ELBOs.
    device
        As in :func:`scuvae.tl.fit`.
    copy
        Return a copy with the result and leave ``adata`` alone.

    Returns
    -------
    None, or with ``copy=True`` the AnnData. Sets ``obs["scuvae_amortization_gap"]``: nats per
    cell, float32; zero is a perfect encoder.

    Raises
    ------
    ValueError
        The fit has no encoder, or ``adata`` lacks some of its genes.

    Examples
    --------
    >>> import scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()
    >>> scuvae.tl.fit(adata, amortized=True, max_epochs=5)
    >>> scuvae.tl.amortization_gap(adata)
    >>> bool(adata.obs["scuvae_amortization_gap"].mean() > 0)
    True
    """
    fit = read_fit(inputs.check_anndata(adata), key)
    max_steps, n_samples = whole("max_steps", max_steps), whole("n_samples", n_samples)
    if fit.model.encoder is None:
        raise ValueError(
            f"adata.uns[{Keys.of(key).uns!r}] is a fit with amortized=False: it has no encoder to "
            "judge. Fit with amortized=True or 'semi'"
        )
    where = resolve_device(device)
    cells = cells_of(adata, fit, device=where)
    if cells.observed is not None:
        raise ValueError(
            f"adata.var_names lack {int((~cells.observed).sum())} of the encoder's genes: it "
            "cannot be judged on these cells"
        )
    model = fit.model.to(where)
    gaps = []
    with torch.no_grad():
        for batch in cells.loader(torch.arange(len(cells), device=where), CHUNK):
            encoded = model.encode(batch)
            best = refine(model, batch, [encoded], **(THOROUGH | {"max_steps": max_steps}))
            gaps.append(elbo_gain(model, batch, best, encoded, n_samples=n_samples))

    out = target(adata, copy)
    column = Keys.of(key).obs["amortization_gap"]
    out.obs[column] = torch.cat(gaps).cpu().numpy().astype(np.float32)
    return out if copy else None
