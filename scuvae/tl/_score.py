"""tl.score: what each cell's posterior is worth."""

import numpy as np
import torch
from anndata import AnnData

from scuvae._checks import random_state_alias, whole
from scuvae._keys import Keys
from scuvae.inference.evaluation.annealed_importance_sampling import annealed_log_evidence
from scuvae.inference.evaluation.importance_sampling import draw_weights, ledger
from scuvae.io import inputs
from scuvae.io.fit_state import read_fit
from scuvae.io.genes import cells_of
from scuvae.io.slots import read_posterior, target
from scuvae.runtime import CHUNK, isolated, random_state, resolve_device


@isolated
@random_state_alias
def score(
    adata: AnnData,
    *,
    key: str | None = None,
    n_samples: int = 100,
    n_anneal: int = 0,
    rng: int | np.random.Generator | None = 0,
    device: str = "auto",
    copy: bool = False,
) -> AnnData | None:
    """Score each cell's posterior: the ELBO, the importance-weighted bound, and their errors.

    Parameters
    ----------
    adata
        Fitted by :func:`scuvae.tl.fit`, or projected.
    key
        The fit; None for the default.
    n_samples
        Draws of z per cell, the same for all columns. The bound rises with them.
    n_anneal
        Distributions on the way from q to p(z | x) for annealed importance sampling, the careful
        estimate where ``pareto_k`` is above .7: some hundreds. It takes 64 gradients each; 0 for
        none.
    rng
        Seed, Generator or None; ``random_state`` is an alias.
    device
        As in :func:`scuvae.tl.fit`.
    copy
        Return a copy with the result and leave ``adata`` alone.

    Returns
    -------
    None, or with ``copy=True`` the AnnData. Sets, per cell, in nats but where it says otherwise,
    float32, higher is better:

    ``obs["scuvae_elbo"]``, ``obs["scuvae_elbo_se"]``
        E_q[log p(x | z)] − KL(q ‖ prior), and its Monte-Carlo standard error.
    ``obs["scuvae_reconstruction"]``, ``obs["scuvae_kl"]``
        Its two parts; the KL is analytic, so the error is that of the reconstruction alone.
    ``obs["scuvae_log_evidence"]``, ``obs["scuvae_log_evidence_se"]``
        ln (1/S) Σ_s w_s with w_s = p(x, z_s)/q(z_s), a bound on log p(x) above the ELBO (Burda,
        Grosse & Salakhutdinov, ICLR 2016); its error by the delta method, sd(w/w̄)/√S.
    ``obs["scuvae_effective_sample_size"]``
        (Σ w)²/Σ w² in draws, between 1 and ``n_samples``.
    ``obs["scuvae_pareto_k"]``
        Shape of the weights' tail (Vehtari et al., JMLR 2024), no unit, lower is better: above .7
        neither the bound nor its error is to be relied on. NaN for fewer than 21 draws.
    ``obs["scuvae_log_evidence_annealed"]``, ``obs["scuvae_log_evidence_annealed_se"]``
        With ``n_anneal``: log p(x) by annealed importance sampling from q over 16 chains (Neal,
        Statistics and Computing 2001), and its error.

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
    fit = read_fit(inputs.check_anndata(adata, copy=copy), key)
    n_samples = whole("n_samples", n_samples)
    n_anneal = whole("n_anneal", n_anneal, at_least=0)
    stored = read_posterior(adata, key)
    where = resolve_device(device)
    cells = cells_of(adata, fit, device=where)
    model = fit.model.to(where)
    stored = stored.to(where)

    columns: dict[str, list[torch.Tensor]] = {}
    with torch.no_grad(), random_state(rng, where):
        for batch in cells.loader(torch.arange(len(cells), device=where), CHUNK):
            q = stored[batch.index]
            (draws,) = draw_weights(model, batch, [q], n_samples)
            found = ledger(draws)
            if n_anneal:
                annealed, error = annealed_log_evidence(model, batch, q, n_anneal)
                found |= {"log_evidence_annealed": annealed, "log_evidence_annealed_se": error}
            for name, values in found.items():
                columns.setdefault(name, []).append(values)

    out = target(adata, copy)
    keys = Keys.of(key)
    keys.clear_obs(out, "log_evidence_annealed", "log_evidence_annealed_se")
    for name, parts in columns.items():
        out.obs[keys.obs[name]] = torch.cat(parts).cpu().numpy().astype(np.float32)
    return out if copy else None
