"""What a user looks at, as functions of arrays: held-out molecules, means, neighbours, clusters.

Nothing here knows of a model. Cells are rows; ``profiles`` are shares of a cell's molecules, which
add up to one; ``neighbours`` are row numbers, nearest first, without the cell itself.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import sparse as sp
from scipy.special import gammaln

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

# A share below this would make one molecule cost more than 27 nats.
FLOOR = 1e-12
# ln θ that a negative binomial's maximum is looked for in.
_LOG_THETA = -6.0, 9.0
_CHUNK = 256


# --- molecules -----------------------------------------------------------------------------------


def thinned(counts: sp.csr_matrix, share: float, seed: int) -> sp.csr_matrix:
    """Of each count a binomial part."""
    out = counts.tocsr().copy()
    drawn = np.random.default_rng(seed).binomial(out.data.astype(np.int64), share)
    out.data = drawn.astype(np.float32)
    out.eliminate_zeros()
    return out


def halves(counts: sp.csr_matrix, seed: int) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Each count split binomially in two."""
    first = thinned(counts, 0.5, seed)
    second = sp.csr_matrix(counts - first)
    second.eliminate_zeros()
    return first, second


def totals(counts: sp.csr_matrix | Floats, axis: int = 1) -> Floats:
    return np.asarray(counts.sum(axis), dtype=np.float64).ravel()


def as_profiles(means: Floats) -> Floats:
    """Shares of each cell's molecules, of means on any scale; negative means are zero."""
    out = np.clip(np.asarray(means, np.float32), 0, None)
    out /= np.maximum(out.sum(1, dtype=np.float64, keepdims=True), FLOOR)
    return out


def mean_profile(counts: sp.csr_matrix) -> Floats:
    """The share of each gene among all molecules, (1, genes)."""
    gene = totals(counts, 0)
    return (gene / gene.sum())[None]


def mixed(profiles: Floats, with_: Floats, share: float) -> Floats:
    """A pseudocount, as a share of a cell's molecules that follows another profile."""
    return np.asarray((1 - share) * profiles + share * with_, np.float32)


def poisson_score(held_out: sp.csr_matrix, profiles: Floats) -> Floats:
    """Each cell's Σ x ln μ − μ in nats, μ = (Σ x) π. One profile may stand for all cells."""
    x = held_out.tocoo()
    size = totals(held_out)
    log_mean = np.log(size[x.row]) + np.log(_shares(profiles, x))
    value = np.bincount(x.row, x.data * log_mean, minlength=x.shape[0])
    return value - size * profiles.sum(1, dtype=np.float64)


def nb_log_likelihood(
    counts: sp.csr_matrix, profiles: Floats, log_theta: Floats, axis: int
) -> Floats:
    """Σ ln NB(x; (Σ x) π, θ of the gene) over genes (``axis=1``) or cells (``axis=0``), in nats."""
    x = counts.tocoo()
    size = totals(counts)
    theta = np.exp(np.asarray(log_theta, np.float64))
    out = _zeros(size, profiles, theta, axis)
    mean, size_of_count = size[x.row] * _shares(profiles, x), theta[x.col]
    there = gammaln(x.data + size_of_count) - gammaln(size_of_count) - gammaln(x.data + 1.0)
    there += x.data * np.log(mean / (size_of_count + mean))
    where = x.row if axis == 1 else x.col
    return out + np.bincount(where, there, minlength=len(out))


def _zeros(size: Floats, profiles: Floats, theta: Floats, axis: int) -> Floats:
    """Σ θ ln(θ / (θ + μ)), all that there is of a count of zero."""
    out = np.zeros((len(size), len(theta))[1 - axis])
    for start in range(0, len(size), _CHUNK):
        rows = slice(start, start + _CHUNK)
        block = size[rows, None] * _rows(profiles, rows) / theta
        np.log1p(block, out=block)
        if axis == 1:
            out[rows] = block @ -theta
        else:
            out -= theta * block.sum(0)
    return out


