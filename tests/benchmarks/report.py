"""The pictures of docs/report.md, on the 700 cells that ship with scanpy, and their numbers.

    python tests/benchmarks/report.py --cache DIR

writes ``gap.png``, ``genes.png``, ``counts.png``, ``calibration.png`` and ``seeds.png`` to
``docs/figures/`` and all that they show to ``report.json`` beside them. ``--draw`` draws anew from
that file; ``--only gap seeds`` measures some. SCVI and labels are those of ``bridge.py``,
``missing_genes.py``, ``depth.py``, ``calibration.py`` and ``seeds.py``, whose code is called. One
thread, some minutes; scvi-tools and scikit-learn have to be there.
"""

import argparse
import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import _scvi
import _views as views
import anndata as ad
import depth
import missing_genes
import numpy as np
import torch
from _common import cells_of, elbos, encoded, evidence, load, refined, split, write_json

import scuvae
from scuvae.batches import Cells
from scuvae.distributions.gaussian import Gaussian, concatenate
from scuvae.inference.refinement.refine import THOROUGH
from scuvae.inference.refinement.stein import refine_diagonal
from scuvae.model import VAE

DATA, FOLDER = "pbmc68k", Path(__file__).resolve().parents[2] / "docs" / "figures"
SEEDS = (0, 1, 2)
EPOCHS = (5, 10, 25, 50, 100, 150, 200, 300, 400)  # of SCVI; 400 is its default here
FRACTIONS = (0.0, 0.25, 0.5, 0.75, 0.9)
LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
DEPTHS = (20, 50, 100, 200, 400)
# Blue for q of a cell's own, orange for encoders, gray for what is no VAE.
OWN, OWN_TOO, ENCODER, ENCODER_TOO, OTHER = "#0072b2", "#56b4e9", "#d55e00", "#e69f00", "#5b5b5b"


# --- measured ------------------------------------------------------------------------------------


@torch.no_grad()
def best_diagonal(model: VAE, cells: Cells, q: Gaussian) -> Gaussian:
    """The best q of the encoder's own family, from the encoder's."""
    parts = []
    for batch in cells.loader(torch.arange(len(cells)), 512):
        start = q[batch.index].as_family("diagonal")
        parts.append(refine_diagonal(model, batch, start))
    return concatenate(parts)


def parts_of_the_gap(model: VAE, cells: Cells) -> dict[str, np.ndarray]:
    """What each step from the encoder's q towards log p(x) brings a cell, in nats."""
    first = encoded(model, cells)
    assert first is not None
    own = best_diagonal(model, cells, first)
    full = refined(model, cells, first, own, **THOROUGH)
    scores = [elbos(model, cells, q) for q in (first, own, full)]
    scores.append(evidence(model, cells, full))
    steps = np.diff(np.stack(scores), axis=0)
    return dict(zip(("amortization", "family", "gaussian"), steps, strict=True))


def gap(adata: ad.AnnData, args: argparse.Namespace) -> dict[str, Any]:
    """SCVI's amortization gap as it trains, and the parts of its inference gap in the end."""
    curves: list[dict[str, Any]] = []
    last: dict[str, Any] = {}
    for seed in SEEDS:
        train, held_out = split(adata, seed)
        run = _scvi.trace(train, seed, EPOCHS[-1], name=DATA, cache=args.cache)
        some = next(iter(cells_of(held_out).loader(torch.arange(64), 64)))
        _scvi.check(run.state(EPOCHS[-1]), some)
        for epoch in EPOCHS:
            model = run.model(epoch)
            for name, some in (("training", train), ("held out", held_out)):
                cells = cells_of(some)
                first = encoded(model, cells)
                own = best_diagonal(model, cells, first)
                lost = float((elbos(model, cells, own) - elbos(model, cells, first)).mean())
                curves.append({"seed": seed, "epoch": epoch, "cells": name, "gap": lost})
        if seed == SEEDS[0]:
            found = parts_of_the_gap(run.model(EPOCHS[-1]), cells_of(held_out))
            last = {name: values.round(3).tolist() for name, values in found.items()}
            last["cell_type"] = held_out.obs["cell_type"].astype(str).tolist()
        print("gap, seed", seed, flush=True)
    return {"curves": curves, "last": last}


def genes(adata: ad.AnnData, args: argparse.Namespace) -> dict[str, Any]:
    """Labels of held-out cells that lack some of the genes."""
    options = argparse.Namespace(label="cell_type", scvi_epochs=400, cache=args.cache)
    found: dict[str, list[list[float]]] = {}
    for seed in SEEDS:
        bench = missing_genes.Bench(adata, DATA, seed, options)
        made = {**missing_genes.METHODS["scvi"], **missing_genes.METHODS["project"]}
        for name in ("SCVI, zeros", "SCVI, refined", "tl.project", "tl.transfer_labels"):
            method = made[name](bench)
            row = [method(bench.observed(fraction)) for fraction in FRACTIONS]
            found.setdefault(name, []).append(row)
            print(name, seed, np.round(row, 3), flush=True)
    return {"fractions": list(FRACTIONS), "accuracy": found}


