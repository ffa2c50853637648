"""Held-out ELBO, CPU seconds and embeddings: SCVI of scvi-tools beside scuvae.

    python tests/benchmarks/quality.py DATA.h5ad ... --seeds 0 1 2 --cache DIR --json out.json

Each model is fitted to the same training cells on one thread. Held-out ELBOs of all models come
from one piece of code (``_common.held_out_scores``): SCVI's weights are read as one of our models,
which is checked against scvi-tools' own module first.
"""

import argparse
import copy
import json
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import _scvi
import anndata as ad
import numpy as np
from _common import (
    Clock,
    cells_of,
    clustering,
    curve,
    encoded,
    held_out_scores,
    load,
    medians,
    name_of,
    neighbour_accuracy,
    print_table,
    refined,
    seconds_until,
    split,
    write_json,
)

import scuvae
from scuvae.inference.training.loop import train as training_loop
from scuvae.model import VAE

KINDS: dict[str, bool | str] = {"unamortized": False, "semi": "semi", "amortized": True}
COLUMNS = {
    "model": ("model", ""),
    "cpu_s": ("CPU s", ".1f"),
    "elbo_encoder": ("ELBO, encoder", ".2f"),
    "elbo_refined": ("ELBO, refined", ".2f"),
    "evidence": ("IW bound", ".2f"),
    "until_s": ("CPU s to target", ".1f"),
    "until_ratio": ("/ SCVI's", ".3f"),
    "accuracy": ("15-NN accuracy", ".3f"),
    "accuracy_refined": ("refined", ".3f"),
    "ari": ("ARI", ".3f"),
    "nmi": ("NMI", ".3f"),
    "clusters": ("clusters", ".0f"),
}


class Bench:
    """One data set and seed: training and held-out cells, and what is asked of an embedding."""

    def __init__(self, adata: ad.AnnData, seed: int, args: argparse.Namespace) -> None:
        self.seed, self.args = seed, args
        self.train, self.held_out = split(adata, seed)
        self.train_cells, self.held_out_cells = cells_of(self.train), cells_of(self.held_out)
        self.has_labels = args.label in adata.obs
        if self.has_labels:
            self.labels = self.train.obs[args.label].astype(str).to_numpy()
            self.truth = self.held_out.obs[args.label].astype(str).to_numpy()

    def embedding(self, train: np.ndarray, held_out: np.ndarray) -> dict[str, float]:
        """Labels of held-out cells by their neighbours, clusters of all cells against labels."""
        if not self.has_labels or self.args.no_embeddings:
            return {}
        found = clustering(
            np.concatenate([train, held_out]),
            np.concatenate([self.labels, self.truth]),
            self.args.resolution,
        )
        return {"accuracy": self.accuracy(train, held_out), **found}

    def accuracy(self, train: np.ndarray, held_out: np.ndarray) -> float:
        return neighbour_accuracy(train, self.labels, held_out, self.truth)


# --- SCVI ----------------------------------------------------------------------------------------


def scvi_rows(bench: Bench, name: str) -> tuple[list[dict[str, Any]], dict[str, Any], float, float]:
    """Rows of SCVI, its curves, and the target: its encoder's ELBO and CPU seconds."""
    args = bench.args
    epochs = args.scvi_epochs
    trace = _scvi.trace(bench.train, bench.seed, max(epochs), name=name, cache=args.cache)
    some = bench.held_out_cells.batch(_first(len(bench.held_out_cells), 64))
    worst = _scvi.check(trace.state(epochs[0]), some)
    print("SCVI as a VAE of ours, largest differences:", _short(worst), flush=True)
    speed = 1.0
    if args.calibrate:
        now = _scvi.seconds_per_epoch(bench.train, args.calibrate)
        speed = now / (trace.cpu_s[-1] / len(trace.cpu_s))
        print(f"an epoch of SCVI takes {now:.3f} CPU s now, {speed:.2f} x those cached", flush=True)

    rows = []
    shown = {*epochs, _scvi.default_epochs(bench.train.n_obs)} & set(trace.epochs)
    for epoch in sorted(shown):
        model = trace.model(epoch)
        scores, best = held_out_scores(model, bench.held_out_cells)
        mine, theirs = encoded(model, bench.train_cells), encoded(model, bench.held_out_cells)
        row = {
            "model": f"SCVI, {epoch} epochs",
            "cpu_s": trace.seconds(epoch) * speed,
            **scores,
            **bench.embedding(mine.mean.numpy(), theirs.mean.numpy()),
        }
        if bench.has_labels and not args.no_embeddings:
            better = refined(model, bench.train_cells, mine)
            row["accuracy_refined"] = bench.accuracy(better.mean.numpy(), best.mean.numpy())
        rows.append(row)
        print(_short(row), flush=True)
    target_row = next(r for r in rows if r["model"] == f"SCVI, {epochs[0]} epochs")
    target, seconds = target_row["elbo_encoder"], target_row["cpu_s"]

    def points(every: int) -> list[tuple[int, float, Callable[[], VAE]]]:
        chosen = [e for e in trace.epochs if e % every == 0 or e == max(epochs)]
        return [(e, trace.seconds(e) * speed, lambda e=e: trace.model(e)) for e in chosen]

    curves = {}
    if not args.no_curves:
        cells = bench.held_out_cells
        curves["SCVI, encoder"] = curve(points(5), cells, refine_q=False)
        curves["SCVI, refined"] = curve(points(20), cells, refine_q=True)
    return rows, curves, target, seconds


