"""Holds the figures of ``_views`` against scipy, scikit-learn and scanpy on small random data.

python tests/benchmarks/check_views.py
"""

import _views as views
import numpy as np
from numpy.testing import assert_allclose, assert_array_equal
from scipy import sparse as sp
from scipy import stats
from scipy.optimize import minimize_scalar


def molecules(rng: np.random.Generator) -> None:
    profiles = rng.dirichlet(np.full(30, 0.5), 50)
    theta = np.exp(rng.normal(0, 1, 30))
    rate = profiles * 400
    counts = sp.csr_matrix(rng.poisson(rng.gamma(theta, rate / theta)).astype(np.float32))
    x, size = counts.toarray(), views.totals(counts)[:, None]
    assert_array_equal(x, sum(views.halves(counts, 0)).toarray())
    mean = size * profiles
    # Σ x ln μ − μ lacks ln x! of scipy's.
    theirs = (stats.poisson.logpmf(x, mean) + np.vectorize(_log_factorial)(x)).sum(1)
    assert_allclose(views.poisson_score(counts, profiles), theirs, rtol=1e-5)
    theirs = stats.nbinom.logpmf(x, theta, theta / (theta + mean))
    for axis in (0, 1):
        ours = views.nb_log_likelihood(counts, profiles, np.log(theta), axis)
        assert_allclose(ours, theirs.sum(axis), rtol=1e-5)
    found = views.fit_log_theta(counts, profiles)
    for gene in np.flatnonzero(views.totals(counts, 0))[:10]:

        def loss(log_theta: float, gene: int = gene) -> float:
            n, m = np.exp(log_theta), mean[:, gene]
            return -float(stats.nbinom.logpmf(x[:, gene], n, n / (n + m)).sum())

        best = minimize_scalar(loss, bounds=(-6, 9), method="bounded")
        # By what is lost: a flat maximum may lie anywhere.
        assert loss(found[gene]) < best.fun + 1e-2
    observed = x.sum(0)
    ours = views.gene_ratios(counts, profiles)
    assert_allclose(ours[observed > 0], (mean.sum(0) / observed)[observed > 0])
    assert_allclose(views.share_off(np.array([0.7, 1.1, np.nan]), 0.2), 0.5)
    assert_allclose(views.worst_ratio(np.array([0.25, 3.0])), 4)


def _log_factorial(x: float) -> float:
    return float(np.log(np.arange(1, x + 1)).sum())


def open_problems(rng: np.random.Generator) -> None:
    """The task's own steps, by scanpy."""
    import anndata as ad
    import scanpy as sc
    from sklearn.metrics import mean_squared_error

    counts = sp.csr_matrix(rng.poisson(3, (40, 25)).astype(np.float32))
    train, test = views.halves(counts, 1)
    profiles = rng.dirichlet(np.ones(25), 40)
    denoised = views.totals(train)[:, None] * profiles
    a, b = ad.AnnData(test.toarray()), ad.AnnData(denoised.copy())
    for part in (a, b):
        sc.pp.normalize_total(part, target_sum=10_000)
        sc.pp.log1p(part)
    mean = denoised * test.sum() / train.sum()
    poisson = (mean - test.toarray() * np.log(mean + 1e-6)).mean()
    found = views.open_problems(train, test, profiles)
    assert_allclose(found["op_mse"], mean_squared_error(a.X, b.X), rtol=1e-5)
    assert_allclose(found["op_poisson"], poisson, rtol=1e-5)


def neighbours(rng: np.random.Generator) -> None:
    from sklearn.metrics import roc_auc_score
    from sklearn.neighbors import NearestNeighbors

    points = rng.normal(size=(1200, 5))
    labels = np.where(points[:, 0] > 0, "a", "b")
    theirs = NearestNeighbors(n_neighbors=16).fit(points).kneighbors(points)[1][:, 1:]
    near = views.neighbours(points, 15)
    assert_array_equal(near, theirs)
    same = labels[theirs] == labels[:, None]
    assert_allclose(views.purity(near, labels), same.mean())
    assert_allclose(views.accuracy(near, labels), (same.mean(1) > 0.5).mean())  # no ties of 15
    batches = rng.integers(3, size=1200)
    others = views.neighbours(points, 15, among=batches)
    assert (batches[others] != batches[:, None]).all()
    for cell in range(5):
        out = np.flatnonzero(batches != batches[cell])
        distance = np.linalg.norm(points[out] - points[cell], axis=1)
        assert_array_equal(others[cell], out[distance.argsort()[:15]])
    # Batches that mean nothing are mixed as well as a draw of 15 can be.
    assert 0.75 < views.mixing(near, batches) < 0.95
    assert_allclose(views.mixing(np.array([[0, 0], [0, 1]]), np.array(["x", "y"])), 0.5)
    assert_allclose(views.jaccard(near, near), 1)
    assert_allclose(views.jaccard(np.array([[1, 2, 3]]), np.array([[3, 4, 5]])), 1 / 5)
    assert views.vote(np.array([[0, 1, 2, 3]]), np.array(["b", "b", "a", "a"]))[0] == "b"
    held_out = rng.random(1200) < 0.2
    found, chance = views.split_auc(points, held_out, np.full(1200, "a"))
    assert_allclose(found, roc_auc_score(held_out, held_out[near].mean(1)))
    assert 0.44 < chance < 0.5
    shifted = points + 2.0 * held_out[:, None]
    assert views.split_auc(shifted, held_out, np.full(1200, "a"))[0] > 0.9


def clusters(rng: np.random.Generator) -> None:
    centre = np.repeat(np.eye(3) * 10, 60, axis=0)
    truth = np.repeat(["a", "b", "c"], 60)
    found = views.leiden(centre + rng.normal(size=centre.shape), [0.1, 2.0])
    assert_allclose(list(views.best_agreement(found, truth).values()), 1)


def main() -> None:
    for part in (molecules, open_problems, neighbours, clusters):
        part(np.random.default_rng(0))
        print(part.__name__, "as they should be", flush=True)


if __name__ == "__main__":
    main()
