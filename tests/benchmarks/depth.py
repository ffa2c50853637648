"""Labels of cells of few counts: held-out cells thinned to fewer and fewer of their counts.

    python tests/benchmarks/depth.py DATA.h5ad ... --seeds 0 1 2 --cache DIR --json out.json

Every count of a held-out cell is thinned binomially, so that its total over the modelled genes is
20, 50, 100, 200 or 400 on average; cells that have fewer stay as they are. Training cells, which
have the labels, are as deep as they were. Labels by the 15 nearest training cells among

- posterior means of an unamortized fit (``tl.project``), and in its map: the decoder's means at one
  common total, each gene in its variance-stabilising coordinate, 30 principal components;
- the same of encoders: of an amortized fit, of one that ``tl.to_encoder`` makes for the unamortized
  fit, and of a semi-amortized fit;
- principal components of log-normalised counts, thinned cells normalised as the others;
- SCVI's encoder, after its default number of epochs, and JointEmbeddingSCVI's (scvi-tools ≥ 1.5);

and by ``tl.transfer_labels``. One thread.
"""

import argparse
import warnings
from collections.abc import Callable
from functools import cached_property
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
    split,
    write_json,
)

import scuvae
from scuvae.model import VAE

DEPTHS = (20, 50, 100, 200, 400, None)
COLUMNS = {
    "method": ("labels by", ""),
    **{f"at_{depth}": (str(depth or "all"), ".3f") for depth in DEPTHS},
    "cpu_s": ("fit, CPU s", ".1f"),
}
_COMPONENTS = 30
Embedding = Callable[[ad.AnnData], np.ndarray]


def thinned(adata: ad.AnnData, depth: int | None, seed: int) -> ad.AnnData:
    """The cells with totals of ``depth`` on average, or as they are where these are less."""
    out = adata.copy()
    if depth is None:
        return out
    total = np.asarray(out.X.sum(1)).ravel()
    chance = np.repeat(np.minimum(1, depth / total), np.diff(out.X.indptr))
    drawn = np.random.default_rng([seed, depth]).binomial(out.X.data.astype(np.int64), chance)
    out.X.data = drawn.astype(np.float32)
    out.X.eliminate_zeros()
    return out


class Bench:
    """One data set and seed: training cells, and held-out cells of each depth."""

    def __init__(self, adata: ad.AnnData, data: str, seed: int, args: argparse.Namespace) -> None:
        self.seed, self.args, self.data = seed, args, data
        self.train, held_out = split(adata, seed)
        self.labels = self.train.obs[args.label].astype(str).to_numpy()
        self.truth = held_out.obs[args.label].astype(str).to_numpy()
        self.query = {depth: thinned(held_out, depth, seed) for depth in DEPTHS}

    def by_neighbours(self, embed: Embedding) -> dict[str, float]:
        """Accuracy at each depth, by the nearest training cells in an embedding."""
        reference = embed(self.train)
        return {
            f"at_{depth}": neighbour_accuracy(reference, self.labels, embed(query), self.truth)
            for depth, query in self.query.items()
        }

    def fit(self, amortized: bool | str) -> tuple[ad.AnnData, float]:
        adata, clock = self.train.copy(), Clock()
        scuvae.tl.fit(adata, amortized=amortized, likelihood="nb", rng=self.seed, **_QUIET)
        return adata, clock.seconds()

    @cached_property
    def unamortized(self) -> tuple[ad.AnnData, float]:
        return self.fit(False)


_QUIET: dict[str, Any] = {"progress": False, "device": "cpu"}


# --- maps ----------------------------------------------------------------------------------------


