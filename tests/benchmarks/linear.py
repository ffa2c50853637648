"""Linear decoders beside GLM-PCA: both fitted to one half of every count, judged by both halves.

    pip install glmpca
    python tests/benchmarks/linear.py pbmc68k DATA.h5ad ... --seeds 0 --cells 1500 --n-genes 1000

Poisson's deviance of each method's means, a cell, on the half that was fitted and on the other,
whose expected means are the same. glmpca (Townes et al. 2019, the authors' Python package) with
some ridge penalties, at most 300 iterations; the best *by the other half* is its row. Ours:
``tl.fit(n_layers=0)`` and ``tl.denoise``.
"""

from typing import Any

import _methods as methods
import _views as views
import anndata as ad
import numpy as np
from _common import Clock, medians, print_table, write_json
from _methods import Data
from scipy import sparse as sp

from scuvae import tl

COLUMNS = {
    "model": ("model", ""),
    "cpu_s": ("CPU s", ".1f"),
    "fitted": ("deviance, fitted half", ".2f"),
    "other": ("other half", ".2f"),
}
PENALTIES = 1, 10, 100


def deviance(counts: sp.csr_matrix, means: np.ndarray) -> float:
    """2 Σ x ln(x/μ) − (x − μ), mean over cells."""
    x = counts.tocoo()
    ratio = x.data * np.log(x.data / means[x.row, x.col])
    return float(2 * (ratio.sum() - counts.sum() + means.sum()) / counts.shape[0])


def theirs(
    half: sp.csr_matrix, n_latent: int, family: str, penalty: float, seed: int
) -> np.ndarray:
    from glmpca import glmpca

    np.random.seed(seed)  # noqa: NPY002, its only way to be told
    control = {"maxIter": 300, "eps": 1e-4}
    found = glmpca.glmpca(half.toarray().T, n_latent, fam=family, penalty=penalty, ctl=control)
    # Its size factors are each cell's mean over genes, and enter as an offset.
    offset = np.log(views.totals(half) / half.shape[1])
    eta = found["coefX"][:, :1].T + found["factors"] @ found["loadings"].T
    return np.exp(eta + offset[:, None])


def rows(data: Data, seed: int, n_latent: int):
    half, other = views.halves(data.adata.X, seed)
    kept = views.totals(half, 0) > 0
    half, other = half[:, kept], other[:, kept]

    def row(label, seconds, means):
        judged = {"fitted": deviance(half, means), "other": deviance(other, means)}
        return {"model": label, "seed": seed, "cpu_s": seconds, **judged}

    for family, name in (("poi", "poisson"), ("nb", "negative_binomial")):
        adata = ad.AnnData(sp.csr_matrix(half, dtype=np.float32))
        clock = Clock()
        tl.fit(adata, n_layers=0, likelihood=name, n_latent=n_latent, rng=seed)
        seconds = clock.seconds()
        tl.denoise(adata, layer_added="means")
        profiles = views.as_profiles(np.asarray(adata.layers["means"], float))
        yield row(f"ours, {name}", seconds, views.totals(half)[:, None] * profiles)
        best: dict[str, Any] | None = None
        for penalty in PENALTIES:
            clock = Clock()
            try:
                means = theirs(half, n_latent, family, penalty, seed)
            except Exception as error:  # it diverges, and says so in several ways
                print(f"glmpca, {family}, penalty {penalty}: {error}", flush=True)
                continue
            found = row(f"glmpca, {family}", clock.seconds(), means)
            print({**found, "penalty": penalty}, flush=True)
            if best is None or found["other"] < best["other"]:
                best = found
        if best is not None:
            yield best


def main() -> None:
    parser = methods.parser(__doc__, ["unamortized"], ["unamortized"])
    parser.add_argument("--latent", type=int, default=10)
    args = parser.parse_args()
    methods.warm_up()
    results = []
    for path in args.data:
        data = Data(path, args)
        print(f"\n## {data}\n", flush=True)
        found = []
        for seed in args.seeds:
            for row in rows(data, seed, args.latent):
                methods.say(row)
                found.append(row)
        table = medians(found, "model")
        print_table(table, COLUMNS)
        results.append({"data": data.name, "table": table, "rows": found})
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    main()
