"""Differential expression: is the false-discovery rate what it says, and what is found at it.

    python tests/benchmarks/differential.py simulated DATA.h5ad --seeds 0 1 2 [--shared .6 0] \
        [--donors 4] [--cache DIR] [--deseq2] [--json FILE]
    python tests/benchmarks/differential.py permuted KANG.h5ad --types "B cells" ... [--deseq2]
    python tests/benchmarks/differential.py markers DATA.h5ad ... | pbmc68k
    python tests/benchmarks/differential.py seeds DATA.h5ad | pbmc68k

``simulated``: two arms of donors, types of 300 to 25 cells a donor, from profiles of real types
(``_donors.py``); ``--shared`` of the changes are common to types. One fit to all cells, without the
arms. Power is that at a realised rate of 5 and 10 %. ``permuted``: donors of a control condition in
two arms of four in all 35 ways (and, from 35 on, again with arms of three and five); one fit.
``markers``: AUROC of public markers of PBMC types among all genes (other orders:
marker_orders.py). ``seeds``: overlap of top lists
of two fits. DESeq2 is pydeseq2's, by default; p without a value count as 1.
"""

import argparse
import logging
import warnings
from itertools import combinations
from pathlib import Path
from typing import Any

from _common import load, name_of, print_table, write_json  # isort: skip
import anndata as ad
import numpy as np
import pandas as pd
from _donors import Study, profiles_of, simulate
from scipy.stats import false_discovery_control, rankdata, ttest_ind

import scuvae

warnings.filterwarnings("ignore")
LEVELS = (0.01, 0.05, 0.1)

# Public markers (Seurat's and scanpy's PBMC tutorials, CellTypist's and Azimuth's PBMC references).
MARKERS = {
    "B": "CD79A CD79B MS4A1 CD19 CD22 TCL1A BANK1 BLK VPREB3 FCER2 LINC00926 IGJ",
    "NK": "GNLY NKG7 KLRD1 KLRF1 PRF1 GZMB FGFBP2 SPON2 CST7 FCGR3A CLIC3 KLRB1 XCL1 XCL2",
    "CD14 monocyte": "CD14 LYZ S100A8 S100A9 S100A12 FCN1 VCAN MS4A6A CST3 CSF3R LGALS2",
    "FCGR3A monocyte": "FCGR3A MS4A7 LST1 CDKN1C RHOC HES4 IFITM3 CSF1R VMO1 LYPD2",
    "dendritic": "FCER1A CST3 CLEC10A CD1C HLA-DQA1 HLA-DQB1 HLA-DPB1 HLA-DPA1 HLA-DRA CLEC9A",
    "megakaryocyte": "PPBP PF4 GNG11 SDPR TUBB1 CLU GP9 ITGA2B SPARC NRGN TREML1",
    "CD8 T": "CD8A CD8B CD3D CD3E CD3G GZMK GZMH CCL5 CST7",
    "CD4 T": "CD3D CD3E IL7R CD4 LTB LDHB TCF7 MAL CCR7",
    "CD34": "CD34 SPINK2 KIAA0125 SOX4 STMN1 GATA2 CYTL1 PRSS57 EGFL7 SMIM24",
}
TYPES = {
    "B": ("CD19+ B", "B cells", "B"),
    "NK": ("CD56+ NK", "NK cells", "NK"),
    "CD14 monocyte": ("CD14+ Monocyte", "CD14+ Monocytes", "Mono_CD14"),
    "FCGR3A monocyte": ("FCGR3A+ Monocytes", "Mono_CD16"),
    "dendritic": ("Dendritic", "Dendritic cells", "DC"),
    "megakaryocyte": ("Megakaryocytes", "MK"),
    "CD8 T": ("CD8+ Cytotoxic T", "CD8+/CD45RA+ Naive Cytotoxic", "CD8 T cells", "T_CD8"),
    "CD4 T": ("CD4+ T Helper2", "CD4+/CD25 T Reg", "CD4+/CD45RO+ Memory", "CD4 T cells", "T_CD4"),
    "CD34": ("CD34+", "HSC"),
}


# --- methods: what to rank by (small is sure), and what says the rate -----------------------------


def ours(adata: ad.AnnData, column: str, a: str, b: str, donors: str | None) -> dict[str, Any]:
    scuvae.tl.rank_genes(adata, column, groups=[a], reference=b, donor_key=donors, key_added="r")
    result = adata.uns["r"]
    table = pd.DataFrame({name: result[name][a] for name in result if name != "params"})
    table = table.set_index("names").loc[adata.var_names]
    false, z = table["expected_fdr"].to_numpy(float), np.abs(table["scores"].to_numpy(float))
    return {
        "rank_genes, probabilities": (table["lfsr"].to_numpy(float) - 1e-9 * z, false),
        "rank_genes, p": (-z, table["pvals_adj"].to_numpy(float)),
    }


