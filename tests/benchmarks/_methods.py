"""The methods that molecules.py, map.py and seeds.py compare, and what the three ask in common.

SCVI's and MAGIC's results are kept in ``--cache`` as plain arrays, and the rows of all methods but
ours too: a run after a change of ours takes our time alone. Delete the files to measure anew.
"""

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _scvi
import _scvi_fast
import _views as views
import anndata as ad
import numpy as np
import torch
from _common import Clock, load, name_of, print_table
from scipy import sparse as sp

import scuvae

# Sets whose batches are technologies or protocols. Donors and plates of one protocol are not told.
BATCHED = ("pbmc_3tech_symphony", "scmix_rnamix")
OURS: dict[str, bool | str] = {"unamortized": False, "semi": "semi", "amortized": True}
# Goes up when a figure is computed differently: rows kept under another number are not read.
_VERSION = 1
_DRAWS = 16


# --- what the scripts ask ------------------------------------------------------------------------


def parser(doc: str | None, models: list[str], default: list[str]) -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    add = out.add_argument
    add("data", nargs="+", help="files of raw counts, or pbmc68k for the data that ships")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--models", nargs="+", default=default, choices=models)
    add(
        "--fit-args",
        type=json.loads,
        nargs="+",
        default=[{}],
        help="arguments of tl.fit, as JSON; several: a row for each",
    )
    add("--n-genes", type=int, default=2000)
    add("--cells", type=int, help="only so many cells, drawn once")
    add("--label", default="cell_type", help="column of obs with labels")
    add(
        "--batch-key",
        default="auto",
        help="column of obs that models are told, or none; auto: batch for technologies and "
        "protocols (" + ", ".join(BATCHED) + ")",
    )
    add("--scvi-likelihood", default="nb", choices=["nb", "zinb"])
    add("--cache", help="folder for SCVI's and MAGIC's results, and rows of all but ours")
    add("--json", help="file for all figures")
    return out


