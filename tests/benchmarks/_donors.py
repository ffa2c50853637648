"""Simulated cells of several donors in two arms, of several types, with known changes."""

from dataclasses import dataclass

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse as sp


@dataclass(frozen=True)
class Study:
    """Donors an arm, cells a donor of each type, and how strong all is; natural logarithms."""

    donors: int = 4
    cells: tuple[int, ...] = (300, 200, 100, 50, 25)
    changed: float = 0.1  # genes that change, of each type
    shared: float = 0.6  # of these, in common to the types
    size: float = 0.8  # a change's mean absolute value
    spread: float = 0.15  # donors about their arm: the typical gene's
    depth: float = 1200.0
    theta: float = 2.0  # a cell's own dispersion, typical


def simulate(profiles: np.ndarray, study: Study, seed: int) -> ad.AnnData:
    """Counts of negative binomials whose means are types' profiles (types, genes), changed.

    A cell's log mean is its type's, a programme of its own (three factors), its donor's deviation
    (half of its variance for all types, half for the type; gamma over genes) and its arm's change.
    ``varm["change"]`` holds the truth, (genes, types): arm "b" against "a".
    """
    rng = np.random.default_rng(seed)
    n_types, n_genes = len(study.cells), profiles.shape[1]
    spread = study.spread / np.sqrt(rng.gamma(3, 1 / 3, n_genes))
    theta = study.theta * np.exp(0.5 * rng.normal(size=n_genes))
    programmes = rng.normal(size=(3, n_genes)) * (rng.random((3, n_genes)) < 0.2) * 0.4
    change = _changes(rng, study, n_genes)

    rows, obs = [], []
    for arm in "ab":
        for number in range(study.donors):
            common = rng.normal(size=n_genes)
            for kind in range(n_types):
                own = spread * (common + rng.normal(size=n_genes)) / np.sqrt(2)
                n = max(3, int(study.cells[kind] * np.exp(0.3 * rng.normal())))
                eta = np.log(profiles[kind]) + own + (arm == "b") * change[:, kind]
                eta = eta + rng.normal(size=(n, 3)) @ programmes
                share = np.exp(eta) / np.exp(eta).sum(1, keepdims=True)
                mu = study.depth * np.exp(0.4 * rng.normal(size=(n, 1))) * share
                counts = rng.poisson(mu * rng.gamma(theta, 1 / theta, mu.shape))
                rows.append(sp.csr_matrix(counts.astype(np.float32)))
                obs += [(f"type{kind}", arm, f"{arm}{number}")] * n
    table = pd.DataFrame(obs, columns=["cell_type", "arm", "donor"]).astype("category")
    table["group"] = (table["cell_type"].astype(str) + " " + table["arm"].astype(str)).astype(
        "category"
    )
    table.index = table.index.astype(str)
    names = [f"gene{i}" for i in range(n_genes)]
    adata = ad.AnnData(sp.vstack(rows).tocsr(), obs=table, var=pd.DataFrame(index=names))
    adata.varm["change"] = change
    return adata


def _changes(rng: np.random.Generator, study: Study, n_genes: int) -> np.ndarray:
    """(genes, types): some in common to the types, up to a factor, the others a type's own."""
    n_types = len(study.cells)

    def some(share: float, *shape: int) -> np.ndarray:
        signs = rng.choice([-1, 1], shape)
        return np.where(rng.random(shape) < share, signs * rng.gamma(4, study.size / 4, shape), 0)

    common = some(study.changed * study.shared, n_genes)[:, None]
    factor = np.exp(0.3 * rng.normal(size=(n_genes, n_types)))
    own = some(study.changed * (1 - study.shared), n_genes, n_types)
    return np.where(common != 0, common * factor, own)


def profiles_of(adata: ad.AnnData, n_types: int, n_genes: int) -> np.ndarray:
    """Mean shares of the most abundant types in the most expressed genes, (types, genes)."""
    kinds = adata.obs["cell_type"].value_counts().index[:n_types]
    counts = np.stack([np.asarray(adata[adata.obs["cell_type"] == k].X.sum(0))[0] for k in kinds])
    genes = np.argsort(-counts.sum(0), kind="stable")[:n_genes]
    shares = counts[:, np.sort(genes)] + 0.5
    return shares / shares.sum(1, keepdims=True)
