"""tl.embed: the map, coordinates whose distances are the decoder's own."""

import copy as copying
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from anndata import AnnData

from scuvae._checks import flag, whole
from scuvae._keys import Keys
from scuvae.inference.mapping.alignment import aligned, fit_alignment
from scuvae.inference.mapping.embedding import Basis, find_basis, place, pulled_back
from scuvae.io import inputs
from scuvae.io.covariates import match_covariates
from scuvae.io.fit_state import read_entry, read_fit, sealed
from scuvae.io.genes import cells_of
from scuvae.io.slots import read_posterior, target
from scuvae.model import VAE
from scuvae.model.covariates import Covariates
from scuvae.runtime import isolated, logger, resolve_device

# More say little of types, and less of them comes back with another seed.
N_COMPONENTS = 15


@isolated
def embed(
    adata: AnnData,
    *,
    key: str | None = None,
    n_components: int | None = None,
    align: bool = True,
    device: str = "auto",
    copy: bool = False,
) -> AnnData | None:
    """Map cells so that Euclidean distance between them is the decoder's own.

    Latent axes have no scale of their own: what counts is what the decoder makes of them. Each
    cell's posterior mean is decoded at one total, the cells' median, as from every batch of the
    fit in turn; each gene's mean is taken to the coordinate in which its likelihood's standard
    deviation is one (2 √θ asinh √(μ/θ) for a negative binomial); batches are averaged, and the
    principal components kept. Of several covariates each level is taken in turn, the others and
    all continuous ones at their mean: no covariate of a cell's own moves it on the map.
    What covariates do to a kind of cells beyond what the decoder is told, and leave in z, is taken
    out first (``align``).
    For ``scanpy.pp.neighbors(adata, use_rep="X_scuvae_embed")``. :func:`scuvae.tl.fit` has done it
    with the defaults; call it for another number of components, or without aligning.

    Parameters
    ----------
    adata
        Cells with a fit.
    key
        The fit; None for the default.
    n_components
        Principal components to keep, at most the number of genes or of cells; by default 15, or the
        latent dimensions where these are more.
    align
        True: cells of a kind are brought together over the levels of covariates, by a regression of
        z on covariates for each kind, as far as it is clear; ``X_scuvae`` is left as it is. It
        needs 250 cells, and covariates of 64 levels at most; kinds that one level alone has stay
        where they are. False: posterior means are decoded as they are.
    device
        As in :func:`scuvae.tl.fit`.
    copy
        Return a copy with the result and leave ``adata`` alone.

    Returns
    -------
    None, or with ``copy=True`` the AnnData. Sets ``obsm["X_scuvae_embed"]``, float32 (n_obs,
    n_components), in standard deviations of one value, and ``uns["scuvae"]["embed"]``: what
    places other cells in the same map (``centre``, ``components``, ``total``, ``n_levels`` of
    each categorical covariate, ``n_obs``; with covariates ``alignment``, which
    :func:`scuvae.tl.denoise` goes by too).

    Raises
    ------
    ValueError, TypeError
        ``adata`` holds no fit under ``key``, or ``n_components`` is no positive whole number.

    Notes
    -----
    The coordinate is v = ∫ dE[x] / √Var[x] (Bartlett, Biometrics 1947); for a negative binomial it
    is also Fisher and Rao's distance. Its pullback to z is Jᵀ diag(w) J, the curvature that natural
    steps use. Components are found from at most 4,096 cells, evenly spaced.

    Aligned are clusters' regressions on covariates, as in Harmony (Korsunsky et al., Nature Methods
    2019), here a mixture of regressions of posterior means by maximum likelihood, whose effects are
    shrunk by how large each covariate's are. Cells of other data are moved by the same mixture.

    Examples
    --------
    >>> import scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()
    >>> scuvae.tl.fit(adata, max_epochs=5)
    >>> scuvae.tl.embed(adata, n_components=10)
    >>> adata.obsm["X_scuvae_embed"].shape
    (700, 10)
    """
    fit = read_fit(inputs.check_anndata(adata, copy=copy), key)
    if n_components is not None:
        n_components = whole("n_components", n_components)
    flag("align", align)
    flag("copy", copy)
    keys = Keys.of(key)
    mean = read_posterior(adata, key).mean
    covariates = match_covariates(adata, fit.design)
    entry = copying.deepcopy(read_entry(adata, key))
    if "embed" in entry:
        total = float(entry["embed"]["total"])
    else:
        total = common_total(cells_of(adata, fit).size_factor)
    where = resolve_device(device)
    model = fit.model.to(where)
    values, entry["embed"] = new_map(
        model, mean.to(where), covariates, total, n_components, align=align
    )
    entry = sealed(entry)
    # All is at hand: what interrupts a call before here leaves all as it was.
    out = target(adata, copy)
    out.uns[keys.uns] = entry
    out.obsm[keys.embed] = values
    return out if copy else None


def common_total(size_factor: torch.Tensor) -> float:
    """The median of the cells' expected totals, of those that have one."""
    positive = size_factor[size_factor > 0]
    return float(positive.median()) if len(positive) else 1.0


def new_map(
    model: VAE,
    mean: torch.Tensor,
    covariates: Covariates | None,
    total: float,
    n_components: int | None = None,
    *,
    align: bool = True,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Coordinates for ``obsm``, and for ``uns`` the map's basis and how cells are aligned."""
    model.eval()
    if n_components is None:
        n_components = max(N_COMPONENTS, model.n_latent)
    entry: dict[str, Any] = {}
    if align and covariates is not None:
        found = fit_alignment(mean, covariates, pulled_back(model, mean, total))
        if found is None:
            logger.info("cells are not aligned over covariates: too few of them for so many levels")
        else:
            entry["alignment"] = found.to_entry()
    moved = aligned(mean, entry, covariates)
    basis = find_basis(model, moved, total, n_components)
    entry |= {
        "centre": basis.centre.cpu().numpy(),
        "components": np.ascontiguousarray(basis.components.cpu().numpy()),
        "total": total,
        "n_levels": np.array(basis.n_levels, int),
        "n_obs": len(mean),
    }
    return _in_map(model, moved, basis), entry


def placed(
    model: VAE, mean: torch.Tensor, entry: Mapping[str, Any], covariates: Covariates | None
) -> np.ndarray:
    """Coordinates of cells in that map."""
    return _in_map(model, aligned(mean, entry, covariates), Basis.of(entry, mean.device))


def _in_map(model: VAE, z: torch.Tensor, basis: Basis) -> np.ndarray:
    return np.ascontiguousarray(place(model, z, basis).cpu().numpy(), dtype=np.float32)


def posterior_scale(scale: np.ndarray) -> np.ndarray:
    """One number a cell, the geometric mean of its posterior standard deviations, (n_obs,)."""
    found = np.empty(len(scale), np.float32)
    for start in range(0, len(scale), 2**16):
        some = scale[start : start + 2**16]
        found[start : start + 2**16] = np.exp(np.log(some.astype(float)).mean(1))
    return found