class Map:
    """Posterior means → the decoder's means at one total → 30 principal components.

    Each gene in the coordinate in which a negative binomial has unit variance,
    2 √θ asinh √(μ/θ).
    """

    def __init__(self, model: VAE, z: np.ndarray, total: float) -> None:
        from sklearn.decomposition import PCA

        self.model, self.total = model, total
        self.pca = PCA(_COMPONENTS, svd_solver="covariance_eigh").fit(self._stable(z))

    def __call__(self, z: np.ndarray) -> np.ndarray:
        found: np.ndarray = self.pca.transform(self._stable(z))
        return found

    @torch.no_grad()
    def _stable(self, z: np.ndarray) -> np.ndarray:
        eta = self.model.decoder(torch.from_numpy(np.asarray(z, np.float32)))
        mu = self.model.likelihood.mean(eta, torch.full((len(z),), self.total))
        theta = self.model.likelihood.log_theta.exp()
        return (2 * theta.sqrt() * (mu / theta).sqrt().asinh()).numpy()


def with_map(bench: Bench, model: VAE, means: Embedding) -> Embedding:
    """Embedding by ``means``, then the map that the model makes of them."""
    own = Map(model, means(bench.train), float(np.median(np.asarray(bench.train.X.sum(1)))))
    return lambda adata: own(means(adata))


# --- methods: rows of the table ------------------------------------------------------------------


def by_fit(bench: Bench) -> list[dict[str, Any]]:
    fitted, seconds = bench.unamortized

    def means(adata: ad.AnnData) -> np.ndarray:
        if adata is bench.train:
            return fitted.obsm["X_scuvae"]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*cells have no counts")
            found = scuvae.tl.project(adata, fitted, device="cpu", copy=True)
        assert found is not None
        return found.obsm["X_scuvae"]

    model = scuvae.get.model(fitted)
    rows = [
        _row("unamortized, means", bench.by_neighbours(means), seconds),
        _row("unamortized, map", bench.by_neighbours(with_map(bench, model, means)), seconds),
    ]
    votes = {}
    for depth, query in bench.query.items():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*cells have no counts")
            scuvae.tl.transfer_labels(query, fitted, labels=bench.args.label, device="cpu")
        found = query.obs["scuvae_label"].astype(str)
        votes[f"at_{depth}"] = float((found == bench.truth).mean())
    return [*rows, _row("votes (tl.transfer_labels)", votes, seconds)]


def _encoder_rows(bench: Bench, name: str, model: VAE, seconds: float) -> list[dict[str, Any]]:
    def means(adata: ad.AnnData) -> np.ndarray:
        q = encoded(model, cells_of(adata))
        assert q is not None
        return q.mean.numpy()

    return [
        _row(f"{name}, means", bench.by_neighbours(means), seconds),
        _row(f"{name}, map", bench.by_neighbours(with_map(bench, model, means)), seconds),
    ]


def by_encoder(bench: Bench) -> list[dict[str, Any]]:
    fitted, seconds = bench.fit(True)
    return _encoder_rows(bench, "amortized", scuvae.get.model(fitted), seconds)


def by_semi(bench: Bench) -> list[dict[str, Any]]:
    fitted, seconds = bench.fit("semi")
    return _encoder_rows(bench, "semi, encoder", scuvae.get.model(fitted), seconds)


def by_distilled(bench: Bench) -> list[dict[str, Any]]:
    fitted, seconds = bench.unamortized
    clock = Clock()
    scuvae.tl.to_encoder(fitted, key_added="k", rng=bench.seed, **_QUIET)
    seconds += clock.seconds()
    return _encoder_rows(bench, "to_encoder", scuvae.get.model(fitted, key="k"), seconds)


def by_pca(bench: Bench) -> list[dict[str, Any]]:
    from sklearn.decomposition import PCA

    middle = float(np.median(np.asarray(bench.train.X.sum(1))))

    def normalised(adata: ad.AnnData) -> np.ndarray:
        total = np.asarray(adata.X.sum(1)).clip(1)
        return np.log1p(adata.X.multiply(middle / total).toarray())

    clock = Clock()
    pca = PCA(max(bench.args.components), random_state=0).fit(normalised(bench.train))
    seconds = clock.seconds()
    rows = []
    for n in bench.args.components:

        def some(adata: ad.AnnData, n: int = n) -> np.ndarray:
            return pca.transform(normalised(adata))[:, :n]

        rows.append(_row(f"PCA, {n}", bench.by_neighbours(some), seconds))
    return rows


