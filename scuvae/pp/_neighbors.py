"""pp.neighbors: a neighbour graph that knows what the posteriors do not know."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from anndata import AnnData

from scuvae._checks import flag, random_generator, random_state_alias, whole
from scuvae._keys import DEFAULT, Keys, check_holds_no_fit, check_name
from scuvae.distributions.gaussian import Gaussian
from scuvae.inference.mapping.alignment import aligned
from scuvae.inference.mapping.embedding import Basis, place
from scuvae.io import inputs
from scuvae.io.covariates import match_covariates
from scuvae.io.fit_state import read_entry, read_fit
from scuvae.io.slots import read_posterior, target
from scuvae.model import VAE
from scuvae.pp._graph import nearest, rows, stability, times_near
from scuvae.runtime import isolated


@isolated
@random_state_alias
def neighbors(
    adata: AnnData,
    *,
    key: str | None = None,
    n_neighbors: int = 15,
    n_samples: int = 20,
    key_added: str | None = None,
    rng: int | np.random.Generator | None = 0,
    copy: bool = False,
) -> AnnData | None:
    """Neighbour graph from posteriors: an edge weighs how often its two cells are neighbours.

    Every cell is drawn from its posterior, all cells anew ``n_samples`` times, and placed in the
    map of :func:`scuvae.tl.embed`; each draw has nearest neighbours of its own. Two cells that the
    counts put side by side have an edge of weight 1; a cell that may lie in many places has many
    edges, all of them light. ``sc.tl.umap``, ``sc.tl.leiden``, ``sc.tl.paga`` and
    ``sc.tl.diffmap`` run on the graph as on one of ``sc.pp.neighbors``.

    Parameters
    ----------
    adata
        Fitted by :func:`scuvae.tl.fit`, or projected, with its map.
    key
        The fit; None for the default.
    n_neighbors
        Size of a neighbourhood. As in scanpy the cell itself counts: it has ``n_neighbors − 1``
        neighbours in each draw.
    n_samples
        Draws, at least 2. A weight's standard error is at most .5/√n_samples; a cell has at most
        ``(n_neighbors − 1) · n_samples`` edges of its own.
    key_added
        None for scanpy's own slots; ``"k"`` for ``uns["k"]``, ``obsp["k_connectivities"]`` and
        ``obsp["k_distances"]``, to be named to scanpy as ``neighbors_key="k"``.
    rng
        Seed, Generator or None; ``random_state`` is an alias.
    copy
        Return a copy with the result and leave ``adata`` alone.

    Returns
    -------
    None, or with ``copy=True`` the AnnData. Sets:

    ``obsp["connectivities"]``
        Symmetric, sparse, float32, 0 to 1: (P + Pᵀ)/2, where P_ij is the share of draws in which
        j is among the neighbours of i. All weights sum to n_obs · (n_neighbors − 1).
    ``obsp["distances"]``
        Sparse, ``n_neighbors − 1`` entries a cell: the distances in the map between posterior
        means, as ``sc.pp.neighbors(adata, use_rep="X_scuvae_embed")`` would have them.
    ``uns["neighbors"]``
        Scanpy's description of the graph.
    ``obs["scuvae_neighbor_stability"]``
        The share of a cell's neighbours that two draws are expected to have in common, 0 to 1,
        float32: low where a cell's place among the others is not known.

    Raises
    ------
    ValueError
        ``adata`` holds no fit under ``key``, or no map of it; ``n_neighbors`` is not below the
        number of cells; ``key_added`` is the name of a fit.

    Notes
    -----
    Above 16,384 cells neighbours are searched approximately, by pynndescent. Draws of different
    cells are independent of each other, as posteriors are given the decoder.

    Stability says how well the cells around a cell can be told apart, not how well its type is
    known: it is low within a large group of cells that are alike, and high in a group of no more
    than ``n_neighbors``, whatever their posteriors.

    Examples
    --------
    >>> import scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()
    >>> scuvae.tl.fit(adata, max_epochs=5)
    >>> scuvae.pp.neighbors(adata, n_samples=5)
    >>> adata.obsp["connectivities"].shape
    (700, 700)
    >>> bool(adata.obs["scuvae_neighbor_stability"].between(0, 1).all())
    True
    """
    fit = read_fit(inputs.check_anndata(adata, copy=copy), key)
    n_neighbors = whole("n_neighbors", n_neighbors, at_least=2)
    n_samples = whole("n_samples", n_samples, at_least=2)
    flag("copy", copy)
    if n_neighbors >= adata.n_obs:
        raise ValueError(
            f"n_neighbors={n_neighbors} for {adata.n_obs} cells: pass fewer than there are cells"
        )
    slots = _slots(adata, key_added)
    generator = random_generator(rng)
    keys = Keys.of(key)
    saved = read_entry(adata, key).get("embed")
    if saved is None or keys.embed not in adata.obsm:
        missing = f"uns[{keys.uns!r}]" if saved is None else f"obsm[{keys.embed!r}]"
        argument = "" if keys.uns == DEFAULT else f", key={keys.uns!r}"
        raise ValueError(
            f"adata.{missing} holds no map of the fit: call scuvae.tl.embed(adata{argument}) first"
        )
    basis = Basis.of(saved, torch.device("cpu"))
    q = read_posterior(adata, key)
    q = q.moved(aligned(q.mean, saved, match_covariates(adata, fit.design)) - q.mean)

    k, seed = n_neighbors - 1, int(generator.integers(2**31 - 1))
    draws = draws_in_map(fit.model, q, basis, n_samples, generator)
    times = times_near(draws, k, seed)
    weights = (times + times.T) / (2 * n_samples)
    means = _map_of(adata, keys.embed)
    indices, distances = nearest(means, k, seed)

    params: dict[str, Any] = {
        "n_neighbors": n_neighbors,
        # Memberships between 0 and 1, as UMAP's: scanpy's umap warns of any other word here.
        "method": "umap",
        "metric": "euclidean",
        "use_rep": keys.embed,
    }
    if isinstance(rng, int | np.integer):
        params["random_state"] = int(rng)
    out = target(adata, copy)
    out.obsp[slots["distances_key"]] = rows(indices, distances.astype(np.float64))
    out.obsp[slots["connectivities_key"]] = weights.tocsr().astype(np.float32)
    out.uns["neighbors" if key_added is None else key_added] = {**slots, "params": params}
    out.obs[keys.obs["neighbor_stability"]] = stability(times, k, n_samples)
    return out if copy else None


def _slots(adata: AnnData, key_added: str | None) -> dict[str, str]:
    """Names in ``obsp``, as scanpy makes them from ``key_added``."""
    if key_added is None:
        return {"connectivities_key": "connectivities", "distances_key": "distances"}
    check_name("key_added", key_added)
    check_holds_no_fit(adata, "key_added", key_added)
    return {
        "connectivities_key": f"{key_added}_connectivities",
        "distances_key": f"{key_added}_distances",
    }


@torch.no_grad()
def draws_in_map(
    model: VAE,
    q: Gaussian,
    basis: Basis,
    n_samples: int,
    generator: np.random.Generator,
) -> Iterator[np.ndarray]:
    """All cells in the map, each at a draw of its own from q, so many times."""
    for _ in range(n_samples):
        noise = generator.standard_normal(tuple(q.mean.shape), np.float32)
        z = q.draw(torch.from_numpy(noise))
        yield place(model, z, basis).numpy()


def _map_of(adata: AnnData, slot: str) -> np.ndarray:
    values = np.asarray(adata.obsm[slot])
    if values.ndim != 2 or values.dtype.kind not in "fiu" or not np.isfinite(values).all():
        raise ValueError(
            f"adata.obsm[{slot!r}] is {values.dtype} of shape {values.shape}, not finite numbers "
            "of each cell: call scuvae.tl.embed(adata) again"
        )
    return values.astype(np.float32)