# --- scuvae --------------------------------------------------------------------------------------


def fit_traced(
    train: ad.AnnData, seed: int, **arguments: Any
) -> tuple[ad.AnnData, float, list[tuple[int, float, Callable[[], VAE]]]]:
    """``tl.fit``, its CPU seconds, and the model after every epoch.

    The training loop that ``tl.fit`` calls is wrapped, to look at the model at the end of each
    epoch; the clock stands still meanwhile. It covers all else: PCA start, validation, final q.
    """
    points: list[tuple[int, float, Callable[[], VAE]]] = []

    def traced(model: VAE, *args: Any, **kwargs: Any) -> Any:
        theirs = kwargs.pop("on_epoch", lambda row: None)

        def on_epoch(row: dict[str, float]) -> None:
            theirs(row)
            seconds = clock.seconds()
            with clock.paused():
                state = copy.deepcopy(model.state_dict())
                points.append((len(points) + 1, seconds, lambda: _with_state(model, state)))

        return training_loop(model, *args, on_epoch=on_epoch, **kwargs)

    adata = train.copy()
    with patch("scuvae.tl._fit.train", traced):
        clock = Clock()
        scuvae.tl.fit(adata, rng=seed, likelihood="nb", progress=False, device="cpu", **arguments)
        return adata, clock.seconds(), points