def counts(adata: ad.AnnData, args: argparse.Namespace) -> dict[str, Any]:
    """Labels of held-out cells that keep few of their counts."""
    options = argparse.Namespace(
        label="cell_type", scvi_epochs=400, cache=args.cache, components=[10, 20, 50]
    )
    found: dict[str, list[list[float]]] = {}
    for seed in SEEDS:
        bench = depth.Bench(adata, DATA, seed, options)
        rows = [*depth.by_fit(bench), *depth.by_scvi(bench), *depth.by_pca(bench)]
        for row in rows:
            values = [row[f"at_{d}"] for d in (*DEPTHS, None)]
            found.setdefault(row["method"], []).append(values)
    return {"depths": list(DEPTHS), "accuracy": found}


def calibration(adata: ad.AnnData, args: argparse.Namespace) -> dict[str, Any]:
    """Coverage of a fit's posteriors on cells simulated from it: the encoder's, and cells' own."""
    found: dict[str, Any] = {"levels": list(LEVELS), "coverage": {}}
    for seed in SEEDS:
        fitted = adata.copy()
        scuvae.tl.fit(fitted, amortized=True, likelihood="nb", rng=seed, device="cpu")
        for polish in (True, "moments"):
            scuvae.tl.calibration(
                fitted, n_cells=1000, levels=LEVELS, polish=polish, rng=seed, device="cpu"
            )
            table = fitted.uns["scuvae_calibration"]["coverage"]
            names = {"full": f"own q, polish={polish!r}"}
            if polish is True:
                names |= {"encoder": "encoder's q", "diagonal": "own q, diagonal"}
            for column, name in names.items():
                found["coverage"].setdefault(name, []).append(table[column].round(4).tolist())
        print("calibration, seed", seed, flush=True)
    return found


def seeds(adata: ad.AnnData, args: argparse.Namespace) -> dict[str, Any]:
    """How many of a cell's 15 neighbours another seed keeps, each cell's mean over pairs."""

    def shared(maps: list[np.ndarray]) -> list[float]:
        near = [views.neighbours(points, 15) for points in maps]
        pairs = [
            [views.jaccard(a[i : i + 1], b[i : i + 1]) for i in range(len(a))]
            for a, b in combinations(near, 2)
        ]
        return np.mean(pairs, axis=0).round(3).tolist()

    def ours(amortized: bool) -> list[np.ndarray]:
        maps = []
        for seed in SEEDS:
            fitted = adata.copy()
            scuvae.tl.fit(fitted, amortized=amortized, likelihood="nb", rng=seed, device="cpu")
            maps.append(np.asarray(fitted.obsm["X_scuvae_embed"]))
        return maps

    def scvi(seed: int) -> np.ndarray:
        run = _scvi.trace(adata, seed, 400, name=f"{DATA}_all", cache=args.cache)
        q = encoded(run.model(400), cells_of(adata))
        assert q is not None
        return q.mean.numpy()

    return {
        "unamortized, map": shared(ours(False)),
        "amortized, map": shared(ours(True)),
        "SCVI, latent means": shared([scvi(seed) for seed in SEEDS]),
    }


PARTS: dict[str, Callable[[ad.AnnData, argparse.Namespace], dict[str, Any]]] = {
    f.__name__: f for f in (gap, genes, counts, calibration, seeds)
}


# --- drawn ---------------------------------------------------------------------------------------


def _line(ax: Any, x: Any, rows: Any, colour: str, label: str, style: str = "-") -> None:
    """The median over seeds, and lowest to highest."""
    y = np.asarray(rows)
    ax.plot(x, np.median(y, 0), style, color=colour, label=label, marker="o", markersize=3.5)
    ax.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.15, linewidth=0)


def draw_gap(found: dict[str, Any], plt: Any) -> None:
    fig, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.5), layout="constrained")
    for name, colour in (("held out", ENCODER), ("training", ENCODER_TOO)):
        mine = [row for row in found["curves"] if row["cells"] == name]
        rows = [[r["gap"] for r in mine if r["seed"] == seed] for seed in SEEDS]
        _line(left, EPOCHS, rows, colour, f"{name.replace(' ', '-')} cells")
    left.set(xlabel="epochs of SCVI", ylabel="amortization gap, nats per cell", ylim=(0, None))
    left.legend(frameon=False)
    last = found["last"]
    kinds = np.asarray(last["cell_type"])
    lost = np.asarray(last["amortization"])
    names = sorted(set(kinds), key=lambda k: float(np.median(lost[kinds == k])))
    for at, kind in enumerate(names):
        y = lost[kinds == kind]
        jitter = np.linspace(-0.25, 0.25, len(y)) if len(y) > 1 else np.zeros(1)
        right.scatter(y, at + jitter, s=8, color=ENCODER, alpha=0.7, linewidths=0)
        right.plot([np.median(y)] * 2, [at - 0.35, at + 0.35], color="black", linewidth=1.2)
    right.set_yticks(range(len(names)), [f"{k} ({(kinds == k).sum()})" for k in names], size=8)
    right.set(xlabel="gap of each held-out cell, nats", xlim=(0, None))
    fig.savefig(FOLDER / "gap.png")


