"""tl.score: what each cell's posterior is worth."""

import numpy as np
import torch
from anndata import AnnData

from scuvae._checks import random_state_alias, whole
from scuvae._keys import Keys
from scuvae.inference.objectives import elbo, log_evidence_bound
from scuvae.io import inputs
from scuvae.io.state import read_fit, read_posterior
from scuvae.model import gaussian, raw_scale
from scuvae.tl._shared import CHUNK, cells_of, random_state, resolve_device, target

_DRAWS_AT_ONCE = 10


@random_state_alias
def score(
    adata: AnnData,
    *,
    key: str | None = None,
    n_samples: int = 100,
    rng: int | np.random.Generator | None = 0,
    device: str = "auto",
    copy: bool = False,
) -> AnnData | None:
    """Score each cell's posterior: the ELBO, its two parts, and the importance-weighted bound.

    Parameters
    ----------
    adata
        Fitted by :func:`scuvae.tl.fit`, or projected.
    key
        The fit; None for the default.
    n_samples
        Draws of z per cell. The bound rises with them.
    rng
        Seed, Generator or None; ``random_state`` is an alias.
    device
        As in :func:`scuvae.tl.fit`.
    copy
        Return a copy with the result and leave ``adata`` alone.

    Returns
    -------
    None, or with ``copy=True`` the AnnData. Sets, per cell in nats, float32, higher is better:

    ``obs["scuvae_elbo"]``
        E_q[log p(x | z)] − KL(q ‖ prior).
    ``obs["scuvae_reconstruction"]``, ``obs["scuvae_kl"]``
        Its two parts; the KL is analytic.
    ``obs["scuvae_log_evidence"]``
        ln (1/S) Σ_s p(x, z_s)/q(z_s), a bound on log p(x) above the ELBO (Burda, Grosse &
        Salakhutdinov, ICLR 2016).

    Raises
    ------
    ValueError
        ``adata`` holds no fit under ``key``.

    Examples
    --------
    >>> import scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()
    >>> scuvae.tl.fit(adata, max_epochs=5)
    >>> scuvae.tl.score(adata, n_samples=10)
    >>> bool(adata.obs["scuvae_log_evidence"].mean() > adata.obs["scuvae_elbo"].mean())
    True
    """
    fit = read_fit(inputs.check_anndata(adata), key)
    n_samples = whole("n_samples", n_samples)
    stored = read_posterior(adata, key)
    where = resolve_device(device)
    cells = cells_of(adata, fit, device=where)
    model = fit.model.to(where)
    mean, raw = stored.mean.to(where), raw_scale(stored).to(where)

    columns: dict[str, list[torch.Tensor]] = {
        name: [] for name in ("elbo", "reconstruction", "kl", "log_evidence")
    }
    with torch.no_grad(), random_state(rng, where):
        for batch in cells.loader(torch.arange(len(cells), device=where), CHUNK):
            q = gaussian(mean[batch.index], raw[batch.index])
            reconstruction = torch.zeros_like(batch.size_factor)
            for first in range(0, n_samples, _DRAWS_AT_ONCE):
                n = min(_DRAWS_AT_ONCE, n_samples - first)
                part = elbo(model, batch, q, n)
                reconstruction += part.reconstruction * n / n_samples
            columns["reconstruction"].append(reconstruction)
            columns["kl"].append(part.kl)
            columns["elbo"].append(reconstruction - part.kl)
            columns["log_evidence"].append(
                log_evidence_bound(model, batch, q, n_samples, draws_at_once=_DRAWS_AT_ONCE)
            )

    out = target(adata, copy)
    for name, values in columns.items():
        out.obs[Keys.of(key).obs[name]] = torch.cat(values).cpu().numpy().astype(np.float32)
    return out if copy else None
