"""``tl.extend_genes``: held-out molecules of genes that were added to a fit, or in it.

    python tests/benchmarks/further_genes.py pbmc68k DATA.h5ad ... --fitted 2000 --further 2000

Each count is split binomially into halves H and O (``--seeds``). One fit to H has the ``--fitted``
most variable genes of H and is extended by the ``--further`` next, without and with ``key_added``;
another has all of them from the start. All explain O's counts of the further genes: mean nats a
cell beyond their mean profile, Σ O ln μ − μ (Poisson), and ln NB with each gene's θ by maximum
likelihood on H at the method's own means (as in molecules.py). Means are ``tl.denoise``'s, times a
cell's total in O over that in H.
"Shuffled" are the same genes of the extended fit with means of other cells: what a wrong z costs.
"""

import argparse
from typing import Any

import anndata as ad
import numpy as np
import scanpy as sc
from _common import Clock, load, medians, name_of, platform_of, print_table, write_json
from _views import fit_log_theta
from scipy import sparse as sp
from scipy import stats

import scuvae


def halves(counts: sp.csr_matrix, seed: int) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    half = counts.copy()
    half.data = (
        np.random.default_rng(seed).binomial(counts.data.astype(int), 0.5).astype(np.float32)
    )
    other = sp.csr_matrix(counts - half)
    half.eliminate_zeros()
    return half, other


def scores(mean: np.ndarray, half: np.ndarray, other: np.ndarray, sizes: np.ndarray) -> list[float]:
    """Poisson and NB, Σ over genes, mean over cells; ``sizes`` are cells' totals in H and O."""
    total, ratio = sizes[:, 0], sizes[:, 1] / sizes[:, 0]
    rest = (total - half.sum(1))[:, None]
    profiles = np.concatenate([mean, rest + 1e-6], 1) / total[:, None]
    theta = np.exp(fit_log_theta(sp.csr_matrix(np.concatenate([half, rest], 1)), profiles)[:-1])
    mu = np.maximum(mean * ratio[:, None], 1e-12)
    poisson = (other * np.log(mu) - mu).sum(1).mean()
    nb = stats.nbinom.logpmf(other, theta, theta / (theta + mu)).sum(1).mean()
    return [float(poisson), float(nb)]


def measure(data: str, args: argparse.Namespace) -> dict[str, Any]:
    full = load(data, 10**6)
    if full.n_obs > args.cells:
        rows = np.random.default_rng(0).choice(full.n_obs, args.cells, replace=False)
        full = full[np.sort(rows)].copy()
    found: list[dict[str, Any]] = []
    for seed in args.seeds:
        half, other = halves(sp.csr_matrix(full.X), seed)
        adata = ad.AnnData(half, obs=full.obs[[]].copy(), var=full.var[[]].copy())
        adata = adata[:, np.asarray(half.sum(0)).ravel() >= args.min_counts].copy()
        n = min(args.fitted + args.further, adata.n_vars)
        sc.pp.highly_variable_genes(adata, flavor="seurat_v3", n_top_genes=n)
        rank = adata.var["highly_variable_rank"].to_numpy()
        adata = adata[:, rank < n].copy()
        rank = adata.var["highly_variable_rank"].to_numpy()
        n_fitted = min(args.fitted, round(0.65 * n))
        adata.var["fitted"] = rank < n_fitted
        further = ~adata.var["fitted"].to_numpy()
        other = other[:, full.var_names.get_indexer(adata.var_names)]
        kept = np.asarray(adata[:, ~further].X.sum(1)).ravel() > 0
        adata, other = adata[kept].copy(), other[kept]
        here, there = adata.X[:, further].toarray(), other[:, further].toarray()
        total = np.asarray(adata.X.sum(1)).ravel()
        sizes = np.stack([total, np.asarray(other.sum(1)).ravel()], 1)
        share = here.sum(0) / total.sum()
        base = scores(total[:, None] * share, here, there, sizes)
        options = {"likelihood": args.likelihood, "rng": seed, "progress": False, "device": "cpu"}
        means, seconds = {}, {}
        for name, mask in (("from the start", None), ("extended", "fitted")):
            one, clock = adata.copy(), Clock()
            scuvae.tl.fit(one, mask_var=mask, **options)
            seconds[name] = clock.seconds()
            if mask:
                clock = Clock()
                scuvae.tl.extend_genes(one, min_counts=1, n_samples=args.n_samples, device="cpu")
                seconds[name] = clock.seconds()
            genes = list(one.var_names[further])
            means[name] = scuvae.tl.denoise(one, genes=genes, device="cpu").to_numpy(float)
            if mask:
                name, clock = "extended, key_added", Clock()
                options_ = {"min_counts": 1, "n_samples": args.n_samples, "device": "cpu"}
                scuvae.tl.extend_genes(one, key_added="whole", **options_)
                seconds[name] = clock.seconds()
                table = scuvae.tl.denoise(one, key="whole", genes=genes, device="cpu")
                means[name] = table.to_numpy(float)
        means["extended, shuffled"] = np.random.default_rng(0).permutation(means["extended"])
        best = None
        for name, mean in means.items():
            value = [a - b for a, b in zip(scores(mean, here, there, sizes), base, strict=True)]
            best = best or value
            row = {"method": name, "seed": seed, "poisson": value[0], "nb": value[1]}
            row |= {"of_poisson": value[0] / best[0], "of_nb": value[1] / best[1]}
            row["cpu_s"] = seconds.get(name, float("nan"))
            found.append(row)
            print(row, flush=True)
    table = medians(found, "method")
    print(f"\n{name_of(data)}: {adata.n_obs} cells, {n_fitted} genes, {further.sum()} further\n")
    columns = {"method": ("method", ""), "poisson": ("Poisson", ".2f"), "nb": ("NB", ".2f")}
    columns |= {"of_poisson": ("of the first", ".3f"), "of_nb": ("NB, of the first", ".3f")}
    print_table(table, columns | {"cpu_s": ("CPU s", ".1f")})
    return {"data": name_of(data), "table": table, "rows": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("data", nargs="+", help="files of raw counts, or pbmc68k")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--fitted", type=int, default=2000, help="genes; at most 65 %% of all")
    add("--further", type=int, default=2000)
    add("--min-counts", type=int, default=20, help="of a gene in H")
    add("--cells", type=int, default=2000)
    add("--n-samples", type=int, default=2)
    add("--likelihood", default="nb")
    add("--json")
    args = parser.parse_args()
    results = [measure(data, args) for data in args.data]
    write_json(args.json, {"arguments": vars(args), "platform": platform_of(), "results": results})


if __name__ == "__main__":
    main()
