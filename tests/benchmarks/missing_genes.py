"""Label accuracy of held-out cells that lack some of the genes: SCVI's encoder, and conditioning.

    python tests/benchmarks/missing_genes.py DATA.h5ad ... --seeds 0 1 2 --cache DIR --json out.json

The genes that are missing are drawn at random for each seed, the same for all methods; those
missing at a fraction are missing at all higher ones too. Held-out cells take the label of most of
their 15 nearest training cells, which have all genes unless a method says otherwise. An encoder
needs a number for every gene and gets one in several ways (``FILLS``); conditioning leaves missing
genes out of the likelihood. One thread; models are cached, so that a second run is cheap.
"""

import argparse
import warnings
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import _scvi
import anndata as ad
import numpy as np
import torch
from _common import (
    Clock,
    cells_of,
    encoded,
    load,
    medians,
    name_of,
    neighbour_accuracy,
    platform_of,
    print_table,
    refined,
    split,
    write_json,
)
from scipy import sparse as sp
from torch.distributions import Distribution, MultivariateNormal

import scuvae
from scuvae.batches import Cells
from scuvae.batches.sources.registry import source_of
from scuvae.inference.refinement.initialization import prior_start
from scuvae.inference.refinement.refine import THOROUGH
from scuvae.model import VAE

_NEIGHBOURS = 15
_DRAWS = 20  # of a cell's posterior, each with a vote


class Bench:
    """One data set and seed: its cells, the order in which genes go missing, the models."""

    def __init__(self, adata: ad.AnnData, data: str, seed: int, args: argparse.Namespace) -> None:
        self.name, self.seed, self.args = name_of(data), seed, args
        self.train, self.held_out = split(adata, seed)
        self.labels = self.train.obs[args.label].astype(str).to_numpy()
        self.truth = self.held_out.obs[args.label].astype(str).to_numpy()
        self.mean = np.asarray(self.train.X.mean(0)).ravel()
        self.log_mean = np.asarray(self.train.X.log1p().mean(0)).ravel()
        # Other random numbers than those of the split.
        self.order = np.random.default_rng([seed, 1]).permutation(adata.n_vars)

    def observed(self, fraction: float) -> np.ndarray:
        """Mask of the genes that are there when ``fraction`` of them are missing."""
        mask = np.ones(self.train.n_vars, bool)
        mask[self.order[: round(fraction * len(mask))]] = False
        return mask

    def accuracy(self, reference: np.ndarray, query: np.ndarray) -> float:
        return neighbour_accuracy(reference, self.labels, query, self.truth, _NEIGHBOURS)

    @cached_property
    def scvi(self) -> VAE:
        args = self.args
        run = _scvi.trace(self.train, self.seed, args.scvi_epochs, name=self.name, cache=args.cache)
        return run.model(args.scvi_epochs)

    @cached_property
    def unamortized(self) -> ad.AnnData:
        return self._fit("unamortized", False)

    @cached_property
    def amortized(self) -> ad.AnnData:
        return self._fit("amortized", True)

    def _fit(self, kind: str, amortized: bool) -> ad.AnnData:
        """The training cells with a default fit, from the cache or anew."""
        path = None
        if self.args.cache:
            stem = f"scuvae_{kind}_{self.name}_{self.train.n_vars}_seed{self.seed}"
            path = Path(self.args.cache) / f"{stem}_{scuvae.__version__}.h5ad"
            if path.exists():
                found = ad.read_h5ad(path)
                if (
                    found.obs_names.equals(self.train.obs_names)
                    and not (found.X != self.train.X).nnz
                ):
                    return found
        out = self.train.copy()
        clock = Clock()
        scuvae.tl.fit(
            out, amortized=amortized, likelihood="nb", rng=self.seed, device="cpu", progress=False
        )
        print(f"{kind} fit: {clock.seconds():.1f} CPU s", flush=True)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            out.write_h5ad(path)
        return out


# --- an encoder, and numbers in place of what is missing -----------------------------------------


def _zeros(bench: Bench, observed: np.ndarray) -> Any:
    return sp.csr_matrix(bench.held_out.X.multiply(observed), dtype=np.float32)


