"""Nearest neighbours of points, and how often they stay when the points are drawn again."""

from collections.abc import Iterable

import numpy as np
from scipy import sparse as sp
from sklearn.neighbors import NearestNeighbors

# Points beyond which neighbours are searched approximately: up to here twenty exact searches, of
# two seconds each, take less time than it takes to compile the other.
MOST_EXACT = 16_384


def nearest(points: np.ndarray, k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The ``k`` other points nearest to each, (points, k), nearest first, and their distances.

    Exact for up to :data:`MOST_EXACT` points. For more, by nearest-neighbour descent (Dong, Moses
    & Li, WWW 2011).
    """
    if len(points) <= MOST_EXACT:
        distances, indices = NearestNeighbors(n_neighbors=k).fit(points).kneighbors()
        return indices, distances
    from pynndescent import NNDescent  # compiles for seconds

    indices, distances = NNDescent(points, n_neighbors=k + 1, random_state=seed).neighbor_graph
    # The point itself goes last and off; it need not be the first where another is as near.
    own = indices == np.arange(len(points))[:, None]
    order = np.argsort(own, axis=1, kind="stable")[:, :k]
    indices, distances = (np.take_along_axis(a, order, axis=1) for a in (indices, distances))
    short = np.flatnonzero((indices < 0).any(axis=1))  # the search found fewer than k
    if len(short):
        far, near = NearestNeighbors(n_neighbors=k + 1).fit(points).kneighbors(points[short])
        order = np.argsort(near == short[:, None], axis=1, kind="stable")[:, :k]
        indices[short] = np.take_along_axis(near, order, axis=1)
        distances[short] = np.take_along_axis(far, order, axis=1)
    return indices, distances


def rows(indices: np.ndarray, values: np.ndarray) -> sp.csr_matrix:
    """A square matrix with ``values`` in the columns ``indices``, as many in each row."""
    n, k = indices.shape
    indptr = np.arange(0, n * k + 1, k)
    return sp.csr_matrix((values.ravel(), indices.ravel(), indptr), shape=(n, n))


def times_near(draws: Iterable[np.ndarray], k: int, seed: int = 0) -> sp.csr_matrix:
    """In how many draws of all points j is among the ``k`` nearest of i: entry i, j, float32."""
    total: sp.csr_matrix | None = None
    for points in draws:
        indices, _ = nearest(points, k, seed)
        one = rows(indices, np.ones(indices.shape, np.float32))
        total = one if total is None else total + one
    if total is None:
        raise ValueError("there are no draws")
    return total


def stability(times: sp.csr_matrix, k: int, n_draws: int) -> np.ndarray:
    """The expected share of a point's ``k`` nearest that two draws have in common, (points,).

    Over all pairs of different draws: a neighbour of c draws is common to c (c − 1) ordered pairs
    of the n (n − 1) there are, so that the mean is unbiased.
    """
    common = times.multiply(times) - times
    share: np.ndarray = np.asarray(common.sum(axis=1)).ravel() / (k * n_draws * (n_draws - 1))
    return share.astype(np.float32)