class Data:
    """Counts, labels and batches of a file as the options say."""

    def __init__(self, data: str, args: argparse.Namespace) -> None:
        adata = load(data, args.n_genes)
        if args.cells and args.cells < adata.n_obs:
            some = np.random.default_rng(0).permutation(adata.n_obs)[: args.cells]
            adata = adata[np.sort(some)].copy()
        # Genes without a count say nothing, and some methods stumble over them.
        adata = adata[:, views.totals(adata.X, 0) > 0].copy()
        self.adata, self.args, self.name = adata, args, name_of(data)
        self.stem = f"{self.name}_{adata.n_obs}x{adata.n_vars}"
        if args.label != "cell_type":
            self.stem += f"_{args.label}"
        self.labels = adata.obs[args.label].astype(str).to_numpy()
        key = args.batch_key
        if key == "auto":
            key = "batch" if self.name in BATCHED else "none"
        self.batch_key: str | None = None if key == "none" else key
        self.batches = None
        if self.batch_key is not None:
            self.batches = adata.obs[self.batch_key].astype(str).to_numpy()
            self.stem += f"_{self.batch_key}"

    def __str__(self) -> str:
        told = f", batches: {self.batch_key}" if self.batch_key else ""
        return f"{self.name}: {self.adata.n_obs} cells x {self.adata.n_vars} genes{told}"

    def with_counts(self, counts: sp.csr_matrix) -> ad.AnnData:
        """The same cells with other counts."""
        columns = [self.batch_key] if self.batch_key else []
        return ad.AnnData(
            counts.astype(np.float32), obs=self.adata.obs[columns].copy(), var=self.adata.var.copy()
        )

    def remember(self, what: str, make: Callable[[], Any]) -> Any:
        """Figures as JSON from the cache, or made and kept."""
        if not self.args.cache:
            return make()
        path = Path(self.args.cache) / "rows" / f"{what}_{self.stem}_v{_VERSION}.json"
        if not path.exists():
            content = make()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content, indent=1) + "\n")
        return json.loads(path.read_text())

    def keep(self, what: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Arrays from the cache, or made and kept."""
        if not self.args.cache:
            return make()
        path = Path(self.args.cache) / f"{what}_{self.stem}.npz"
        if not path.exists():
            content = make()
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial.npz")
            np.savez(partial, **content)
            partial.replace(path)
        with np.load(path) as arrays:
            return dict(arrays)


def print_all(results: list[dict[str, Any]], columns: dict[str, tuple[str, str]]) -> None:
    """One table of several sets, medians alone."""
    rows = []
    for result in results:
        for row in result["table"]:
            plain = {name: value for name, value in row.items() if not name.endswith("_range")}
            rows.append({"data": result["data"], **plain})
    shown = {name: form for name, form in columns.items() if any(name in row for row in rows)}
    print("\nAll sets, medians\n")
    print_table(rows, {"data": ("data", ""), **shown})


def say(row: dict[str, Any]) -> None:
    print({k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}, flush=True)


# --- ours ----------------------------------------------------------------------------------------


def fits_of(args: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
    """Our fits that the options ask for: a label and arguments of ``tl.fit``."""
    out = []
    for kind in (kind for kind in OURS if kind in args.models):
        for extra in args.fit_args:
            label = f"scuvae, {kind}" + (f", {json.dumps(extra)}" if extra else "")
            out.append((label, {"amortized": OURS[kind], **extra}))
    return out


def fit(
    data: Data, counts: sp.csr_matrix, seed: int, arguments: dict[str, Any]
) -> tuple[ad.AnnData, float]:
    """``tl.fit`` to counts of these cells, and its CPU seconds."""
    adata = data.with_counts(counts)
    options = {"likelihood": "nb", "batch_key": data.batch_key, **arguments}
    clock = Clock()
    scuvae.tl.fit(adata, rng=seed, progress=False, device="cpu", **options)
    return adata, clock.seconds()


def warm_up() -> None:
    """What a first call loads and compiles is nobody's time."""
    few = scuvae.datasets.pbmc68k_counts()[:300].copy()
    for amortized in OURS.values():
        scuvae.tl.fit(few, amortized=amortized, max_epochs=1, progress=False, device="cpu")


def our_map(adata: ad.AnnData, n_components: int = 15) -> np.ndarray:
    """``obsm["X_scuvae_embed"]``, by ``tl.embed`` if need be; before there was one, made here.

    Each gene's variance-stabilising coordinate 2 √θ asinh √(μ/θ) of means decoded at the posterior
    mean and the median total, averaged over batches, then principal components.
    """
    if "X_scuvae_embed" not in adata.obsm and hasattr(scuvae.tl, "embed"):
        scuvae.tl.embed(adata)
    if "X_scuvae_embed" in adata.obsm:
        return np.asarray(adata.obsm["X_scuvae_embed"])
    model = scuvae.get.model(adata).requires_grad_(False)
    theta = model.likelihood.log_theta.exp()
    z = torch.as_tensor(np.asarray(adata.obsm["X_scuvae"]))
    total = float(np.median(views.totals(adata.X)))
    offset = model.decoder.offset
    n_batches = 0 if offset is None else offset.weight.shape[1]
    told = [None] if not n_batches else list(torch.eye(n_batches))
    coordinates = np.zeros(adata.shape, np.float32)
    for start in range(0, len(z), 512):
        part = z[start : start + 512]
        for one in told:
            batch = None if one is None else one.expand(len(part), -1)
            eta = model.decoder(part, batch)
            mean = model.likelihood.mean(eta, torch.full((len(part),), total))
            v = 2 * theta.sqrt() * (mean / theta).sqrt().asinh()
            coordinates[start : start + 512] += v.numpy() / len(told)
    return views.pca(coordinates, n_components)


# --- SCVI ----------------------------------------------------------------------------------------


def row_name(model: str, args: argparse.Namespace) -> str:
    """A model's name in the cache."""
    other = model == "scvi" and args.scvi_likelihood != "nb"
    return f"scvi_{args.scvi_likelihood}" if other else model


# SCVI as it comes, and as its authors' integration tutorials set it.
SCVI_SETTINGS: dict[str, dict[str, Any]] = {
    "scvi": {},
    "scvi_tutorial": {"n_layers": 2, "n_latent": 30},
}


def scvi(
    data: Data, seed: int, *, half: sp.csr_matrix | None = None, setting: str = "scvi"
) -> dict[str, Any]:
    """SCVI of default epochs on all counts, or on a half of the molecules.

    ``latent``, its means; with a half ``profiles``, ``get_normalized_expression`` averaged over 16
    draws; ``cpu_s`` of its training, from the time of a few epochs. All cells train, as ``_scvi``
    has it; the KL warm-up of 400 epochs is inside a run of up to 20,000 cells.
    """
    likelihood = data.args.scvi_likelihood
    stem = row_name(setting, data.args) + ("" if half is None else "_half")

    def make() -> dict[str, Any]:
        counts = data.adata.X if half is None else half
        model, seconds = _train_scvi(data, counts, seed, likelihood, SCVI_SETTINGS[setting])
        out: dict[str, Any] = {"latent": model.get_latent_representation(), "cpu_s": seconds}
        if half is not None:
            parts = []
            for start in range(0, data.adata.n_obs, 1000):
                rows = np.arange(start, min(start + 1000, data.adata.n_obs))
                means = model.get_normalized_expression(
                    indices=rows, n_samples=_DRAWS, return_numpy=True
                )
                parts.append(np.asarray(means, np.float32))
            out["profiles"] = np.concatenate(parts)
        return out

    return data.keep(f"{stem}_seed{seed}", make)


def scanvi(data: Data, seed: int) -> dict[str, Any]:
    """scANVI's latent means, from the tutorial's SCVI, told all labels: its tutorial's settings."""

    def make() -> dict[str, Any]:
        setting = SCVI_SETTINGS["scvi_tutorial"]
        first, seconds = _train_scvi(data, data.adata.X, seed, "nb", setting)
        import scvi

        cells = data.with_counts(data.adata.X)
        cells.obs["label"] = data.labels
        clock = Clock()
        model = scvi.model.SCANVI.from_scvi_model(
            first, "none of these", labels_key="label", adata=cells
        )
        with _scvi_fast.fast():
            model.train(
                max_epochs=20,
                n_samples_per_label=100,
                accelerator="cpu",
                train_size=1.0,
                enable_progress_bar=False,
            )
        seconds += clock.seconds()
        return {"latent": model.get_latent_representation(), "cpu_s": seconds}

    return data.keep(f"scanvi_seed{seed}", make)


def _train_scvi(
    data: Data,
    counts: sp.csr_matrix,
    seed: int,
    likelihood: str,
    setting: dict[str, Any],
) -> tuple[Any, float]:
    import logging

    threads = torch.get_num_threads()
    warnings.filterwarnings("ignore", module="lightning")
    import scvi

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    scvi.settings.seed = seed
    torch.set_num_threads(threads)
    adata = data.with_counts(counts)
    scvi.model.SCVI.setup_anndata(adata, batch_key=data.batch_key)
    options = {**_scvi.MODEL, "gene_likelihood": likelihood, **setting}
    model = scvi.model.SCVI(adata, **options)
    epochs = _scvi.default_epochs(adata.n_obs)
    with _scvi_fast.fast():
        model.train(
            max_epochs=epochs,
            accelerator="cpu",
            train_size=1.0,
            early_stopping=False,
            enable_progress_bar=False,
        )
    # Its time is that of scvi-tools as it is, of a few epochs.
    return model, epochs * _scvi.seconds_per_epoch(adata, likelihood=likelihood, setting=setting)


# --- averages over neighbours --------------------------------------------------------------------


def neighbour_sums(half: sp.csr_matrix, near: np.ndarray) -> np.ndarray:
    """Profiles of each cell's molecules and its neighbours' together; ``near`` are their rows."""
    n, k = len(near), near.shape[1] + 1
    rows = np.repeat(np.arange(n), k)
    columns = np.concatenate([np.arange(n)[:, None], near], 1).ravel()
    sums = sp.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), (n, n)) @ half
    return views.as_profiles(sums.toarray())