def fit_log_theta(counts: sp.csr_matrix, profiles: Floats) -> Floats:
    """ln θ of each gene of greatest likelihood, given means (Σ x) π; between −6 and 9.

    A grid, then golden sections: right to .02 in ln θ. Genes without counts get the greatest.
    """
    x = counts.tocoo()
    size = totals(counts)
    mean = size[x.row] * np.maximum(
        profiles[0, x.col] if len(profiles) == 1 else profiles[x.row, x.col], FLOOR
    )
    # The gamma functions of each gene and count that occur, once.
    top = int(x.data.max()) + 1
    pair, times = np.unique(
        x.col.astype(np.int64) * top + x.data.astype(np.int64), return_counts=True
    )
    gene, count = pair // top, pair % top

    def value(log_theta: Floats) -> Floats:
        """As :func:`nb_log_likelihood` of each gene, up to what does not depend on θ."""
        theta = np.exp(log_theta)
        gamma = times * (gammaln(count + theta[gene]) - gammaln(theta)[gene])
        out = np.bincount(gene, gamma, minlength=len(theta))
        out -= np.bincount(x.col, x.data * np.log(theta[x.col] + mean), minlength=len(theta))
        return out + _zeros(size, profiles, theta, axis=0)

    grid = np.linspace(*_LOG_THETA, 11)
    found = np.stack([value(np.full(counts.shape[1], at)) for at in grid])
    best = grid[found.argmax(0)]
    step = grid[1] - grid[0]
    low, high = np.maximum(best - step, grid[0]), np.minimum(best + step, grid[-1])
    golden = (np.sqrt(5) - 1) / 2
    left, right = high - golden * (high - low), low + golden * (high - low)
    at_left, at_right = value(left), value(right)
    for _ in range(10):
        lower = at_left > at_right
        high, low = np.where(lower, right, high), np.where(lower, low, left)
        old_left, old_right = left, right
        left = np.where(lower, high - golden * (high - low), old_right)
        right = np.where(lower, old_left, low + golden * (high - low))
        new = value(np.where(lower, left, right))
        at_left, at_right = np.where(lower, new, at_right), np.where(lower, at_left, new)
    out = np.where(at_left > at_right, left, right)
    return np.where(totals(counts, 0) > 0, out, _LOG_THETA[1])


def nb_score(fitted: sp.csr_matrix, held_out: sp.csr_matrix, profiles: Floats) -> Floats:
    """Each cell's ln NB of the molecules held out, θ of each gene by likelihood on those fitted."""
    log_theta = fit_log_theta(fitted, profiles)
    return nb_log_likelihood(held_out, profiles, log_theta, axis=1)


def gene_ratios(counts: sp.csr_matrix, profiles: Floats) -> Floats:
    """Predicted over observed total of each gene; NaN where none was observed."""
    size, observed = totals(counts), totals(counts, 0)
    predicted = np.zeros(counts.shape[1])
    for start in range(0, len(size), _CHUNK):
        rows = slice(start, start + _CHUNK)
        predicted += size[rows] @ _rows(profiles, rows).astype(np.float64)
    return np.divide(predicted, observed, out=np.full(len(observed), np.nan), where=observed > 0)


def type_ratios(
    counts: sp.csr_matrix, profiles: Floats, labels: np.ndarray, at_least: int = 200
) -> Floats:
    """As :func:`gene_ratios` over the cells of a type, for all pairs of type and gene that count.

    One flat array over all types: genes with ``at_least`` counts in the type.
    """
    parts = []
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        ratio = gene_ratios(counts[mine], profiles if len(profiles) == 1 else profiles[mine])
        parts.append(ratio[totals(counts[mine], 0) >= at_least])
    return np.concatenate(parts)


def share_off(ratios: Floats, by: float) -> float:
    """Share of ratios further than ``by`` from 1: of a fifth, outside .8 to 1.2."""
    known = ratios[~np.isnan(ratios)]
    return float((np.abs(known - 1) > by).mean()) if len(known) else float("nan")


def worst_ratio(ratios: Floats) -> float:
    """The ratio furthest from 1 on a logarithmic scale, as a number above 1; inf for a zero."""
    known = ratios[~np.isnan(ratios)]
    if not len(known):
        return float("nan")
    with np.errstate(divide="ignore"):
        return float(np.exp(np.abs(np.log(known)).max()))