def draw_genes(found: dict[str, Any], plt: Any) -> None:
    fig, ax = plt.subplots(figsize=(5.4, 3.5), layout="constrained")
    shown = {
        "tl.transfer_labels": (OWN, "votes by explained counts (tl.transfer_labels)", "-"),
        "tl.project": (OWN_TOO, "own q by the genes there (tl.project)", "-"),
        "SCVI, refined": (ENCODER_TOO, "SCVI's decoder, own q", "-"),
        "SCVI, zeros": (ENCODER, "SCVI's encoder, zeros filled in", "--"),
    }
    for name, (colour, label, style) in shown.items():
        x = 100 * np.asarray(found["fractions"])
        _line(ax, x, found["accuracy"][name], colour, label, style)
    ax.set(xlabel="genes missing, %", ylabel="held-out cells labelled right", ylim=(0, 1))
    ax.legend(frameon=False, loc="lower left", fontsize=8)
    fig.savefig(FOLDER / "genes.png")


def draw_counts(found: dict[str, Any], plt: Any) -> None:
    fig, ax = plt.subplots(figsize=(5.4, 3.5), layout="constrained")
    pca = [np.asarray(rows) for name, rows in found["accuracy"].items() if name.startswith("PCA")]
    shown = {
        "votes (tl.transfer_labels)": (OWN, "votes by explained counts", "-"),
        "unamortized, map": (OWN_TOO, "own q, the map", "-"),
        "SCVI, 400 epochs, means": (ENCODER, "SCVI's encoder", "--"),
    }
    depths = found["depths"]
    for name, (colour, label, style) in shown.items():
        rows = np.asarray(found["accuracy"][name])[:, :-1]
        _line(ax, depths, rows, colour, label, style)
    best = np.max([rows[:, :-1] for rows in pca], axis=0)
    _line(ax, depths, best, OTHER, "best of PCA 10, 20, 50 at each", ":")
    ax.set_xscale("log")
    ax.set_xticks(depths, [str(d) for d in depths])
    ax.minorticks_off()
    ax.set(xlabel="counts that a held-out cell keeps, on average", ylim=(0, 1))
    ax.set_ylabel("held-out cells labelled right")
    ax.legend(frameon=False, loc="lower right", fontsize=8)
    fig.savefig(FOLDER / "counts.png")


def draw_calibration(found: dict[str, Any], plt: Any) -> None:
    fig, ax = plt.subplots(figsize=(4.6, 3.9), layout="constrained")
    ax.plot([0, 1], [0, 1], color="0.75", linewidth=1)
    shown = {
        "own q, polish='moments'": (OWN, "own q, moments", "-"),
        "own q, polish=True": (OWN_TOO, "own q, full covariance", "-"),
        "own q, diagonal": (OTHER, "own q, diagonal", ":"),
        "encoder's q": (ENCODER, "encoder's q", "--"),
    }
    for name, (colour, label, style) in shown.items():
        _line(ax, found["levels"], found["coverage"][name], colour, label, style)
    ax.set(xlabel="level of the interval", ylabel="intervals that hold the truth")
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    ax.legend(frameon=False, loc="upper left", fontsize=8)
    fig.savefig(FOLDER / "calibration.png")


def draw_seeds(found: dict[str, Any], plt: Any) -> None:
    fig, ax = plt.subplots(figsize=(7.2, 3.1), layout="constrained")
    colours = dict(zip(found, (OWN, OWN_TOO, ENCODER), strict=True))
    for name, values in found.items():
        y = np.sort(values)
        label = f"{name}: mean {np.mean(y):.2f}"
        ax.plot(y, np.arange(1, len(y) + 1) / len(y), color=colours[name], label=label)
    ax.set(xlabel="neighbours kept by another seed (Jaccard of 15)", ylabel="share of cells below")
    ax.set(xlim=(0, 1), ylim=(0, 1))
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    fig.savefig(FOLDER / "seeds.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--draw", action="store_true", help="from report.json, nothing measured")
    parser.add_argument("--cache", help="folder for SCVI's weights and our fits")
    args = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    kept = FOLDER / "report.json"
    found = json.loads(kept.read_text()) if kept.exists() else {}
    if not args.draw:
        adata = load(DATA)
        for name in args.only:
            found[name] = PARTS[name](adata, args)
            write_json(str(kept), found)

    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"savefig.dpi": 130, "axes.spines.top": False, "axes.spines.right": False}
    draws = (draw_gap, draw_genes, draw_counts, draw_calibration, draw_seeds)
    for draw in draws:
        if (name := draw.__name__[5:]) in found:
            draw(found[name], plt)


if __name__ == "__main__":
    main()
