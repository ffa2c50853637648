"""What ``scuvae demo`` runs: two fits of the same model to the same real counts, and pictures."""

import warnings
from pathlib import Path
from time import perf_counter

import matplotlib
import numpy as np
import pandas as pd
import scanpy as sc
import torch
from anndata import AnnData
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from scuvae import datasets, get, pl, tl
from scuvae._replacing import replacing

FITS = {"amortized": True, "unamortized": False}
LABELS = "cell_type"


def run(
    folder: Path, *, max_epochs: int | None = None, progress: bool | None = None
) -> tuple[AnnData, str]:
    """Write the pictures into ``folder``; return the fitted cells and a report to print."""
    matplotlib.use("Agg")  # to files only: no window, no display needed
    # Batches this small gain nothing from threads, which on a busy machine wait for each other;
    # and the same figures come out whatever the number of cores.
    torch.set_num_threads(1)
    adata = datasets.pbmc68k_counts()
    rows = {}
    for key, amortized in FITS.items():
        start = perf_counter()
        tl.fit(
            adata,
            amortized=amortized,
            max_epochs=max_epochs,
            rng=0,
            key_added=key,
            progress=progress,
        )
        rows[key] = {"seconds": perf_counter() - start, "epochs": len(get.history(adata, key=key))}
    tl.amortization_gap(adata, key="amortized")
    for key in FITS:
        tl.score(adata, key=key)
        tl.denoise(adata, key=key)
        _graph(adata, key, f"{key}_embed")
        rows[key] |= _quality(adata, key)
    start = perf_counter()
    logged = adata.copy()
    sc.pp.normalize_total(logged)
    sc.pp.log1p(logged)
    sc.pp.pca(logged, random_state=0)
    adata.obsm["X_pca"] = logged.obsm["X_pca"]
    rows["PCA"] = {"seconds": perf_counter() - start}
    _graph(adata, "PCA", "X_pca")
    for key in rows:
        rows[key]["own type"] = _own_type(adata, f"{key}_neighbors_distances")
    pictures = [_loss(adata, folder), _observed_vs_predicted(adata, folder), _umap(adata, folder)]
    return adata, _report(adata, pd.DataFrame.from_dict(rows, orient="index"), folder, pictures)


def _graph(adata: AnnData, key: str, coordinates: str) -> None:
    """Neighbours in some coordinates and a UMAP, under names of their own."""
    neighbors = f"{key}_neighbors"
    sc.pp.neighbors(adata, use_rep=coordinates, key_added=neighbors, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # umap: a seed means one thread
        sc.tl.umap(adata, neighbors_key=neighbors, random_state=0)
    adata.obsm[f"X_{key}_umap"] = adata.obsm.pop("X_umap")
    adata.uns[f"{key}_umap"] = adata.uns.pop("umap")


def _quality(adata: AnnData, key: str) -> dict[str, float]:
    held_out = (adata.obs[f"{key}_split"] == "validation").to_numpy()
    elbo = adata.obs[f"{key}_elbo"].to_numpy()
    gap = adata.obs.get(f"{key}_amortization_gap")
    refined = elbo if gap is None else elbo + gap  # a cell's own q is refined as it is
    return {
        "held-out ELBO": float(elbo[held_out].mean()),
        "refined": float(refined[held_out].mean()),
        "amortization gap": float("nan") if gap is None else float(gap.mean()),
    }


def _own_type(adata: AnnData, distances: str) -> float:
    """Mean share of a cell's nearest neighbours that are of its own type."""
    labels = adata.obs[LABELS].cat.codes.to_numpy()
    near = adata.obsp[distances] > 0
    same = near.multiply(labels[:, None] == labels[None]).sum(1)
    return float(np.mean(np.asarray(same).ravel() / np.asarray(near.sum(1)).ravel()))


def _loss(adata: AnnData, folder: Path) -> Path:
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    pl.loss(adata, keys=list(FITS), ax=ax, show=False)
    return _save(figure, folder / "loss.png")


def _observed_vs_predicted(adata: AnnData, folder: Path) -> Path:
    figure, axes = plt.subplots(1, len(FITS), figsize=(9, 4), sharey=True, layout="constrained")
    pl.observed_vs_predicted(adata, keys=list(FITS), ax=axes, show=False)
    return _save(figure, folder / "observed_vs_predicted.png")


def _umap(adata: AnnData, folder: Path) -> Path:
    shown = ["PCA", *FITS]
    figure, axes = plt.subplots(1, len(shown), figsize=(15, 4.5), layout="constrained")
    for key, ax in zip(shown, axes, strict=True):
        last = key == shown[-1]
        share = _own_type(adata, f"{key}_neighbors_distances")
        sc.pl.embedding(
            adata,
            basis=f"{key}_umap",
            color=LABELS,
            title=f"{key} ({share:.0%} own type)",
            legend_loc="right margin" if last else "none",
            ax=ax,
            show=False,
        )
        ax.set(xlabel="UMAP 1", ylabel="UMAP 2")
    return _save(figure, folder / "umap.png")


def _save(figure: Figure, path: Path) -> Path:
    with replacing(path) as new:
        figure.savefig(new, dpi=150, bbox_inches="tight")
    plt.close(figure)
    return path


def _report(adata: AnnData, table: pd.DataFrame, folder: Path, pictures: list[Path]) -> str:
    text = table.to_string(
        formatters={
            "seconds": "{:.1f}".format,
            "epochs": "{:.0f}".format,
            "held-out ELBO": "{:.2f}".format,
            "refined": "{:.2f}".format,
            "own type": "{:.3f}".format,
            "amortization gap": "{:.2f}".format,
        },
        na_rep="-",
    )
    files = "\n".join(f"  {path}" for path in [folder / "demo.h5ad", *pictures])
    return (
        f"{adata.n_obs} cells x {adata.n_vars} genes; ELBO and gap in nats per cell\n\n{text}\n\n"
        "held-out ELBO: with the fit's own q. refined: with q optimised, the decoder frozen.\n"
        "own type: share of a cell's nearest neighbours that are of its type, in the map of each\n"
        "fit and in a PCA. amortization gap: ELBO that the encoder costs, over all cells.\n\n"
        f"{files}"
    )