def _rescaled(bench: Bench, observed: np.ndarray) -> Any:
    """Zeros, and observed counts times what training cells have in all per observed count."""
    return _zeros(bench, observed) * np.float32(bench.mean.sum() / bench.mean[observed].sum())


def _depth(bench: Bench, observed: np.ndarray) -> np.ndarray:
    """A cell's counts per expected count of the average training cell, over observed genes."""
    return np.asarray(_zeros(bench, observed).sum(1)) / bench.mean[observed].sum()


def _imputed(bench: Bench, observed: np.ndarray, missing: np.ndarray) -> np.ndarray:
    return np.where(observed, bench.held_out.X.toarray(), missing).astype(np.float32)


FILLS: dict[str, Callable[[Bench, np.ndarray], Any]] = {
    "zeros": _zeros,
    "mean at the cell's depth": lambda b, o: _imputed(b, o, _depth(b, o) * b.mean),
    "plain mean": lambda b, o: _imputed(b, o, b.mean),
    # What an encoder's first layer, linear in log(1 + x), gets from the average cell.
    "mean of log(1 + x)": lambda b, o: _imputed(b, o, np.expm1(b.log_mean)),
    "zeros, depth-rescaled": _rescaled,
}

# Observed genes → accuracy.
Method = Callable[[np.ndarray], float]


def by_encoder(bench: Bench, model: VAE, fill: str) -> Method:
    reference = encoded(model, cells_of(bench.train)).mean.numpy()

    def accuracy(observed: np.ndarray) -> float:
        values = FILLS[fill](bench, observed)
        query = encoded(model, Cells(source_of(values, torch.device("cpu"))))
        return bench.accuracy(reference, query.mean.numpy())

    return accuracy


# --- conditioning on the observed genes ----------------------------------------------------------


def _conditioned(
    model: VAE, adata: ad.AnnData, observed: np.ndarray, *starts: Distribution, **options: Any
) -> Distribution:
    """q over the observed genes, refined from the likeliest draw of the prior and the starts."""
    x = sp.csr_matrix(adata.X.multiply(observed), dtype=np.float32)
    mask = None if observed.all() else torch.from_numpy(observed)
    cells = Cells(source_of(x, torch.device("cpu")), observed=mask)
    return refined(model, cells, *starts, **options)


def by_refinement(bench: Bench, model: VAE) -> Method:
    """An encoder's own decoder, both kinds of cells refined: what inference alone does."""
    everything = bench.observed(0.0)
    start = encoded(model, cells_of(bench.train))
    reference = _conditioned(model, bench.train, everything, start).mean.numpy()

    def accuracy(observed: np.ndarray) -> float:
        query = _conditioned(model, bench.held_out, observed)
        return bench.accuracy(reference, query.mean.numpy())

    return accuracy


def _projected(bench: Bench, observed: np.ndarray, **options: Any) -> ad.AnnData:
    """The held-out cells, which lack the genes that are not observed."""
    return _quietly(bench.held_out[:, observed], bench.unamortized, **options)


def _training_cells(bench: Bench, observed: np.ndarray) -> ad.AnnData:
    """The training cells over the observed genes alone."""
    genes = bench.train.var_names[observed]
    return _quietly(bench.train, bench.unamortized, genes=genes)


def _quietly(adata: ad.AnnData, reference: ad.AnnData, **options: Any) -> ad.AnnData:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*cells have no counts")
        out = scuvae.tl.project(adata, reference, device="cpu", copy=True, **options)
    assert out is not None
    return out


def by_projection(bench: Bench, **options: Any) -> Method:
    reference = bench.unamortized.obsm["X_scuvae"]

    def accuracy(observed: np.ndarray) -> float:
        query = _projected(bench, observed, **options)
        return bench.accuracy(reference, query.obsm["X_scuvae"])

    return accuracy


def by_projection_of_both(bench: Bench) -> Method:
    """Training cells, too, embedded by the observed genes alone."""

    def accuracy(observed: np.ndarray) -> float:
        query, reference = _projected(bench, observed), _training_cells(bench, observed)
        return bench.accuracy(reference.obsm["X_scuvae"], query.obsm["X_scuvae"])

    return accuracy


