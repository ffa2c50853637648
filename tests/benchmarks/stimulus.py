"""A file of cells half of which have met a simulated stimulus, for integration.py.

    python tests/benchmarks/stimulus.py kang18_ctrl_12k.h5ad stimulus.h5ad
    python tests/benchmarks/integration.py stimulus.h5ad --batch-key stimulus

Half of each donor's cells get more counts of 120 genes, a tenth of a cell's on average: each type
answers with half of them as all do, and in its own way, or not, with the others; each cell answers
more or less. Sixty further genes, drawn anew for each type, keep .4 of their counts. ``stimulus``
and ``donor_stimulus`` go into obs.
"""

import argparse

import numpy as np
from _common import load
from scipy import sparse as sp


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", help="file of raw counts, with cell_type and batch in obs")
    parser.add_argument("output", help="file to write")
    parser.add_argument("--cells", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rng = np.random.default_rng(args.seed)
    adata = load(args.data, 2000)
    adata = adata[np.sort(rng.permutation(adata.n_obs)[: args.cells])].copy()
    met = rng.random(adata.n_obs) < 0.5
    counts = sp.csr_matrix(adata.X).toarray()  # some thousand cells
    totals = counts.sum(1)
    raised = rng.permutation(adata.n_vars)[:120]
    share = rng.lognormal(0, 1.2, len(raised))
    share *= 0.12 / share.sum()
    types = adata.obs["cell_type"].astype(str).to_numpy()
    for kind in np.unique(types):
        rows = np.flatnonzero((types == kind) & met)
        own = rng.lognormal(0, 1, len(raised)) * (rng.random(len(raised)) < 0.6)
        answer = share * np.where(rng.random(len(raised)) < 0.5, 1, own)
        strength = rng.gamma(4, 1 / 4, (len(rows), 1))
        counts[np.ix_(rows, raised)] += rng.poisson(totals[rows, None] * answer * strength)
        lowered = np.ix_(rows, rng.permutation(adata.n_vars)[:60])
        counts[lowered] = rng.binomial(counts[lowered].astype(int), 0.4)

    adata.X = sp.csr_matrix(counts.astype(np.float32))
    adata.obs["stimulus"] = np.where(met, "stimulated", "control")
    adata.obs["donor_stimulus"] = [
        f"{donor}, {what}"
        for donor, what in zip(adata.obs["batch"], adata.obs["stimulus"], strict=True)
    ]
    adata.write_h5ad(args.output)


if __name__ == "__main__":
    main()
