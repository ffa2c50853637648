"""What a map should be made of: components, whitening, and the spread of q.

python tests/benchmarks/embedding.py pbmc68k DATA.h5ad ... --labels cell_type
"""

import argparse
from itertools import pairwise

import numpy as np
import torch
from _common import load
from sklearn.metrics import adjusted_rand_score
from sklearn.neighbors import NearestNeighbors

import scuvae
from scuvae.inference.mapping.embedding import find_basis, place

COMPONENTS = 10, 15, 30, 50
_DRAWS = 4


def maps(adata):
    """Every candidate's coordinates, by name, and latent means."""
    model = scuvae.get.model(adata)
    q = scuvae.get.posterior(adata)
    mean, total = q.mean, float(adata.uns["scuvae"]["embed"]["total"])
    basis = find_basis(model, mean, total, max(COMPONENTS))
    whole = place(model, mean, basis).numpy()
    out = {"latent": mean.numpy()} | {f"map {k}": whole[:, :k] for k in COMPONENTS}
    out["map 30, white"] = whole[:, :30] / whole[:, :30].std(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = torch.stack([place(model, q.sample(), basis) for _ in range(_DRAWS)])
    out["E_q map 30"] = drawn.mean(0).numpy()[:, :30]
    return out


def nearest(points, k=15):
    return NearestNeighbors(n_neighbors=k).fit(points).kneighbors(return_distance=False)


def jaccard(one, other):
    shared = np.array([len(np.intersect1d(a, b)) for a, b in zip(one, other, strict=True)])
    return (shared / (2 * one.shape[1] - shared)).mean()


def clusters(points, resolutions):
    import anndata as ad
    import scanpy as sc

    adata = ad.AnnData(obsm={"X": np.asarray(points, np.float32)})
    sc.pp.neighbors(adata, n_neighbors=15, use_rep="X")
    for r in resolutions:
        options = {"flavor": "igraph", "n_iterations": 2, "directed": False}
        sc.tl.leiden(adata, resolution=r, **options)
        yield adata.obs["leiden"].to_numpy()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("data", nargs="+")
    parser.add_argument("--labels", default="cell_type")
    parser.add_argument("--batch-key")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--cells", type=int, default=4000)
    args = parser.parse_args()
    for data in args.data:
        adata = load(data)
        rng = np.random.default_rng(0)
        adata = adata[np.sort(rng.permutation(adata.n_obs)[: args.cells])].copy()
        labels = adata.obs[args.labels].astype(str).to_numpy()
        found: dict[str, list] = {}
        for seed in args.seeds:
            scuvae.tl.fit(adata, batch_key=args.batch_key, rng=seed)
            for name, points in maps(adata).items():
                near = nearest(points)
                ari = [adjusted_rand_score(labels, c) for c in clusters(points, (0.2, 0.5, 1.0))]
                purity = (labels[near] == labels[:, None]).mean()
                found.setdefault(name, []).append((near, purity, max(ari)))
        for name, rows in found.items():
            same = [jaccard(a[0], b[0]) for a, b in pairwise(rows)]
            purity, ari = (np.mean([row[i] for row in rows]) for i in (1, 2))
            print(f"{data} {name}: purity {purity:.3f} best ARI {ari:.3f} Jaccard {same}")


if __name__ == "__main__":
    main()