def magic(half: sp.csr_matrix, t: int | str, seed: int, values: str) -> np.ndarray:
    """MAGIC's profiles: magic-impute with its defaults (knn 5, decay 1, exact), but for ``t``.

    ``values`` that are diffused: ``"sqrt"``, as its authors advise and Open Problems runs it, of
    counts divided by the cell's total, squared afterwards; ``"counts"``, the raw counts over the
    graph of these square roots, which weighs cells by their depth and keeps means means.
    """
    import magic as package

    size = np.maximum(views.totals(half), 1)
    roots = np.sqrt(np.asarray((sp.diags(1 / size) @ half).toarray(), np.float64))
    operator = package.MAGIC(t=t, random_state=seed, verbose=0, n_jobs=1)
    if values == "sqrt":
        smooth = np.asarray(operator.fit_transform(roots))
        return views.as_profiles(np.square(np.clip(smooth, 0, None)))
    operator.fit(roots)
    out = half.toarray().astype(np.float64)
    step = sp.csr_matrix(operator.graph.diff_op)
    for _ in range(int(t)):
        out = step @ out
    return views.as_profiles(out)


def harmony(points: np.ndarray, data: Data, seed: int) -> np.ndarray:
    """Harmony's coordinates of principal components, harmonypy's defaults."""
    import logging

    import harmonypy

    logging.getLogger("harmonypy").setLevel(logging.ERROR)
    found = harmonypy.run_harmony(
        np.asarray(points, np.float64),
        data.adata.obs,
        data.batch_key,
        random_state=seed,
        verbose=False,
    )
    out = np.asarray(found.Z_corr)
    return out if len(out) == len(points) else out.T
