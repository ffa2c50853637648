"""Do batches mix where they should? Plain numpy kin of scib-metrics' batch figures.

scib-metrics itself pulls in jax. These follow the same definitions but for the kernel of LISI
(inverse Simpson of unweighted neighbours) and exact neighbours. Each is 0 to 1, 1 best.
"""

import numpy as np
from _views import neighbours
from scipy import sparse as sp
from scipy.sparse.csgraph import connected_components
from scipy.stats import chi2


def kbet(points, labels, batches, k=30, level=0.05, fewest=20):
    """Share of cells whose neighbours' batches pass a χ² test against their type's (Büttner 2019).

    Within each type of at least ``fewest`` cells from two batches; the mean over types.
    """
    shares = []
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        names, code, count = np.unique(batches[mine], return_inverse=True, return_counts=True)
        if len(names) < 2 or len(mine) < fewest:
            continue
        n = min(k, len(mine) // 2)
        near = neighbours(points[mine], n)
        expected = n * count / count.sum()
        seen = np.stack([(code[near] == j).sum(1) for j in range(len(names))], 1)
        statistic = ((seen - expected) ** 2 / expected).sum(1)
        shares.append((chi2.sf(statistic, len(names) - 1) > level).mean())
    return float(np.mean(shares)) if shares else float("nan")


def connectivity(near, labels):
    """Share of each type's cells in the largest component of its own neighbour graph, mean."""
    n, k = near.shape
    rows = np.repeat(np.arange(n), k)
    graph = sp.csr_matrix((np.ones(n * k), (rows, near.ravel())), (n, n))
    shares = []
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        _, part = connected_components(graph[mine][:, mine], directed=False)
        shares.append(np.bincount(part).max() / len(mine))
    return float(np.mean(shares))


def bras(points, labels, batches):
    """1 − |silhouette of batches| within types, the other batches' mean distance in place of the
    nearest's, by cosine (Rautenstrauch & Ohler 2025)."""
    points = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    scores = []
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        names, code, count = np.unique(batches[mine], return_inverse=True, return_counts=True)
        if len(names) < 2 or count.min() < 2:
            continue
        distance = 1 - points[mine] @ points[mine].T
        one_hot = np.eye(len(names))[code]
        total = distance @ one_hot  # to all cells of each batch
        own = total[np.arange(len(mine)), code]
        within = own / (count[code] - 1)
        between = (total.sum(1) - own) / (len(mine) - count[code])
        width = 1 - np.abs((between - within) / np.maximum(np.maximum(between, within), 1e-12))
        scores.append(np.mean([width[code == j].mean() for j in range(len(names))]))
    return float(np.mean(scores)) if scores else float("nan")


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
