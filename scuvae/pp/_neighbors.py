"""pp.neighbors: a graph that knows how sure its edges are."""

import numpy as np
import torch
from anndata import AnnData
from scipy import sparse as sp
from sklearn.neighbors import NearestNeighbors

from scuvae._checks import flag, whole
from scuvae._keys import Keys
from scuvae.inference.embedding import Basis, place
from scuvae.io import inputs
from scuvae.io.state import read_entry, read_fit, read_posterior


def neighbors(
    adata: AnnData,
    *,
    key: str | None = None,
    n_neighbors: int = 15,
    n_samples: int = 10,
    key_added: str | None = None,
    rng: int | np.random.Generator = 0,
    copy: bool = False,
) -> AnnData | None:
    """Neighbours from posteriors: an edge weighs how often two cells are near each other.

    Every cell's z is drawn from its posterior ``n_samples`` times and placed in the fit's map
    (:func:`scuvae.tl.embed`). ``scanpy.tl.umap``, ``leiden``, ``paga`` and ``diffmap`` run on the
    result as on that of ``scanpy.pp.neighbors``.

    Parameters
    ----------
    adata
        Cells with a fit and its map.
    key
        The fit; None for the default.
    n_neighbors
        Neighbours a draw, the cell itself among them, as scanpy counts.
    n_samples
        Draws, at least two.
    key_added
        As in scanpy: the name in ``uns``, and the beginning of those in ``obsp``.
    rng
        Seed or :class:`numpy.random.Generator`.
    copy
        Return a copy with the result and leave ``adata`` alone.

    Returns
    -------
    None, or with ``copy=True`` the AnnData. Sets:

    ``obsp["connectivities"]``
        Mean over both directions of the share of draws in which one is a neighbour of the other.
    ``obsp["distances"]``
        Distances in the map between the posterior means of a cell and its nearest.
    ``uns["neighbors"]``
        As scanpy writes it.
    ``obs["scuvae_neighbor_stability"]``
        Expected share of a cell's neighbours in one draw that are its neighbours in another.

    Raises
    ------
    ValueError, TypeError
        No fit or no map under ``key``; ``n_neighbors`` or ``n_samples`` out of range.

    Examples
    --------
    >>> import scuvae
    >>> adata = scuvae.datasets.pbmc68k_counts()
    >>> scuvae.tl.fit(adata, max_epochs=5)
    >>> scuvae.pp.neighbors(adata, n_samples=3)
    >>> adata.obsp["connectivities"].shape
    (700, 700)
    """
    fit = read_fit(inputs.check_anndata(adata), key)
    flag("copy", copy)
    k, n_samples = whole("n_neighbors", n_neighbors) - 1, whole("n_samples", n_samples)
    if not 1 <= k < adata.n_obs - 1:
        raise ValueError(
            f"n_neighbors={n_neighbors} of {adata.n_obs} cells: pass at least 2 and fewer than "
            "there are cells"
        )
    if n_samples < 2:
        raise ValueError(f"n_samples={n_samples}: pass 2 or more, to see what differs")
    keys, entry = Keys.of(key), read_entry(adata, key)
    if "embed" not in entry or keys.embed not in adata.obsm:
        raise ValueError(f"adata.obsm has no map {keys.embed!r}: call scuvae.tl.embed first")
    q, n = read_posterior(adata, key), adata.n_obs
    saved = entry["embed"]
    basis = Basis(
        torch.as_tensor(np.array(saved["centre"])),
        torch.as_tensor(np.array(saved["components"])),
        float(saved["total"]),
        int(saved["n_batches"]),
    )
    generator = np.random.default_rng(rng)
    often = sp.csr_matrix((n, n))
    for _ in range(n_samples):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(generator.integers(2**63)))
            z = q.sample()
        often = often + _graph(place(fit.model, z, basis, len(fit.batches)).numpy(), k)
    pairs = often.multiply(often - often.sign())  # ordered pairs of draws that share an edge
    stability = np.asarray(pairs.sum(1)).ravel() / (k * n_samples * (n_samples - 1))

    out = adata.copy() if copy else adata
    names = ("connectivities", "distances")
    if key_added is not None:
        names = (f"{key_added}_connectivities", f"{key_added}_distances")
    out.obsp[names[0]] = sp.csr_matrix((often + often.T) / (2 * n_samples), dtype=np.float32)
    out.obsp[names[1]] = _graph(adata.obsm[keys.embed], k, mode="distance")
    out.uns["neighbors" if key_added is None else key_added] = {
        "connectivities_key": names[0],
        "distances_key": names[1],
        "params": {
            "n_neighbors": n_neighbors,
            "method": "umap",
            "metric": "euclidean",
            "random_state": 0,
            "use_rep": keys.embed,
        },
    }
    out.obs[keys.obs["neighbor_stability"]] = stability.astype(np.float32)
    return out if copy else None


def _graph(points: np.ndarray, k: int, mode: str = "connectivity") -> sp.csr_matrix:
    found = NearestNeighbors(n_neighbors=k).fit(points)
    return sp.csr_matrix(found.kneighbors_graph(mode=mode))