def open_problems(
    fitted: sp.csr_matrix, held_out: sp.csr_matrix, profiles: Floats
) -> dict[str, float]:
    """Open Problems' denoising metrics, lower is better, of means (Σ x) π of the fitted cell.

    ``mse`` is between log1p of counts held out and of means, each brought to 10,000 a cell;
    ``poisson`` is mean μ − x ln(μ + 1e-6), μ scaled by one factor to the total held out. Means over
    cells and genes, as in the second version of the task (openproblems.bio), which puts prediction
    and truth in their places.
    """
    size, other = totals(fitted), totals(held_out)
    factor = other.sum() / size.sum()
    mse = poisson = 0.0
    for start in range(0, len(size), _CHUNK):
        rows = slice(start, start + _CHUNK)
        profile = _rows(profiles, rows).astype(np.float64)
        truth = held_out[rows].toarray()
        scaled = truth * (1e4 / np.maximum(other[rows], 1))[:, None]
        mse += float(((np.log1p(scaled) - np.log1p(1e4 * profile)) ** 2).sum())
        mean = factor * size[rows, None] * profile
        poisson += float((mean - truth * np.log(mean + 1e-6)).sum())
    n = fitted.shape[0] * fitted.shape[1]
    return {"op_mse": mse / n, "op_poisson": poisson / n}


def _shares(profiles: Floats, x: sp.coo_matrix) -> Floats:
    """The shares at the nonzeros, none of them nothing."""
    shares = profiles[0, x.col] if len(profiles) == 1 else profiles[x.row, x.col]
    return np.maximum(shares, FLOOR)


def _rows(profiles: Floats, rows: slice) -> Floats:
    return profiles if len(profiles) == 1 else profiles[rows]


# --- coordinates ---------------------------------------------------------------------------------


def log_normalised(counts: sp.csr_matrix) -> Floats:
    """log1p of counts brought to the cells' median total, dense float32."""
    size = totals(counts)
    scale = np.divide(np.median(size), size, out=np.zeros_like(size), where=size > 0)
    return np.log1p(np.asarray((sp.diags(scale) @ counts).toarray(), np.float32))


def pca(values: Floats, n_components: int) -> Floats:
    """Coordinates on the first principal components."""
    from sklearn.decomposition import PCA

    n = min(n_components, *values.shape)
    out: Floats = PCA(n, svd_solver="covariance_eigh").fit_transform(values)
    return out


# --- neighbours ----------------------------------------------------------------------------------


def neighbours(points: Floats, k: int, among: Ints | None = None) -> Ints:
    """The ``k`` nearest other cells of each, by Euclidean distance, (cells, k).

    ``among`` gives each cell's group: then only cells of *other* groups are looked at.
    """
    points = np.asarray(points, np.float64) - np.mean(points, 0, dtype=np.float64)
    square = (points**2).sum(1)
    out = np.empty((len(points), k), np.int64)
    for start in range(0, len(points), _CHUNK):
        rows = np.arange(start, min(start + _CHUNK, len(points)))
        distance = square - 2 * points[rows] @ points.T
        distance[rows - start, rows] = np.inf
        if among is not None:
            distance[among[rows, None] == among[None]] = np.inf
        some = np.argpartition(distance, k - 1, axis=1)[:, :k]
        order = np.take_along_axis(distance, some, 1).argsort(1, kind="stable")
        out[rows] = np.take_along_axis(some, order, 1)
    return out


def purity(neighbour: Ints, labels: np.ndarray) -> float:
    """Mean share of neighbours of the cell's own type."""
    return float((labels[neighbour] == labels[:, None]).mean())


def vote(neighbour: Ints, labels: np.ndarray) -> np.ndarray:
    """The label that most neighbours carry; of equals, the one whose cells are nearer."""
    names, code = np.unique(labels, return_inverse=True)
    k = neighbour.shape[1]
    # Weights that only ever decide between equals.
    weight = 1 + (k - np.arange(k)) / (k * (k + 1))
    votes = np.zeros((len(neighbour), len(names)))
    cells = np.arange(len(neighbour))
    for j in range(k):
        votes[cells, code[neighbour[:, j]]] += weight[j]
    return names[votes.argmax(1)]


