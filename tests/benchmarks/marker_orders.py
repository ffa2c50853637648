"""Orders of markers without donors: how high public markers stand in lists of each kind.

    python tests/benchmarks/marker_orders.py pbmc68k DATA.h5ad ... --cache DIR

For each type of each set the AUROC of its public markers (differential.py) among all genes, and the
share of them among the first 20; means over types. ``z`` is Wilcoxon's, Welch's t of log1p, or that
of the pooled likelihood ratio (``tl.rank_genes``'s p). All others are of the difference δ of a
type's log rate from the weighted mean of the other types', rates as in
``scuvae.inference.evaluation.group_contrast`` (or with half a count added, ``raw``): types weigh by
cells, their root, or alike; δ as it is, its z (``extra``: with the spread of cells in its error
too), δ less three errors, δ |z| / (|z| + t), δ |z|.
"""

import argparse
import logging
import warnings
from typing import Any

from _common import load, name_of, print_table, write_json  # isort: skip
import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from differential import MARKERS, TYPES, auroc, fitted, signed
from scipy.special import digamma, polygamma

import scuvae
from scuvae.io.fit_state import read_fit
from scuvae.tl._groups import design_of
from scuvae.tl._rank_genes import Ranking


def orders(adata: AnnData, log: AnnData) -> dict[str, dict[str, np.ndarray]]:
    """Scores of all genes by type and order."""
    genes, column = adata.var_names, adata.obs["cell_type"].astype("category")
    groups = [str(kind) for kind in column.cat.remove_unused_categories().cat.categories]
    fit = read_fit(adata, None)
    design = design_of(adata, fit, "cell_type", "all", "rest", None)
    totals = Ranking(adata, fit, None, design, torch.device("cpu"), 4).totals
    y, e, n = (part.numpy() for part in (totals.counts, totals.exposure, totals.cells))
    extra, e = totals.variance().numpy(), e[:, None]
    prior = 0.5 * e.sum() / (y.sum(0) + 0.5)
    rates = {
        "": (digamma(y + 0.5) - np.log(e + prior), polygamma(1, y + 0.5)),
        "raw ": (np.log((y + 0.5) / e), 1 / (y + 0.5)),
    }
    out: dict[str, dict[str, np.ndarray]] = {}
    for i, group in enumerate(groups):
        others = np.arange(len(groups)) != i
        found = {
            "z, Wilcoxon": signed(log.uns["wilcoxon"], group, genes),
            "z, Welch": signed(log.uns["t-test"], group, genes),
            "tl.rank_genes": signed(adata.uns["rank_genes_groups"], group, genes),
        }
        result = adata.uns["rank_genes_groups"]
        names = pd.Index(result["names"][group])
        p, change = (
            result[part][group][names.get_indexer(genes)] for part in ("pvals", "logfoldchanges")
        )
        # Ties where p is 0: by the change.
        found["z, pooled"] = np.sign(change) * (-np.log(p + 1e-300) + 1e-6 * np.abs(change))
        for kind, (level, variance) in rates.items():
            for weigh, power in (("cells", 1.0), ("roots", 0.5), ("alike", 0.0)):
                w = n[others] ** power / (n[others] ** power).sum()
                d = level[i] - w @ level[others]
                s = np.sqrt(variance[i] + w**2 @ variance[others])
                wide = np.sqrt(s**2 + extra[i] + w**2 @ extra[others])
                z = np.abs(d) / s
                some = {"δ": d, "z": d / s, "extra z": d / wide, "δ |z|": d * z}
                some["δ less 3 errors"] = np.sign(d) * np.maximum(np.abs(d) - 3 * s, 0) + 1e-4 * z
                some |= {f"t = {t}": d * z / (z + t) for t in (2, 8, 16, 64)}
                found |= {f"{kind}{weigh}, {name}": score for name, score in some.items()}
        out[group] = found
    return out


def measure(data: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    import scanpy as sc

    adata = fitted(args, f"{name_of(data)}_{args.genes}", lambda: load(data, args.genes))
    scuvae.tl.rank_genes(adata, "cell_type")
    log = adata.copy()
    sc.pp.normalize_total(log, target_sum=1e4)
    sc.pp.log1p(log)
    for method in ("wilcoxon", "t-test"):
        sc.tl.rank_genes_groups(log, "cell_type", method=method, key_added=method)
    rows = []
    for group, found in orders(adata, log).items():
        for kind, listed in MARKERS.items():
            marker = adata.var_names.isin(listed.split())
            if group not in TYPES[kind] or not marker.any():
                continue
            for name, score in found.items():
                first = np.argsort(-score, kind="stable")[:20]
                row = {"data": name_of(data), "type": group, "order": name}
                row |= {"auroc": auroc(score, marker), "first": marker[first].sum() / marker.sum()}
                rows.append(row)
    return rows


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="+", help="files of raw counts, or pbmc68k")
    parser.add_argument("--genes", type=int, default=1500)
    parser.add_argument("--cache")
    parser.add_argument("--json")
    args = parser.parse_args()
    rows = [row for data in args.data for row in measure(data, args)]
    table = pd.DataFrame(rows)
    wide = table.pivot_table(["auroc", "first"], "order", "data", sort=False)
    lines, columns = [], {"order": ("order", "")}
    for name in table["order"].unique():
        line: dict[str, Any] = {"order": name}
        for data in table["data"].unique():
            for what, title in (("auroc", "AUROC"), ("first", "of the first 20")):
                line[f"{what} {data}"] = float(wide.loc[name, (what, data)])
                columns[f"{what} {data}"] = (f"{data}: {title}", ".3f")
        lines.append(line)
    print_table(lines, columns)
    write_json(args.json, rows)


if __name__ == "__main__":
    main()
