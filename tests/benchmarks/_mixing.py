"""Do batches mix where they should, and do types stay apart? scib-metrics', and one more."""

import contextlib
import io
import warnings

import numpy as np
from _views import neighbours

# scib-metrics' names of a figure, and ours.
SCIB = {
    "Total": "total",
    "Batch correction": "batch",
    "Bio conservation": "bio",
    "iLISI": "ilisi",
    "KBET": "kbet",
    "Graph connectivity": "graph",
    "BRAS": "bras",
    "PCR comparison": "pcr",
    "KMeans NMI": "nmi",
    "KMeans ARI": "ari",
    "Silhouette label": "silhouette",
    "Isolated labels": "isolated",
    "cLISI": "clisi",
}


def scib(points, labels, batches, before):
    """scib-metrics' ``Benchmarker`` with its defaults, but for exact neighbours.

    ``before``: principal components without integration, which its PCR comparison starts from.
    """
    import anndata as ad
    from scib_metrics.benchmark import Benchmarker
    from scib_metrics.nearest_neighbors import NeighborsResults
    from sklearn.neighbors import NearestNeighbors

    def exact(values, k):
        near = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(values)
        distances, indices = near.kneighbors(values)
        return NeighborsResults(indices=indices, distances=distances)

    adata = ad.AnnData(
        np.asarray(before, np.float32),
        obs={"batch": batches.astype(str), "label": labels.astype(str)},
        obsm={"before": np.asarray(before, np.float32), "points": np.asarray(points, np.float32)},
    )
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        found = Benchmarker(
            adata,
            "batch",
            "label",
            ["points"],
            pre_integrated_embedding_obsm_key="before",
            progress_bar=False,
        )
        found.prepare(exact)
        found.benchmark()
        table = found.get_results()
    return {ours: float(table.loc["points", theirs]) for theirs, ours in SCIB.items()}


def told_apart(points, labels, batches, k=15, n_shuffles=5):
    """By how much neighbours within a type say a cell's batch better than chance, points."""
    rng = np.random.default_rng(0)
    excess, weights = [], []
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        names, code = np.unique(batches[mine], return_inverse=True)
        if len(names) < 2 or len(mine) <= 2 * k:
            continue
        near = neighbours(points[mine], k)

        def right(code, near=near, names=names):
            votes = np.stack([(code[near] == j).sum(1) for j in range(len(names))], 1)
            return (votes.argmax(1) == code).mean()

        chance = np.mean([right(rng.permutation(code)) for _ in range(n_shuffles)])
        excess.append(right(code) - chance)
        weights.append(len(mine))
    return float(np.average(excess, weights=weights)) if excess else float("nan")