def accuracy(neighbour: Ints, labels: np.ndarray) -> float:
    """Share of cells whose own label most neighbours carry (leave one out)."""
    return float((vote(neighbour, labels) == labels).mean())


def inverse_simpson(neighbour: Ints, labels: np.ndarray) -> Floats:
    """1 / Σ p², p the shares of labels among each cell's neighbours."""
    names, code = np.unique(labels, return_inverse=True)
    total = np.zeros(len(neighbour))
    for j in range(len(names)):
        total += (code[neighbour] == j).mean(1) ** 2
    return 1 / total


def mixing(neighbour: Ints, batches: np.ndarray) -> float:
    """How many batches meet among neighbours: 0 only one, 1 all alike."""
    n = len(np.unique(batches))
    return float((inverse_simpson(neighbour, batches).mean() - 1) / (n - 1))


def clisi(neighbour: Ints, labels: np.ndarray) -> float:
    """How many types meet among neighbours; 1 is best."""
    return float(inverse_simpson(neighbour, labels).mean())


def jaccard(one: Ints, other: Ints) -> float:
    """Mean over cells of shared neighbours over all of both."""
    k = one.shape[1]
    shared = np.array([len(np.intersect1d(a, b)) for a, b in zip(one, other, strict=True)])
    return float((shared / (2 * k - shared)).mean())


def split_auc(
    points: Floats, held_out: np.ndarray, labels: np.ndarray, k: int = 15, n_shuffles: int = 20
) -> tuple[float, float]:
    """AUC of the share of held-out cells among neighbours of the same type, and chance's.

    AUCs within types, each weighing as its pairs of held-out and training cells do. Chance is the
    mean over splits shuffled within types: below .5, since a cell is not its own neighbour.
    """
    rng = np.random.default_rng(0)
    found, chance, pairs = [], [], []
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        n_out = int(held_out[mine].sum())
        if len(mine) <= k or not 0 < n_out < len(mine):
            continue
        near = neighbours(points[mine], k)

        def auc(out: np.ndarray, near: Ints = near) -> float:
            return _auc(out[near].mean(1), out)

        found.append(auc(held_out[mine]))
        shuffled = [auc(rng.permutation(held_out[mine])) for _ in range(n_shuffles)]
        chance.append(np.mean(shuffled))
        pairs.append(n_out * (len(mine) - n_out))
    if not pairs:
        return float("nan"), float("nan")
    return float(np.average(found, weights=pairs)), float(np.average(chance, weights=pairs))


def _auc(score: Floats, positive: np.ndarray) -> float:
    from scipy.stats import rankdata

    rank, n = rankdata(score), positive.sum()
    return float((rank[positive].sum() - n * (n + 1) / 2) / (n * (len(score) - n)))


# --- clusters ------------------------------------------------------------------------------------


def leiden(points: Floats, resolutions: Sequence[float], seed: int = 0) -> list[np.ndarray]:
    """Leiden clusters of scanpy's graph of 15 neighbours, at each resolution."""
    import anndata as ad
    import scanpy as sc

    adata = ad.AnnData(obsm={"X": np.asarray(points, np.float32)})
    sc.pp.neighbors(adata, n_neighbors=15, use_rep="X", random_state=0)
    out = []
    for resolution in resolutions:
        sc.tl.leiden(
            adata,
            resolution=resolution,
            flavor="igraph",
            n_iterations=2,
            directed=False,
            random_state=seed,
        )
        out.append(adata.obs["leiden"].to_numpy().astype(str))
    return out


def best_agreement(clusterings: Sequence[np.ndarray], labels: np.ndarray) -> dict[str, float]:
    """The highest NMI and the highest ARI with labels over the clusterings."""
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    def best(score: Callable[[np.ndarray, np.ndarray], float]) -> float:
        return float(max(score(labels, found) for found in clusterings))

    return {"nmi": best(normalized_mutual_info_score), "ari": best(adjusted_rand_score)}
