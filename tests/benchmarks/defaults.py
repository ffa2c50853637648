"""How strong the prior of a decoder's last weights is, and how much dropout: by all that is judged.

For each setting: held-out ELBO (a fifth of the cells, q refined), held-out molecules (Poisson,
beyond the mean profile), own-type share of 15 neighbours in the map, and what two seeds have in
common. One line a setting and set; the constants of scuvae/model/decoder.py are set for the run.

python tests/benchmarks/defaults.py pbmc68k DATA.h5ad ... --hidden 30 100 300 --dropout 0 0.05 0.1
"""

import argparse
import itertools
import time
from typing import Any

import anndata as ad
import numpy as np
from _common import cells_of, held_out_scores, load, name_of, print_table, split
from _views import halves, jaccard, mean_profile, neighbours, poisson_score, purity

import scuvae
from scuvae.model import decoder as networks

COLUMNS = {
    "data": ("data", "s"),
    "setting": ("setting", "s"),
    "cpu_s": ("CPU s", ".1f"),
    "elbo": ("held-out ELBO", ".2f"),
    "molecules": ("molecules", ".1f"),
    "own_type": ("own type", ".3f"),
    "jaccard": ("15-NN Jaccard", ".3f"),
}


def measure(adata: ad.AnnData, options: dict[str, Any], seeds: list[int]) -> dict[str, float]:
    """One row, of fits with ``options`` of tl.fit."""
    types = adata.obs["cell_type"].astype(str).to_numpy()
    maps, seconds = [], []
    for seed in seeds:
        fit = adata.copy()
        start = time.process_time()
        scuvae.tl.fit(fit, rng=seed, progress=False, **options)
        seconds.append(time.process_time() - start)
        maps.append(neighbours(fit.obsm["X_scuvae_embed"], 15))
    train, held_out = split(adata, seeds[0])
    without = {name: value for name, value in options.items() if name != "batch_key"}
    scuvae.tl.fit(train, rng=seeds[0], progress=False, **without)
    scores, _ = held_out_scores(scuvae.get.model(train), cells_of(held_out))
    half, rest = halves(adata.X, seeds[0])
    fitted = ad.AnnData(half, obs=adata.obs.copy(), var=adata.var.copy())
    scuvae.tl.fit(fitted, rng=seeds[0], progress=False, **options)
    means = scuvae.tl.denoise(fitted, genes=list(fitted.var_names), library_size=1).to_numpy()
    beyond = poisson_score(rest, means) - poisson_score(rest, mean_profile(half))
    pairs = itertools.combinations(maps, 2)
    return {
        "cpu_s": float(np.median(seconds)),
        "elbo": scores["elbo_refined"],
        "molecules": float(beyond.mean()),
        "own_type": float(np.mean([purity(near, types) for near in maps])),
        "jaccard": float(np.mean([jaccard(*pair) for pair in pairs])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--hidden", nargs="+", type=float, default=[networks._HIDDEN_PRECISION])
    parser.add_argument("--linear", nargs="+", type=float, default=[networks._LINEAR_PRECISION])
    parser.add_argument("--few-cells", nargs="+", type=float, default=[networks._FEW_CELLS])
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.05])
    parser.add_argument("--n-layers", nargs="+", type=int, default=[1], help="0: linear decoders")
    parser.add_argument("--batch-key", default=None)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    args = parser.parse_args()
    rows = []
    settings = itertools.product(
        args.hidden, args.linear, args.few_cells, args.dropout, args.n_layers
    )
    for hidden, linear, few, dropout, n_layers in settings:
        networks._HIDDEN_PRECISION, networks._LINEAR_PRECISION = hidden, linear
        networks._FEW_CELLS = few
        options = {"dropout": dropout, "n_layers": n_layers, "batch_key": args.batch_key}
        setting = f"{hidden:g}, {linear:g}, {few:g}, dropout {dropout:g}, layers {n_layers}"
        for data in args.data:
            row = {"data": name_of(data), "setting": setting}
            rows.append(row | measure(load(data), options, args.seeds))
            print(rows[-1], flush=True)
    print_table(rows, COLUMNS)


if __name__ == "__main__":
    main()