def by_votes(bench: Bench) -> Method:
    """``tl.transfer_labels``: votes of training cells by how well they explain a cell's counts."""
    name = bench.args.label
    fitted = bench.unamortized

    def accuracy(observed: np.ndarray) -> float:
        query = bench.held_out[:, observed].copy()
        scuvae.tl.transfer_labels(query, fitted, labels=name, device="cpu")
        return float((query.obs["scuvae_label"].astype(str) == bench.truth).mean())

    return accuracy


def by_thorough_projection(bench: Bench) -> Method:
    """More steps and more draws, also from the prior's mean."""
    reference = bench.unamortized.obsm["X_scuvae"]
    model = scuvae.get.model(bench.unamortized)
    centre = prior_start(model, bench.held_out.n_obs, "full")

    def accuracy(observed: np.ndarray) -> float:
        query = _conditioned(model, bench.held_out, observed, centre, **THOROUGH)
        return bench.accuracy(reference, query.mean.numpy())

    return accuracy


def by_draws(bench: Bench) -> Method:
    """Neighbours of draws of q in place of its mean: every draw has a vote."""
    from sklearn.neighbors import KNeighborsClassifier

    knn = KNeighborsClassifier(_NEIGHBOURS).fit(bench.unamortized.obsm["X_scuvae"], bench.labels)

    def accuracy(observed: np.ndarray) -> float:
        query = _projected(bench, observed)
        q = scuvae.get.posterior(query)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(bench.seed)
            draws = q.sample((_DRAWS,)).numpy()
        votes = sum(knn.predict_proba(z) for z in draws)
        return float((knn.classes_[votes.argmax(1)] == bench.truth).mean())

    return accuracy


def by_overlap(bench: Bench) -> Method:
    """Training cells, too, by the observed genes; each votes by its q's overlap with the cell's."""
    kinds, codes = np.unique(bench.labels, return_inverse=True)
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(codes)).double()

    def accuracy(observed: np.ndarray) -> float:
        query, reference = (
            scuvae.get.posterior(cells(bench, observed)) for cells in (_projected, _training_cells)
        )
        guesses = []
        for mean, covariance in zip(query.mean, query.covariance_matrix, strict=True):
            # ∫ q(z) q_n(z) dz of Gaussians is a density at their means' difference.
            both = MultivariateNormal(reference.mean, reference.covariance_matrix + covariance)
            weight = both.log_prob(mean).double().softmax(0)
            guesses.append(int((weight @ one_hot).argmax()))
        return float((kinds[guesses] == bench.truth).mean())

    return accuracy


# --- what the observed genes tell at all ---------------------------------------------------------


def _normalised(adata: ad.AnnData, observed: np.ndarray) -> np.ndarray:
    x = sp.csr_matrix(adata.X)[:, np.flatnonzero(observed)]
    total = np.maximum(np.asarray(x.sum(1)), 1)
    return np.log1p(x.toarray() * (1e4 * observed.mean() / total))


def by_pca(bench: Bench) -> Method:
    """10 components of the observed genes, fitted to the training cells' observed genes."""
    from sklearn.decomposition import PCA

    def accuracy(observed: np.ndarray) -> float:
        pca = PCA(10, random_state=0)
        reference = pca.fit_transform(_normalised(bench.train, observed))
        return bench.accuracy(reference, pca.transform(_normalised(bench.held_out, observed)))

    return accuracy