def adjusted(p: np.ndarray, tested: np.ndarray) -> np.ndarray:
    out = np.ones(len(p))
    out[tested] = false_discovery_control(np.nan_to_num(p[tested], nan=1.0))
    return out


def pseudobulk(adata: ad.AnnData, column: str, a: str, b: str, donor: str) -> tuple[Any, Any]:
    rows, first = [], []
    for side in (a, b):
        of = (adata.obs[column] == side).to_numpy()
        for name in np.unique(adata.obs[donor][of].astype(str)):
            cells = of & (adata.obs[donor].astype(str) == name).to_numpy()
            rows.append(np.asarray(adata.X[cells].sum(0))[0])
            first.append(side == a)
    return np.array(rows), np.array(first)


def t_test(y: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    log = np.log1p(y / y.sum(1, keepdims=True) * np.median(y.sum(1)))
    p = np.nan_to_num(ttest_ind(log[first], log[~first]).pvalue, nan=1.0)
    return p, adjusted(p, y.sum(0) >= 10)


def deseq2(y: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from pydeseq2.dds import DeseqDataSet
    from pydeseq2.default_inference import DefaultInference
    from pydeseq2.ds import DeseqStats

    one = DefaultInference(n_cpus=1)
    there = y.sum(0) > 0
    index = [str(i) for i in range(len(y))]
    table = pd.DataFrame({"arm": np.where(first, "a", "b")}, index=index)
    counts = pd.DataFrame(y[:, there].astype(int), index=index)
    data = DeseqDataSet(counts=counts, metadata=table, design="~arm", quiet=True, inference=one)
    data.deseq2()
    stats = DeseqStats(data, contrast=["arm", "a", "b"], quiet=True, inference=one)
    stats.run_wald_test()
    stats._independent_filtering()
    p, q = np.ones(y.shape[1]), np.ones(y.shape[1])
    p[there], q[there] = stats.p_values.fillna(1), stats.padj.fillna(1)
    return p, q


def wilcoxon(adata: ad.AnnData, column: str, a: str, b: str) -> tuple[np.ndarray, np.ndarray]:
    import scanpy as sc

    log = adata[adata.obs[column].isin([a, b])].copy() if b != "rest" else adata.copy()
    sc.pp.normalize_total(log, target_sum=1e4)
    sc.pp.log1p(log)
    sc.tl.rank_genes_groups(log, column, groups=[a], reference=b, method="wilcoxon")
    table = sc.get.rank_genes_groups_df(log, a).set_index("names").loc[adata.var_names]
    return -np.abs(table["scores"].to_numpy()), table["pvals_adj"].fillna(1).to_numpy()


def decoded(adata: ad.AnnData, column: str, a: str, b: str, donor: str) -> tuple[Any, Any]:
    """A t-test of donors' means of what the decoder makes of their cells: smoothed twice over."""
    layer = adata.obsm["_decoded"]
    means, first = [], []
    for side in (a, b):
        of = (adata.obs[column] == side).to_numpy()
        for name in np.unique(adata.obs[donor][of].astype(str)):
            cells = of & (adata.obs[donor].astype(str) == name).to_numpy()
            means.append(np.log(layer[cells].mean(0)))
            first.append(side == a)
    log, of_first = np.array(means), np.array(first)
    p = np.nan_to_num(ttest_ind(log[of_first], log[~of_first]).pvalue, nan=1.0)
    return p, adjusted(p, np.ones(len(p), bool))


# --- simulated ------------------------------------------------------------------------------------


def power_at(order_by: np.ndarray, changed: np.ndarray, rate: float) -> float:
    """The share of changed genes in the longest list with no more false ones."""
    order = np.argsort(order_by, kind="stable")
    true = changed[order]
    false = np.cumsum(~true) / np.arange(1, len(true) + 1)
    good = np.flatnonzero(false <= rate)
    return float(true[: good[-1] + 1].sum() / changed.sum()) if len(good) else 0.0


def judged(order_by: np.ndarray, rate: np.ndarray, changed: np.ndarray) -> dict[str, float]:
    out = {}
    for level in LEVELS:
        called = rate <= level
        out[f"false_{level}"] = float((called & ~changed).sum() / max(1, called.sum()))
        out[f"found_{level}"] = float((called & changed).sum() / changed.sum())
    return {**out, **{f"power_{r}": power_at(order_by, changed, r) for r in (0.05, 0.1)}}


def simulated(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for data in args.data:
        full = ad.read_h5ad(data)
        for shared in args.shared:
            study = Study(donors=args.donors, shared=shared)
            profiles = profiles_of(full, len(study.cells), args.genes)
            for seed in args.seeds:
                adata = fitted(
                    args,
                    f"{name_of(data)}_{args.donors}_{shared}_{seed}",
                    lambda s=seed, t=study, p=profiles: simulate(p, t, s),
                )
                for kind, cells in enumerate(study.cells):
                    changed = adata.varm["change"][:, kind] != 0
                    a, b = f"type{kind} b", f"type{kind} a"
                    y, first = pseudobulk(adata, "group", a, b, "donor")
                    found = ours(adata, "group", a, b, "donor")
                    found["t-test, pseudobulk"] = t_test(y, first)
                    if args.deseq2:
                        found["DESeq2, pseudobulk"] = deseq2(y, first)
                    if args.others:
                        found["Wilcoxon, cells"] = wilcoxon(adata, "group", a, b)
                        found["t-test, decoded"] = decoded(adata, "group", a, b, "donor")
                    for method, (order_by, rate) in found.items():
                        row = {"data": name_of(data), "shared": shared, "donors": args.donors}
                        row |= {"cells": cells, "seed": seed, "method": method}
                        rows.append(row | judged(order_by, rate, changed))
            show(rows, args)
    return rows


def fitted(args: argparse.Namespace, name: str, make: Any) -> ad.AnnData:
    path = Path(args.cache) / f"{name}.h5ad" if args.cache else None
    if path is not None and path.exists():
        adata = ad.read_h5ad(path)
    else:
        adata = make()
        scuvae.tl.fit(adata)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            adata.write_h5ad(path)
    if getattr(args, "others", False):
        genes = list(adata.var_names)
        adata.obsm["_decoded"] = scuvae.tl.denoise(adata, genes=genes, library_size=1.0).to_numpy()
    return adata


def show(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Means over seeds: rates are of few genes each."""
    table = pd.DataFrame(rows)
    keys = ["data", "shared", "donors", "cells", "method"]
    means = table.groupby(keys, sort=False).mean(numeric_only=True).reset_index()
    columns = {"shared": ("shared", ".1f"), "cells": ("cells", "d"), "method": ("method", "")}
    for level in LEVELS:
        columns[f"false_{level}"] = (f"false at {level:.0%}", ".3f")
    columns |= {"found_0.05": ("found at 5%", ".3f")}
    columns |= {f"power_{r}": (f"power, {r:.0%} false", ".3f") for r in (0.05, 0.1)}
    print_table(means.to_dict("records"), columns)


# --- permuted donors ------------------------------------------------------------------------------


def permuted(args: argparse.Namespace) -> list[dict[str, Any]]:
    (data,) = args.data
    adata = fitted(args, f"{name_of(data)}_{args.genes}", lambda: load(data, args.genes))
    donors = sorted(adata.obs["batch"].astype(str).unique())
    arms = [set(c) for c in combinations(donors, len(donors) // 2) if donors[0] in c]
    rng = np.random.default_rng(0)
    while len(arms) < args.permutations:
        arms.append(set(rng.choice(donors, 3, replace=False)))
    rows = []
    for kind in args.types:
        for i, arm in enumerate(arms[: args.permutations]):
            side = np.where(adata.obs["batch"].astype(str).isin(arm), "a", "b")
            adata.obs["group"] = pd.Categorical(adata.obs["cell_type"].astype(str) + " " + side)
            a, b = f"{kind} a", f"{kind} b"
            y, first = pseudobulk(adata, "group", a, b, "batch")
            found = ours(adata, "group", a, b, "batch")
            found["t-test, pseudobulk"] = t_test(y, first)
            if args.deseq2:
                found["DESeq2, pseudobulk"] = deseq2(y, first)
            if args.others and i < 5:
                found["Wilcoxon, cells"] = wilcoxon(adata, "group", a, b)
                found["t-test, decoded"] = decoded(adata, "group", a, b, "batch")
            for method, (_, rate) in found.items():
                called = int((rate <= 0.05).sum())
                rows.append({"type": kind, "arm": i, "method": method, "called": called})
        table = pd.DataFrame(rows)
        table["any"] = (table["called"] > 0).astype(float)
        means = table.groupby(["type", "method"], sort=False)[["any", "called"]].mean()
        columns = {"type": ("type", ""), "method": ("method", ""), "any": ("any", ".2f")}
        print_table(means.reset_index().to_dict("records"), columns | {"called": ("called", ".2f")})
    return rows


# --- markers, and two seeds -----------------------------------------------------------------------


def auroc(score: np.ndarray, marker: np.ndarray) -> float:
    n = marker.sum()
    return float((rankdata(score)[marker].sum() - n * (n + 1) / 2) / (n * (~marker).sum()))


def signed(result: Any, group: str, genes: pd.Index) -> np.ndarray:
    series = pd.Series(result["scores"][group], index=result["names"][group])
    return series.loc[genes].to_numpy(float)


def markers(args: argparse.Namespace) -> list[dict[str, Any]]:
    import scanpy as sc

    rows = []
    for data in args.data:
        adata = fitted(args, f"{name_of(data)}_{args.genes}", lambda d=data: load(d, args.genes))
        genes = adata.var_names
        log = adata.copy()
        sc.pp.normalize_total(log, target_sum=1e4)
        sc.pp.log1p(log)
        sc.tl.rank_genes_groups(log, "cell_type", method="wilcoxon")
        donor = "batch" if args.by_donor and "batch" in adata.obs else None
        scuvae.tl.rank_genes(adata, "cell_type", donor_key=donor)
        for kind, listed in MARKERS.items():
            marker = genes.isin(listed.split())
            for group in set(TYPES[kind]) & set(adata.obs["cell_type"].unique()):
                row = {"data": name_of(data), "type": group, "markers": int(marker.sum())}
                row["ours"] = auroc(signed(adata.uns["rank_genes_groups"], group, genes), marker)
                row["wilcoxon"] = auroc(signed(log.uns["rank_genes_groups"], group, genes), marker)
                rows.append(row)
        mine = [row for row in rows if row["data"] == name_of(data) and row["markers"]]
        mean = {n: float(np.mean([row[n] for row in mine])) for n in ("ours", "wilcoxon")}
        columns = {"type": ("type", ""), "markers": ("markers", "d")}
        columns |= {"ours": ("ours", ".4f"), "wilcoxon": ("Wilcoxon", ".4f")}
        print_table([*mine, {"type": f"{name_of(data)}, mean", "markers": 0, **mean}], columns)
    return rows


def our_tops(adata: ad.AnnData, seed: int) -> dict[str, dict[str, list[str]]]:
    """The first 100 of each type by ``scores``, and by the probability that the sign is right."""
    scuvae.tl.fit(adata, rng=seed)
    scuvae.tl.rank_genes(adata, "cell_type")
    result = adata.uns["rank_genes_groups"]
    out: dict[str, dict[str, list[str]]] = {"tl.rank_genes, scores": {}, "tl.rank_genes, lfsr": {}}
    for group in result["names"].dtype.names:
        table = pd.DataFrame({name: result[name][group] for name in result if name != "params"})
        up = table[table["logfoldchanges"] > 0].sort_values(["lfsr", "pvals"], kind="stable")
        out["tl.rank_genes, scores"][group] = list(table["names"][:100])
        out["tl.rank_genes, lfsr"][group] = list(up["names"][:100])
    return out


def scvi_tops(adata: ad.AnnData, seed: int) -> dict[str, dict[str, list[str]]]:
    """The same of SCVI's own test, each type against the rest: in its order, by ``proba_de``."""
    import _scvi
    import scvi

    scvi.settings.seed = seed
    scvi.model.SCVI.setup_anndata(adata)
    model = scvi.model.SCVI(adata, **_scvi.MODEL)
    epochs = _scvi.default_epochs(adata.n_obs)
    model.train(epochs, accelerator="cpu", train_size=1.0, enable_progress_bar=False)
    table = model.differential_expression(groupby="cell_type", silent=True)
    up = table[table["lfc_mean"] > 0]
    tops = {group: list(part.index[:100]) for group, part in up.groupby("group1")}
    return {"SCVI": tops}


def seeds(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for data in args.data:
        for tops in (our_tops, scvi_tops) if args.others else (our_tops,):
            first, second = (tops(load(data, args.genes), seed) for seed in (0, 1))
            for method, of in first.items():
                common = [len(set(of[g]) & set(second[method][g])) / len(of[g]) for g in of]
                row = {"data": name_of(data), "method": method}
                rows.append(row | {"lowest": min(common), "mean": float(np.mean(common))})
    form = {"data": ("data", ""), "method": ("method", "")}
    form |= {"mean": ("top 100 in common", ".3f"), "lowest": ("lowest", ".3f")}
    print_table(rows, form)
    return rows


def main() -> None:
    logging.disable(logging.INFO)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["simulated", "permuted", "markers", "seeds"])
    parser.add_argument("data", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--shared", type=float, nargs="+", default=[0.6])
    parser.add_argument("--donors", type=int, default=4)
    parser.add_argument("--genes", type=int, default=1500)
    parser.add_argument("--types", nargs="+", default=["B cells", "Dendritic cells"])
    parser.add_argument("--permutations", type=int, default=50)
    parser.add_argument("--deseq2", action="store_true")
    parser.add_argument("--others", action="store_true", help="Wilcoxon, means decoded, SCVI")
    parser.add_argument("--by-donor", action="store_true")
    parser.add_argument("--cache")
    parser.add_argument("--json")
    args = parser.parse_args()
    write_json(
        args.json,
        {"simulated": simulated, "permuted": permuted, "markers": markers, "seeds": seeds}[
            args.what
        ](args),
    )


if __name__ == "__main__":
    main()
