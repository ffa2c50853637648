"""Which score finds the cells of a type that the model never saw: AUROC by left-out type.

    python tests/benchmarks/novelty.py pbmc68k DATA.h5ad --seeds 0 1 2 --cache DIR --json out.json

Each cell type is left out of training in turn. All of its cells are to be told from the held-out
cells (a fifth, never trained on) of the other types; both are projected. Beside ``tl.novelty``
stand what one would take without it: the ELBO and the importance-weighted bound with their signs
turned, the ELBO for each count, the KL and the squared length of q's mean, the distance to the
nearest training cells in latent space, and where there is an encoder its amortization gap. Genes
are chosen over all cells, those of the left-out type included. ``--smooth 15`` averages the scores
compared with over neighbours, since ``tl.novelty`` uses neighbours too.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
from _common import Clock, load, medians, name_of, print_table, split, write_json

import scuvae

COMPARED = {
    "gap": "gap",
    "elbo": "−ELBO",
    "elbo_per_count": "−ELBO / count",
    "log_evidence": "−IW bound",
    "kl": "KL",
    "length": "|mean|²",
    "neighbours": "15-NN",
}
OURS = {
    "novelty": "novelty",
    "novelty_counts": "its counts",
    "novelty_latent": "its latent",
    "novelty_distance": "its distance",
    "novelty_shared": "its shared",
}
# What counts as found, and how far below the best single alternative the mean may lie.
FOUND, BELOW = 0.9, 0.03


def auroc(score: np.ndarray, novel: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(novel, score))


def fitted(
    train: ad.AnnData, data: str, seed: int, left_out: str, kind: str, args: argparse.Namespace
) -> ad.AnnData:
    """``train``, fitted with defaults, or as the cache has it."""
    slug = re.sub("[^A-Za-z0-9]", "", left_out)
    path = Path(args.cache or ".") / f"{name_of(data)}_{seed}_{slug}_{kind}.h5ad"
    if args.cache and path.exists():
        return ad.read_h5ad(path)
    options = {} if args.epochs is None else {"max_epochs": args.epochs}
    amortized = kind == "amortized"
    scuvae.tl.fit(train, amortized=amortized, likelihood="nb", rng=seed, device="cpu", **options)
    if args.cache:
        path.parent.mkdir(parents=True, exist_ok=True)
        train.write_h5ad(path)
    return train


def shifted(cells: ad.AnnData, sd: float, seed: int) -> ad.AnnData:
    """The cells as another experiment might see them: exp(−|N(0, sd²)|) of each gene's counts."""
    rng = np.random.default_rng(seed)
    share = np.exp(-np.abs(rng.normal(0, sd, cells.n_vars)))
    x = cells.X.tocsr()
    x.data = rng.binomial(x.data.astype(int), share[x.indices]).astype(np.float32)
    x.eliminate_zeros()
    out = ad.AnnData(x, obs=cells.obs, var=cells.var)
    return out[np.asarray(x.sum(1)).ravel() > 0].copy()


def scores(
    cells: ad.AnnData, reference: ad.AnnData, args: argparse.Namespace
) -> dict[str, np.ndarray]:
    """Each score of new cells, higher for those that are stranger."""
    from sklearn.neighbors import NearestNeighbors

    scuvae.tl.novelty(cells, reference, device="cpu", **args.novelty_args)
    ours = [name for name in OURS if f"scuvae_{name}" in cells.obs]
    out = {name: cells.obs[f"scuvae_{name}"].to_numpy() for name in ours}
    scuvae.tl.project(cells, reference, device="cpu")
    scuvae.tl.score(cells, n_samples=50, device="cpu")
    if scuvae.get.model(cells).encoder is not None:
        scuvae.tl.amortization_gap(cells, device="cpu")
        out["gap"] = cells.obs["scuvae_amortization_gap"].to_numpy()
    for name in ("elbo", "log_evidence"):
        out[name] = -cells.obs[f"scuvae_{name}"].to_numpy()
    out["elbo_per_count"] = out["elbo"] / np.asarray(cells.X.sum(1)).ravel()
    out["kl"] = cells.obs["scuvae_kl"].to_numpy()
    mean = cells.obsm["X_scuvae"]
    out["length"] = np.square(mean).sum(1)
    near = NearestNeighbors(n_neighbors=15).fit(reference.obsm["X_scuvae"])
    out["neighbours"] = near.kneighbors(mean)[0].mean(1)
    if args.smooth > 1:
        near = NearestNeighbors(n_neighbors=args.smooth).fit(mean).kneighbors(mean)[1]
        out |= {name: values[near].mean(1) for name, values in out.items() if name not in OURS}
    return out