def by_regression(bench: Bench) -> Method:
    """Logistic regression of the labels on the observed genes, which no embedding is told."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    def accuracy(observed: np.ndarray) -> float:
        scaler = StandardScaler()
        x = scaler.fit_transform(_normalised(bench.train, observed))
        model = LogisticRegression(C=2 / observed.sum(), max_iter=200).fit(x, bench.labels)
        return float(
            model.score(scaler.transform(_normalised(bench.held_out, observed)), bench.truth)
        )

    return accuracy


# --- the whole -----------------------------------------------------------------------------------

METHODS: dict[str, dict[str, Callable[[Bench], Method]]] = {
    "scvi": {
        **{f"SCVI, {fill}": lambda b, fill=fill: by_encoder(b, b.scvi, fill) for fill in FILLS},
        "SCVI, refined": lambda b: by_refinement(b, b.scvi),
    },
    "amortized": {
        "amortized, zeros": lambda b: by_encoder(b, scuvae.get.model(b.amortized), "zeros"),
        "amortized, refined": lambda b: by_refinement(b, scuvae.get.model(b.amortized)),
    },
    "project": {"tl.project": by_projection, "tl.transfer_labels": by_votes},
    "project-variants": {
        "tl.project of both": by_projection_of_both,
        "tl.project, diagonal": lambda b: by_projection(b, covariance="diagonal"),
        "tl.project, thorough": by_thorough_projection,
        "tl.project, votes of draws": by_draws,
        "tl.project of both, by overlap": by_overlap,
    },
    "ceilings": {"PCA of the observed": by_pca, "regression on the observed": by_regression},
}


def _percent(fraction: float) -> str:
    return f"{100 * fraction:g}"


def measure(data: str, args: argparse.Namespace) -> dict[str, Any]:
    adata = load(data, args.n_genes)
    print(f"\n## {name_of(data)}: {adata.n_obs} cells x {adata.n_vars} genes\n", flush=True)
    methods = {name: make for group in args.methods for name, make in METHODS[group].items()}
    fractions = sorted({0.0, *args.fractions})
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        bench = Bench(adata, data, seed, args)
        _describe(bench, fractions)
        for name, make in methods.items():
            clock = Clock()
            method = make(bench)  # with what a fit takes, where it is not cached
            found = {f: method(bench.observed(f)) for f in fractions}
            row: dict[str, Any] = {"method": name, "seed": seed, "cpu_s": clock.seconds()}
            row |= {_percent(f): value for f, value in found.items()}
            row |= {f"ratio_{_percent(f)}": value / found[0.0] for f, value in found.items()}
            rows.append(row)
            print(name, *(f"{value:.3f}" for value in found.values()), flush=True)
    table = medians(rows, "method")
    name = f"{name_of(data)}, medians of seeds {args.seeds} (lowest to highest)"
    percents = [_percent(f) for f in fractions]
    print(f"\n{name}: 15-NN accuracy by % of genes missing\n")
    print_table(table, {"method": ("method", "")} | {p: (f"{p} %", ".3f") for p in percents})
    print(f"{name}: accuracy / the method's own with all genes\n")
    ratios = {f"ratio_{p}": (f"{p} %", ".3f") for p in percents[1:]}
    print_table(table, {"method": ("method", "")} | ratios)
    return {"data": name_of(data), "table": table, "rows": rows}


def _describe(bench: Bench, fractions: list[float]) -> None:
    """How many counts the observed genes leave a cell."""
    left = []
    for fraction in fractions:
        totals = np.asarray(bench.held_out.X[:, bench.observed(fraction)].sum(1)).ravel()
        left.append(f"{np.median(totals):.0f} ({int((totals == 0).sum())} cells without)")
    print(f"seed {bench.seed}; median counts of held-out cells: {', '.join(left)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("data", nargs="+", help="files of raw counts, or pbmc68k for the data that ships")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of split, genes, SCVI and fit")
    add(
        "--fractions",
        type=float,
        nargs="+",
        default=[0.25, 0.5, 0.75, 0.9],
        help="of the genes that are missing; 0 is always there",
    )
    add("--n-genes", type=int, default=2000)
    add("--label", default="cell_type", help="column of obs with labels")
    add("--scvi-epochs", type=int, default=200)
    add(
        "--methods",
        nargs="+",
        default=["scvi", "amortized", "project"],
        choices=list(METHODS),
        help="project-variants: other q and other distances; ceilings: what the genes tell at all",
    )
    add("--cache", help="folder for SCVI's weights and our fits: each is trained once a version")
    add("--json", help="file for all figures")
    args = parser.parse_args()
    results = []
    for data in args.data:
        results.append(measure(data, args))
        arguments = {k: v for k, v in vars(args).items() if k not in ("json", "cache")}
        content = {"arguments": arguments, "platform": platform_of(), "results": results}
        write_json(args.json, content)


if __name__ == "__main__":
    main()