def by_scvi(bench: Bench) -> list[dict[str, Any]]:
    epochs = bench.args.scvi_epochs or _scvi.default_epochs(bench.train.n_obs)
    name = name_of(bench.data)
    run = _scvi.trace(bench.train, bench.seed, epochs, name=name, cache=bench.args.cache)
    name = f"SCVI, {epochs} epochs"
    return _encoder_rows(bench, name, run.model(epochs), run.seconds(epochs))


def by_joint_embedding(bench: Bench) -> list[dict[str, Any]]:
    import scvi

    kind = getattr(scvi.external, "JointEmbeddingSCVI", None)
    if kind is None:
        lacks = f"JointEmbeddingSCVI: scvi-tools {scvi.__version__} lacks it"
        return [{"method": lacks}]
    scvi.settings.seed = bench.seed
    torch.set_num_threads(1)
    train = bench.train.copy()
    kind.setup_anndata(train)
    model, clock = kind(train, gene_likelihood="nb"), Clock()
    epochs = bench.args.scvi_epochs or _scvi.default_epochs(train.n_obs)
    model.train(max_epochs=epochs, accelerator="cpu", train_size=1.0, enable_progress_bar=False)
    seconds = clock.seconds()

    def means(adata: ad.AnnData) -> np.ndarray:
        return model.get_latent_representation(adata.copy())

    return [_row(f"JointEmbeddingSCVI, {epochs} epochs", bench.by_neighbours(means), seconds)]


METHODS: dict[str, Callable[[Bench], list[dict[str, Any]]]] = {
    "fit": by_fit,
    "amortized": by_encoder,
    "distilled": by_distilled,
    "semi": by_semi,
    "pca": by_pca,
    "scvi": by_scvi,
    "joint": by_joint_embedding,
}


def _row(method: str, accuracy: dict[str, float], seconds: float) -> dict[str, Any]:
    row = {"method": method, **accuracy, "cpu_s": seconds}
    print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return row


def measure(data: str, args: argparse.Namespace) -> dict[str, Any]:
    adata = load(data, args.n_genes)
    adata = adata[adata.obs[args.label].notna().to_numpy()].copy()
    if adata.n_obs > args.most_cells:
        some = np.random.default_rng(0).permutation(adata.n_obs)[: args.most_cells]
        adata = adata[np.sort(some)].copy()
    middle = np.median(np.asarray(adata.X.sum(1)))
    print(
        f"\n## {name_of(data)}: {adata.n_obs} cells x {adata.n_vars} genes, {middle:.0f} counts"
        " in the median\n",
        flush=True,
    )
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        bench = Bench(adata, data, seed, args)
        rows += [row for name in args.methods for row in METHODS[name](bench)]
    print(f"\n{name_of(data)}: accuracy by counts a held-out cell; medians of seeds {args.seeds}\n")
    table = medians(rows, "method")
    print_table(table, COLUMNS)
    return {"data": name_of(data), "table": table, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("data", nargs="+", help="files of raw counts, or pbmc68k for the data that ships")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of split, thinning and fits")
    add("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    add("--n-genes", type=int, default=2000)
    add("--most-cells", type=int, default=4000, help="of more, so many are chosen")
    add("--label", default="cell_type", help="column of obs")
    add("--components", type=int, nargs="+", default=[10, 20, 50])
    add("--scvi-epochs", type=int, help="None: its default number")
    add("--cache", help="folder for SCVI's weights: each is trained once")
    add("--json", help="file for all figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for data in args.data:
        results.append(measure(data, args))
        arguments = {k: v for k, v in vars(args).items() if k not in ("json", "cache")}
        about = {"arguments": arguments, "platform": platform_of(), "results": results}
        write_json(args.json, about)


if __name__ == "__main__":
    main()