def ordinary(data: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Cells like the reference's: the share above 1 by quarter of their depth, and by type.

    A tenth is right. Neither the fit nor the calibration saw these cells.
    """
    adata = load(data, args.n_genes)
    parts: dict[str, list[float]] = {}
    for seed in args.seeds:
        train, cells = split(adata, seed)
        reference = fitted(train, data, seed, "", "unamortized", args)
        scuvae.tl.novelty(cells, reference, device="cpu", **args.novelty_args)
        above = cells.obs["scuvae_novelty"].to_numpy() > 1
        depth = np.asarray(cells.X.sum(1)).ravel()
        quarter = np.searchsorted(np.quantile(depth, [0.25, 0.5, 0.75]), depth)
        groups = {f"depth, quarter {i + 1}": quarter == i for i in range(4)}
        kinds = cells.obs[args.label].to_numpy()
        groups |= {kind: kinds == kind for kind in cells.obs[args.label].unique()}
        for name, chosen in groups.items():
            parts.setdefault(name, []).extend(above[chosen].tolist())
    rows = [
        {"group": name, "cells": len(values), "above_1": float(np.mean(values))}
        for name, values in parts.items()
    ]
    print(f"\n{name_of(data)}: ordinary cells, seeds {args.seeds} together\n")
    shown = {"group": ("group", ""), "cells": ("cells", ".0f"), "above_1": ("> 1", ".3f")}
    print_table(rows, shown)
    return rows


def row(
    adata: ad.AnnData, data: str, seed: int, left_out: str, kind: str, args: argparse.Namespace
) -> dict[str, Any]:
    train, held_out = split(adata, seed)
    other = [cells[cells.obs[args.label] != left_out].copy() for cells in (train, held_out)]
    reference = fitted(other[0], data, seed, left_out, kind, args)
    of_type = adata[adata.obs[args.label] == left_out]
    cells = ad.concat([other[1], of_type], index_unique="-")
    cells.obs["novel"] = np.arange(cells.n_obs) >= other[1].n_obs
    if args.shift:
        cells = shifted(cells, args.shift, seed)
    novel = cells.obs["novel"].to_numpy()
    clock = Clock()
    found = scores(cells, reference, args)
    usual = found["novelty"][~novel]
    return {
        "left_out": left_out,
        "seed": seed,
        "cells": float(novel.sum()),
        **{name: auroc(values, novel) for name, values in found.items()},
        # Of the other types' held-out cells a tenth and a hundredth should lie above 1 and 2.
        "above_1": float((usual > 1).mean()),
        "above_2": float((usual > 2).mean()),
        "found_above_2": float((found["novelty"][novel] > 2).mean()),
        "depth": float(
            np.corrcoef(np.log(np.asarray(cells.X.sum(1)).ravel()[~novel]), usual)[0, 1]
        ),
        "cpu_s": clock.seconds(),
    }


def verdict(table: list[dict[str, Any]]) -> dict[str, Any]:
    """The worst found type, and the mean against the best single alternative's."""
    names = [name for name in COMPARED if name in table[0]]
    means = {name: float(np.mean([row[name] for row in table])) for name in names}
    best = max(means, key=lambda name: means[name])
    ours = float(np.mean([row["novelty"] for row in table]))
    found = [row for row in table if max(row[name] for name in names) >= FOUND]
    worst = min(found, key=lambda row: row["novelty"]) if found else None
    each = np.mean([max(row[name] for name in names) for row in table])
    missed = [row["left_out"] for row in found if row["novelty"] < FOUND]
    print(f"types that a compared score finds at {FOUND}: {len(found)} of {len(table)}")
    if worst:
        print(f"novelty's worst of them: {worst['left_out']}, {worst['novelty']:.3f}")
    print(f"missed: {', '.join(missed) or 'none'}")
    print(f"mean: novelty {ours:.3f}, best single ({COMPARED[best]}) {means[best]:.3f}: ", end="")
    print(f"{ours - means[best]:+.3f}, at least {-BELOW}? {ours - means[best] >= -BELOW}")
    print(f"each type's own best score, mean: {each:.3f}\n", flush=True)
    return {"means": means | {"novelty": ours}, "best": best, "found": len(found), "missed": missed}


def measure(data: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    adata = load(data, args.n_genes)
    sizes = adata.obs[args.label].value_counts()
    types = [name for name in sizes.index if sizes[name] >= args.fewest]
    if args.types:
        types = [name for name in types if name in args.types]
    print(f"\n## {name_of(data)}: {adata.n_obs} cells x {adata.n_vars} genes\n", flush=True)
    results = []
    for kind in args.kinds:
        rows = []
        for left_out in types:
            for seed in args.seeds:
                found = row(adata, data, seed, left_out, kind, args)
                rows.append(found)
                shown = {k: round(v, 3) for k, v in found.items() if isinstance(v, float)}
                print(kind, left_out, seed, shown, flush=True)
        if not rows:
            continue
        table = medians(rows, "left_out")
        columns = {"left_out": ("left out", ""), "cells": ("cells", ".0f")}
        columns |= {name: (text, ".2f") for name, text in (OURS | COMPARED).items()}
        columns |= {
            "above_1": ("usual > 1", ".2f"),
            "above_2": ("> 2", ".3f"),
            "found_above_2": ("novel > 2", ".2f"),
            "depth": ("r with ln depth", ".2f"),
        }
        print(f"\n{name_of(data)}, {kind}: AUROC, medians of seeds {args.seeds}\n")
        print_table(table, columns)
        results.append({"data": name_of(data), "kind": kind, "table": table, "rows": rows})
        results[-1]["verdict"] = verdict(table)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("data", nargs="+", help="files of raw counts, or pbmc68k for the data that ships")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of split, fit and draws")
    kinds = ["unamortized", "amortized"]
    add("--kinds", nargs="+", default=kinds, choices=kinds)
    add("--types", nargs="+", help="cell types to leave out; all by default")
    add("--fewest", type=int, default=20, help="types of fewer cells are not left out")
    add("--label", default="cell_type", help="column of obs with the types")
    add("--n-genes", type=int, default=2000)
    add("--ordinary-only", action="store_true", help="leave no type out")
    add("--epochs", type=int, help="of a fit, for a quick look; its own number by default")
    add("--novelty-args", type=json.loads, default={}, help="arguments of tl.novelty, as JSON")
    add("--smooth", type=int, default=1, help="average compared scores over so many new cells")
    add("--shift", type=float, default=0.0, help="ln sd of a loss of each gene, in the new cells")
    add("--cache", help="folder for the fits: each is made once")
    add("--json", help="file for all figures")
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    for data in args.data:
        usual = ordinary(data, args)
        results.append({"data": name_of(data), "kind": "ordinary", "table": usual})
        if not args.ordinary_only:
            results += measure(data, args)
        arguments = {k: v for k, v in vars(args).items() if k not in ("json", "cache")}
        write_json(args.json, {"arguments": arguments, "results": results})


if __name__ == "__main__":
    main()
