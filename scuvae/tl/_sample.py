"""tl.sample: posterior predictive draws."""

import numpy as np
import torch
from anndata import AnnData
from scipy import sparse as sp

from scuvae._checks import random_state_alias, whole
from scuvae._keys import Keys
from scuvae._random import normal_like
from scuvae.io import inputs
from scuvae.io.fit_state import read_fit
from scuvae.io.further_genes import read_further
from scuvae.io.genes import cells_of, places, spread
from scuvae.io.slots import read_posterior, target
from scuvae.runtime import CHUNK, isolated, random_state, resolve_device


@isolated
@random_state_alias
def sample(
    adata: AnnData,
    *,
    key: str | None = None,
    n_samples: int = 1,
    rng: int | np.random.Generator | None = 0,
    device: str = "auto",
    copy: bool = False,
) -> AnnData | None:
    """Posterior predictive draws: for each cell z ~ q, then x ~ p(x | z) at its size factor.

    Replicates of the data as the fit has them: what differs from ``X`` in distribution is what the
    model does not capture. Draws are independent of each other, each with a z of its own. Genes
    that :func:`scuvae.tl.extend_genes` added are drawn too, from the same z.

    Parameters
    ----------
    adata
        Fitted by :func:`scuvae.tl.fit`, or projected.
    key
        The fit; None for the default.
    n_samples
        How many replicates, each a layer.
    rng
        Seed, Generator or None; ``random_state`` is an alias.
    device
        As in :func:`scuvae.tl.fit`.
    copy
        Return a copy with the result and leave ``adata`` alone.

    Returns
    -------
    None, or with ``copy=True`` the AnnData. Sets ``layers["scuvae_sample"]``, or with more than one
    sample ``layers["scuvae_sample_0"]``, ``layers["scuvae_sample_1"]`` and so on, in place of
    earlier samples: (n_obs, n_vars) float32. Counts, and zeros and ones, are CSR matrices, zero at
    genes that were not modelled, or not observed; values of a Gaussian likelihood are dense
    arrays, NaN at such genes.

    Raises
    ------
    ValueError
        ``adata`` holds no fit under ``key``, or a layer with a sample's name is what was fitted.

    Examples
    --------
    >>> import scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()
    >>> scuvae.tl.fit(adata, max_epochs=5)
    >>> scuvae.tl.sample(adata)
    >>> adata.layers["scuvae_sample"].shape
    (700, 765)
    """
    fit = read_fit(inputs.check_anndata(adata, copy=copy), key)
    n_samples = whole("n_samples", n_samples)
    keys = Keys.of(key)
    if keys.is_sample(fit.layer):
        raise ValueError(
            f"adata.layers[{fit.layer!r}] is what was fitted, and would be overwritten: rename the "
            "layer and fit again under another key_added="
        )
    stored = read_posterior(adata, key)
    where = resolve_device(device)
    cells = cells_of(adata, fit, device=where)
    model = fit.model.to(where)
    discrete = model.likelihood.support != "real"
    stored = stored.to(where)

    columns, position = places(adata, fit, cells)
    genes = torch.as_tensor(position, device=where)
    extended = read_further(adata, key, fit)
    parts: list[list[sp.csr_matrix | np.ndarray]] = [[] for _ in range(n_samples)]
    kept: list[torch.Tensor] = []  # z, for further genes
    everyone = torch.arange(len(cells), device=where)
    with torch.no_grad(), random_state(rng, where):
        for batch in cells.loader(everyone, CHUNK):
            q = stored[batch.index]
            for part in parts:
                z = q.draw(normal_like(q.mean))
                eta = model.decoder(z, batch.covariates)
                size = model.size_factor(batch, eta)
                values = model.likelihood_of(batch.covariates).sample(eta, size, batch.observed)
                drawn = values[:, genes].cpu().numpy().astype(np.float32)
                part.append(_widened(drawn, columns, adata.n_vars, discrete))
                if extended is not None:
                    kept.append(z)
        # After all others, whose draws then are what they are without these.
        if extended is not None:
            more, wide = extended.cells(adata, cells, where), extended.model.to(where)
            columns, position = extended.places(adata, more)
            genes = torch.as_tensor(position, device=where)
            for n, batch in enumerate(more.loader(everyone, CHUNK)):
                for i, part in enumerate(parts):
                    eta = wide.decoder(kept[n * n_samples + i], batch.covariates)
                    size = wide.size_factor(batch, eta)
                    likelihood = wide.likelihood_of(batch.covariates)
                    values = likelihood.sample(eta, size, batch.observed)
                    drawn = values[:, genes].cpu().numpy().astype(np.float32)
                    part[n] = part[n] + _widened(drawn, columns, adata.n_vars, discrete)

    out = target(adata, copy)
    keys.clear_samples(out)
    for name, part in zip(keys.samples(n_samples), parts, strict=True):
        out.layers[name] = sp.vstack(part, format="csr") if discrete else np.concatenate(part)
        part.clear()
    return out if copy else None


def _widened(
    values: np.ndarray, columns: np.ndarray, n_vars: int, discrete: bool
) -> sp.csr_matrix | np.ndarray:
    """``values`` at ``columns``, which ascend, among zeros that are not stored, or NaN."""
    if discrete:
        return spread(sp.csr_matrix(values), columns, n_vars)
    wide = np.full((len(values), n_vars), np.nan, np.float32)
    wide[:, columns] = values
    return wide