def _with_state(model: VAE, state: dict[str, Any]) -> VAE:
    model = copy.deepcopy(model)
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def scuvae_row(
    bench: Bench, label: str, target: float, scvi_seconds: float, **arguments: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    adata, seconds, points = fit_traced(bench.train, bench.seed, **arguments)
    model = scuvae.get.model(adata).requires_grad_(False)
    cells = bench.held_out_cells
    scores, best = held_out_scores(model, cells)
    first = encoded(model, cells)
    # The q that this kind of inference gives a new cell: the encoder's, else a refined one.
    own = best if arguments["amortized"] is not True or first is None else first
    row: dict[str, Any] = {
        "model": label,
        "cpu_s": seconds,
        "epochs": float(len(points)),
        **scores,
        **bench.embedding(adata.obsm["X_scuvae"], own.mean.numpy()),
    }
    if bench.has_labels and not bench.args.no_embeddings and own is not best:
        better = refined(model, bench.train_cells, encoded(model, bench.train_cells))
        row["accuracy_refined"] = bench.accuracy(better.mean.numpy(), best.mean.numpy())
    curves = {}
    if not bench.args.no_curves:
        # Every epoch at first, then ever fewer: the target is met early.
        at = np.geomspace(1, len(points), bench.args.curve_points).round().astype(int)
        some = [points[i - 1] for i in np.unique(at)]
        if model.encoder is not None:
            curves[f"{label}, encoder"] = curve(some, cells, refine_q=False)
        if arguments["amortized"] is not True:
            curves[f"{label}, refined"] = curve(some, cells, refine_q=True)
        own_curve = f"{label}, encoder" if arguments["amortized"] is True else f"{label}, refined"
        row["until_s"] = seconds_until(curves[own_curve], target)
        row["until_ratio"] = row["until_s"] / scvi_seconds
    print(_short(row), flush=True)
    return row, curves


# --- PCA -----------------------------------------------------------------------------------------


def pca_row(bench: Bench, n_components: int = 10) -> dict[str, Any]:
    """Principal components of log-normalised counts, fitted to the training cells."""
    from sklearn.decomposition import PCA

    clock = Clock()
    middle = float(np.median(np.asarray(bench.train.X.sum(1))))

    def normalised(adata: ad.AnnData) -> np.ndarray:
        total = np.asarray(adata.X.sum(1))
        return np.log1p(adata.X.toarray() * (middle / total))

    pca = PCA(n_components, random_state=0).fit(normalised(bench.train))
    train, held_out = (pca.transform(normalised(part)) for part in (bench.train, bench.held_out))
    seconds = clock.seconds()
    row = {"model": "PCA", "cpu_s": seconds, **bench.embedding(train, held_out)}
    print(_short(row), flush=True)
    return row


# --- the whole -----------------------------------------------------------------------------------


def measure(data: str, args: argparse.Namespace) -> dict[str, Any]:
    adata = load(data, args.n_genes)
    print(f"\n## {name_of(data)}: {adata.n_obs} cells x {adata.n_vars} genes\n", flush=True)
    _warm_up(adata)
    rows: list[dict[str, Any]] = []
    curves: dict[str, Any] = {}
    for seed in args.seeds:
        print(f"seed {seed}", flush=True)
        bench = Bench(adata, seed, args)
        target, seconds, found = float("nan"), float("nan"), []
        seen: dict[str, Any] = {}
        if "scvi" in args.models:
            found, seen, target, seconds = scvi_rows(bench, name_of(data))
        for kind in (k for k in KINDS if k in args.models):
            for epochs in [None, *args.max_epochs]:
                label = f"scuvae, {kind}" + (f", {epochs} epochs" if epochs else "")
                options = {"amortized": KINDS[kind], **args.fit_args}
                if epochs:
                    options["max_epochs"] = epochs
                row, more = scuvae_row(bench, label, target, seconds, **options)
                found.append(row)
                seen |= more
        if "pca" in args.models:
            found.append(pca_row(bench))
        rows += [{**row, "seed": seed} for row in found]
        curves[str(seed)] = seen
    print(
        f"\n{name_of(data)}: held-out cells, nats per cell; medians of seeds {args.seeds}"
        f" (lowest to highest). Target: the encoder of SCVI after {args.scvi_epochs[0]} epochs.\n"
    )
    table = medians(rows, "model")
    print_table(table, COLUMNS)
    return {"data": name_of(data), "table": table, "rows": rows, "curves": curves}


def _warm_up(adata: ad.AnnData) -> None:
    """What a first call loads and allocates is nobody's training time."""
    for amortized in KINDS.values():
        few = adata[: min(300, adata.n_obs)].copy()
        scuvae.tl.fit(few, amortized=amortized, max_epochs=1, progress=False, device="cpu")


def plot(results: list[dict[str, Any]], path: str) -> None:
    """Held-out ELBO over CPU seconds, a panel for each data set, a line for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(results), 4), layout="constrained")
    for ax, result in zip(np.atleast_1d(figure.subplots(1, len(results))), results, strict=True):
        colours: dict[str, str] = {}
        high = []
        for lines in result["curves"].values():
            for label, points in lines.items():
                new = label not in colours
                colour = colours.setdefault(label, f"C{len(colours)}")
                x, y = [p["cpu_s"] for p in points], [p["elbo"] for p in points]
                high += y
                ax.plot(x, y, color=colour, lw=1, label=label if new else None)
        ax.set(title=result["data"], xlabel="CPU seconds", xscale="log")
        ax.set_ylim(np.quantile(high, 0.2), max(high) + 1)
        ax.legend(fontsize=7)
    np.atleast_1d(figure.axes)[0].set_ylabel("held-out ELBO, nats per cell")
    figure.savefig(path, dpi=150)


def _first(n: int, most: int) -> Any:
    import torch

    return torch.arange(min(n, most))


def _short(row: dict[str, Any]) -> dict[str, Any]:
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("data", nargs="+", help="files of raw counts, or pbmc68k for the data that ships")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of split, SCVI and fit")
    add("--n-genes", type=int, default=2000)
    add("--label", default="cell_type", help="column of obs with labels")
    add("--models", nargs="+", default=["scvi", *KINDS, "pca"], choices=["scvi", *KINDS, "pca"])
    add(
        "--scvi-epochs",
        type=int,
        nargs="+",
        default=[160],
        help="rows of SCVI; the first is the target. Its default number is shown if cached",
    )
    add("--cache", help="folder for SCVI's weights: each is trained once")
    add(
        "--calibrate",
        type=int,
        default=3,
        help="epochs of SCVI to time now, by which cached CPU seconds are scaled; 0: none",
    )
    add("--max-epochs", type=int, nargs="*", default=[], help="further fits, of so many epochs")
    add("--fit-args", type=json.loads, default={}, help="arguments of tl.fit, as JSON")
    add("--curve-points", type=int, default=30, help="models of a fit that a curve looks at")
    add("--resolution", type=float, default=1.0, help="of Leiden")
    add("--no-curves", action="store_true")
    add("--no-embeddings", action="store_true")
    add("--json", help="file for all figures")
    add("--plot", help="file for the curves")
    args = parser.parse_args()

    results = []
    for data in args.data:
        results.append(measure(data, args))
        arguments = {k: v for k, v in vars(args).items() if k not in ("json", "plot", "cache")}
        write_json(args.json, {"arguments": arguments, "results": results})
    if args.plot and not args.no_curves:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
