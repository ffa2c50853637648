"""Cells of several donors in two conditions, drawn around the profiles of real ones."""

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from .._checks import random_generator, real, whole
from ._pbmc import pbmc68k_counts
from ._simulate import check_cells

TYPES = ("CD14+ Monocyte", "CD19+ B", "CD56+ NK", "CD8+ Cytotoxic T", "Dendritic")
# Shares of the types, whose spread between donors is that of a Dirichlet of this concentration.
SHARES, CONCENTRATION = (0.25, 0.15, 0.15, 0.30, 0.15), 60.0
# Over donors the sd of a gene's log mean; counts' inverse dispersion; the sd of log depth.
DONOR_SCALE, THETA, DEPTH_SCALE = 0.15, 3.0, 0.35
# A type's changed genes: how many of all, how many of these change in all types, and log2 changes.
CHANGED, SHARED, LEAST, MEAN = 0.1, 0.6, 0.5, 1.0


def two_conditions(
    n_donors: int = 8,
    n_cells: int = 120,
    *,
    depth: float = 700.0,
    rng: int | np.random.Generator | None = 1,
) -> AnnData:
    """Draw counts of donors, one half of them treated, with the changes that treatment made.

    Five types with the mean profiles of :func:`pbmc68k_counts`, of 765 genes. Each donor has its
    own factor on each gene, log-normal with σ = .15, and its own shares of types; in each type
    treatment changes a tenth of the genes by a factor of √2 and more, either way, six tenths of
    them in all types alike. Counts are negative binomial with inverse dispersion 3.

    Parameters
    ----------
    n_donors
        At least 4, an even number; the second half is treated.
    n_cells
        Cells of each donor.
    depth
        Median total count of a cell.
    rng
        Seed or generator; None draws a fresh seed. A generator is advanced by the draws.

    Returns
    -------
    AnnData
        ``X``
            Counts, a float32 CSR matrix.
        ``obs``
            ``donor`` and ``condition`` (``control``, ``treated``), ``cell_type``, categorical.
        ``varm["log2_change"]``
            The truth: a DataFrame, genes × types, of what treatment does to a gene's mean in a
            type, before the donor's own factor; 0 where nothing.

    Raises
    ------
    TypeError, ValueError
        If a number is not what it should be, or ``rng`` is neither a seed nor a generator.

    Examples
    --------
    >>> import scuvae
    >>> adata = scuvae.datasets.two_conditions(n_donors=4, n_cells=50)
    >>> adata.shape
    (200, 765)
    >>> (adata.varm["log2_change"] != 0).mean().round(1).tolist()
    [0.1, 0.1, 0.1, 0.1, 0.1]
    """
    n_donors, n_cells = whole("n_donors", n_donors), whole("n_cells", n_cells)
    if n_donors < 4 or n_donors % 2:
        raise ValueError(f"n_donors must be an even number of at least 4, not {n_donors}.")
    depth = real("depth", depth, above=0.0)
    check_cells({"n_donors": n_donors, "n_cells": n_cells, "n_vars": 765})
    generator = random_generator(rng)
    profiles, names = _profiles()
    change = _changes(len(names), generator)

    donors = np.repeat(np.arange(n_donors), n_cells)
    own = np.exp(generator.normal(0, DONOR_SCALE, (n_donors, len(names))))
    shares = generator.dirichlet(CONCENTRATION * np.array(SHARES), n_donors)
    types = np.concatenate([generator.choice(len(TYPES), n_cells, p=share) for share in shares])
    treated = donors >= n_donors // 2
    mean = profiles[types] * own[donors] * np.where(treated[:, None], 2.0 ** change[types], 1)
    total = depth * np.exp(generator.normal(0, DEPTH_SCALE, len(donors)))
    mean *= (total / mean.sum(1))[:, None]
    counts = generator.poisson(mean * generator.gamma(THETA, 1 / THETA, mean.shape))

    obs = pd.DataFrame(
        {
            "donor": pd.Categorical([f"donor{d + 1}" for d in donors]),
            "condition": pd.Categorical(np.where(treated, "treated", "control")),
            "cell_type": pd.Categorical.from_codes(types, list(TYPES)),
        },
        index=[f"cell{i}" for i in range(len(donors))],
    )
    adata = AnnData(
        sparse.csr_matrix(counts.astype(np.float32)), obs=obs, var=pd.DataFrame(index=names)
    )
    adata.varm["log2_change"] = pd.DataFrame(change.T, index=names, columns=list(TYPES))
    return adata


def _profiles() -> tuple[np.ndarray, pd.Index]:
    """Mean shares of the types, (types, genes); no gene is quite absent from one."""
    cells = pbmc68k_counts()
    sums = [
        np.asarray(cells.X[(cells.obs["cell_type"] == kind).to_numpy()].sum(0), float).ravel()
        for kind in TYPES
    ]
    whole = np.sum(sums, axis=0)
    shares = np.stack([found + 20 * whole / whole.sum() + 0.05 for found in sums])
    return shares / shares.sum(1, keepdims=True), cells.var_names


def _changes(n_vars: int, generator: np.random.Generator) -> np.ndarray:
    """log2 changes, (types, genes)."""
    n_changed = round(CHANGED * n_vars)
    n_shared = round(SHARED * n_changed)
    order = generator.permutation(n_vars)
    shared, rest = order[:n_shared], order[n_shared:]
    size = LEAST + generator.exponential(MEAN - LEAST, (len(TYPES), n_vars))
    size[:, shared] = size[0, shared]
    sign = generator.choice([-1.0, 1.0], (len(TYPES), n_vars))
    sign[:, shared] = sign[0, shared]
    change = np.zeros((len(TYPES), n_vars))
    for kind in range(len(TYPES)):
        genes = np.append(shared, generator.choice(rest, n_changed - n_shared, replace=False))
        change[kind, genes] = (sign * size)[kind, genes]
    return change
