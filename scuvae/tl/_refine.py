"""tl.refine: a better q for fitted cells."""

import copy as copying
from typing import Any

import numpy as np
import torch
from anndata import AnnData

from scuvae._checks import one_of, whole
from scuvae._keys import Keys
from scuvae.batches import Cells
from scuvae.distributions.gaussian import (
    COVARIANCES,
    Gaussian,
    moments,
    select,
)
from scuvae.inference.evaluation.paired_elbo import elbo_gain
from scuvae.inference.refinement.infer import POLISH, Polish, family_of
from scuvae.inference.refinement.initialization import initial_posterior
from scuvae.inference.refinement.moments import match_moments
from scuvae.inference.refinement.refine import LOCAL_STEPS, step_options
from scuvae.inference.refinement.refine import refine as refine_batch
from scuvae.inference.refinement.stein import polish as polish_batch
from scuvae.io import inputs
from scuvae.io.covariates import match_covariates
from scuvae.io.fit_state import read_entry, read_fit, sealed
from scuvae.io.genes import cells_of
from scuvae.io.slots import (
    components_of,
    read_posterior,
    target,
    write_components,
    write_posterior,
)
from scuvae.model import VAE
from scuvae.runtime import chunk_on, isolated, resolve_device
from scuvae.tl._embed import placed, posterior_scale


@isolated
def refine(
    adata: AnnData,
    *,
    key: str | None = None,
    key_added: str | None = None,
    covariance: str | None = None,
    local_step: str = "natural",
    max_steps: int | None = None,
    n_samples: int = 8,
    polish: Polish = False,
    device: str = "auto",
    copy: bool = False,
) -> AnnData | None:
    """Improve the posteriors of fitted cells by local steps, the decoder untouched.

    Repairs what an encoder loses. Each cell starts from its stored q and from the encoder's,
    where there is one; the best of the results and the stored q is kept, so that no cell's ELBO
    falls beyond Monte-Carlo error.

    Parameters
    ----------
    adata
        Fitted by :func:`scuvae.tl.fit`, or projected.
    key
        The fit; None for the default.
    key_added
        Name of the refined fit's slots; None: those of ``key``, replacing its posterior.
    covariance
        ``"full"`` or ``"diagonal"``; None: as stored.
    local_step
        ``"natural"`` or ``"gradient"``.
    max_steps
        Local steps at most. None: 20 natural ones, of which a cell takes as many as it needs, or
        for another rule its own number.
    n_samples
        Fixed draws of z that an expectation under q is taken over.
    polish
        As in :func:`scuvae.tl.project`; with ``"moments"`` ELBOs may fall.
    device
        As in :func:`scuvae.tl.fit`.
    copy
        Return a copy with the result and leave ``adata`` alone.

    Returns
    -------
    None, or with ``copy=True`` the AnnData. Replaces ``obsm["X_scuvae"]``,
    ``obsm["X_scuvae_scale"]``, ``obsm["X_scuvae_covariance"]``, ``obsm["X_scuvae_embed"]``
    (the same map) and ``obs["scuvae_scale"]``; removes the fit's per-cell
    scores from ``obs``, which no longer hold.

    Raises
    ------
    ValueError
        ``adata`` holds no fit under ``key``, or its values have changed beyond the likelihood.

    Examples
    --------
    >>> import scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()
    >>> scuvae.tl.fit(adata, amortized=True, max_epochs=5)
    >>> scuvae.tl.refine(adata, key_added="refined")
    >>> adata.obsm["refined"].shape
    (700, 10)
    """
    fit = read_fit(inputs.check_anndata(adata, copy=copy), key)
    keys = Keys.of(key if key_added is None else key_added)
    keys.check_free(adata)
    if covariance is None:
        covariance = "full" if Keys.of(key).covariance in adata.obsm else "diagonal"
    one_of("covariance", covariance, COVARIANCES)
    one_of("local_step", local_step, LOCAL_STEPS)
    if max_steps is not None:
        max_steps = whole("max_steps", max_steps)
    options = step_options(local_step, max_steps, fit.params)
    options = LOCAL_STEPS[local_step].thorough | options
    n_samples = whole("n_samples", n_samples)
    one_of("polish", polish, POLISH)
    family = family_of(polish, covariance)
    stored = read_posterior(adata, key).as_family(family)
    where = resolve_device(device)
    cells = cells_of(adata, fit, device=where)
    model = fit.model.to(where)
    stored = stored.to(where)

    found = better(model, cells, stored, covariance, options | {"n_samples": n_samples}, polish)
    components = components_of(found, model.prior)
    entry = copying.deepcopy(read_entry(adata, key))
    coordinates = None
    if "embed" in entry:  # fits of earlier versions have none
        mean = torch.as_tensor(found["mean"], device=where)
        coordinates = placed(model, mean, entry["embed"], match_covariates(adata, fit.design))
    entry = sealed(entry)
    # All is at hand: what interrupts a call before here leaves all as it was.
    out = target(adata, copy)
    split = adata.obs.get(Keys.of(key).obs["split"])
    keys.clear(out)
    out.uns[keys.uns] = entry
    if split is not None:
        out.obs[keys.obs["split"]] = split
    write_posterior(out, key if key_added is None else key_added, found)
    out.obs[keys.obs["scale"]] = posterior_scale(found["scale"])
    if coordinates is not None:
        out.obsm[keys.embed] = coordinates
    write_components(out, key if key_added is None else key_added, components)
    return out if copy else None


def better(
    model: VAE,
    cells: Cells,
    stored: Gaussian,
    covariance: str,
    options: dict[str, Any],
    polish: Polish = False,
) -> dict[str, np.ndarray]:
    """Moments of the best q of each cell: the stored one, or that after local steps."""
    where = stored.mean.device
    parts = []
    with torch.no_grad():
        everyone = torch.arange(len(cells), device=where)
        for batch in cells.loader(everyone, chunk_on(where, model.n_vars)):
            starts = [stored[batch.index]]
            if model.encoder is not None and batch.observed is None:
                starts.append(initial_posterior(model, batch, family_of(polish, covariance)))
            refined = refine_batch(model, batch, starts, **options)
            if polish:
                refined = polish_batch(model, batch, refined, kl_weight=options["kl_weight"])
            gain = elbo_gain(model, batch, refined, starts[0], kl_weight=options["kl_weight"])
            best = select([starts[0], refined], (gain > 0).long())
            if polish == "moments":
                matched = match_moments(model, batch, best, kl_weight=options["kl_weight"])
                best = matched.as_family(covariance)
            parts.append(best)

    return moments(parts, covariance)
