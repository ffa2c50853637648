"""Labels of held-out cells and their probabilities: right, calibrated, and refused where unsure.

    python tests/benchmarks/labels.py --set pbmc68k DATA.h5ad ... --seed 0 1 2 --cache DIR

Each set is split into reference and held-out cells (a fifth, by the seed); sets of more than
``--cells`` cells are subsampled once. Held-out cells come with all genes, with a quarter of them
(drawn at random for each seed) and, of all genes, thinned binomially to 100 counts each. Metrics
are Open Problems' accuracy and macro F1, the expected calibration error (15 equal bins, answers of
all seeds together, since of n answers even exact probabilities have an error of some 1/√n), mean
nats, and the accuracy of the surest nine and seven cells in ten (the rejection curve).

Ours: ``tl.transfer_labels``, and the votes alone (``calibrate=False``). Others are told the
condition too: they are trained on the observed genes, but on cells of full depth. Logistic
regression as in missing_genes.py; a linear SVM with Platt's probabilities (``--methods svm``, the
SVM with rejection of Abdelaal et al. 2019); SCVI's latent means of both kinds of cells and their 15
nearest neighbours, zeros where genes are missing; scANVI on that SCVI with its own probabilities.
"""

import argparse
import warnings
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
from _common import Clock, load, name_of, platform_of, print_table, split, write_json
from scipy import sparse as sp

import scuvae
from scuvae._reliability import expected_calibration_error, reliability

_NEIGHBOURS = 15
_COUNTS = 100
CONDITIONS = ("all genes", "a quarter of the genes", f"{_COUNTS} counts")


class Bench:
    """One set and seed: reference, held-out cells under each condition, and the models."""

    def __init__(self, adata: ad.AnnData, data: str, seed: int, args: argparse.Namespace) -> None:
        self.name, self.seed, self.args = name_of(data), seed, args
        self.reference, self.new = split(adata, seed)
        self.kinds, self.code = np.unique(
            self.reference.obs[args.label].astype(str).to_numpy(), return_inverse=True
        )
        truth = self.new.obs[args.label].astype(str).to_numpy()
        self.new = self.new[np.isin(truth, self.kinds)].copy()
        self.truth = np.searchsorted(self.kinds, truth[np.isin(truth, self.kinds)])
        self.kept = np.random.default_rng([seed, 1]).permutation(adata.n_vars)
        self.kept = np.sort(self.kept[: adata.n_vars // 4])

    def query(self, condition: str) -> ad.AnnData:
        if condition == CONDITIONS[1]:
            return self.new[:, self.kept].copy()
        out = self.new.copy()
        if condition == CONDITIONS[2]:
            rng, x = np.random.default_rng([self.seed, 2]), sp.csr_matrix(out.X)
            chance = np.minimum(1, _COUNTS / np.maximum(np.asarray(x.sum(1)).ravel(), 1))
            x.data = rng.binomial(x.data.astype(int), np.repeat(chance, np.diff(x.indptr)))
            x.eliminate_zeros()
            out.X = x.astype(np.float32)
        return out

    @cached_property
    def fitted(self) -> ad.AnnData:
        path = self._path("scuvae", f"_{scuvae.__version__}.h5ad")
        if path and path.exists():
            found = ad.read_h5ad(path)
            if found.obs_names.equals(self.reference.obs_names):
                return found
        out = self.reference.copy()
        scuvae.tl.fit(out, likelihood="nb", rng=self.seed, device="cpu", progress=False)
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            out.write_h5ad(path)
        return out

    def _path(self, what: str, end: str) -> Path | None:
        if not self.args.cache:
            return None
        stem = f"labels_{what}_{self.name}_{self.reference.n_obs}_seed{self.seed}"
        return Path(self.args.cache) / f"{stem}{end}"

    @cached_property
    def scvi(self) -> Any:
        """SCVI, told of labels for scANVI: scvi-tools' epochs, at most ``--scvi-epochs``."""
        import _scvi
        import scvi
        import torch

        threads = torch.get_num_threads()
        scvi.settings.seed = self.seed
        torch.set_num_threads(threads)
        folder = self._path("scvi", "")
        adata = self.reference.copy()
        adata.obs["of"] = adata.obs[self.args.label].astype(str).astype("category")
        scvi.model.SCVI.setup_anndata(adata, labels_key="of")
        if folder and folder.exists():
            return scvi.model.SCVI.load(folder, adata, accelerator="cpu")
        model = scvi.model.SCVI(adata, **_scvi.MODEL)
        epochs = min(_scvi.default_epochs(adata.n_obs), self.args.scvi_epochs)
        model.train(epochs, accelerator="cpu", train_size=1.0, enable_progress_bar=False)
        if folder:
            model.save(folder, save_anndata=False)
        return model

    def filled(self, adata: ad.AnnData) -> ad.AnnData:
        """Over all genes, zeros where there are none."""
        wide = sp.lil_matrix((adata.n_obs, self.reference.n_vars), dtype=np.float32)
        wide[:, self.reference.var_names.get_indexer(adata.var_names)] = adata.X
        out = ad.AnnData(sp.csr_matrix(wide), obs=adata.obs[[]].copy(), var=self.reference.var[[]])
        out.obs["of"] = self.kinds[0]
        out.obs["of"] = out.obs["of"].astype("category").cat.set_categories(self.kinds)
        return out


# Held-out cells → probabilities, (cells, kinds), those of the reference in order.
Method = Callable[[Bench, ad.AnnData], np.ndarray]


def by_scuvae(bench: Bench, query: ad.AnnData, calibrate: bool = True) -> np.ndarray:
    new = query.copy()
    scuvae.tl.transfer_labels(
        new, bench.fitted, labels=bench.args.label, calibrate=calibrate, device="cpu"
    )
    categories = list(new.obs["scuvae_label"].cat.categories.astype(str))
    if calibrate:
        table = new.obsm["scuvae_label_probabilities"].to_numpy(dtype=float)
        return table[:, [categories.index(kind) for kind in bench.kinds]]
    # The rest of the share is spread evenly: only the first label and its share are judged.
    n = len(bench.kinds)
    top = new.obs["scuvae_label_share"].to_numpy(dtype=float)[:, None]
    found = np.repeat((1 - top) / (n - 1), n, 1)
    label = np.searchsorted(bench.kinds, new.obs["scuvae_label"].astype(str))
    found[np.arange(len(found)), label] = top[:, 0]
    return found


def _profiles(adata: ad.AnnData, share: float) -> np.ndarray:
    total = np.maximum(np.asarray(adata.X.sum(1)).reshape(-1, 1), 1)
    return np.log1p(adata.X.toarray() * (1e4 * share / total))


def _scaled(bench: Bench, query: ad.AnnData) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.preprocessing import StandardScaler

    share = query.n_vars / bench.reference.n_vars
    scaler = StandardScaler()
    x = scaler.fit_transform(_profiles(bench.reference[:, query.var_names], share))
    return x, scaler.transform(_profiles(query, share))


def by_regression(bench: Bench, query: ad.AnnData) -> np.ndarray:
    from sklearn.linear_model import LogisticRegression

    x, new = _scaled(bench, query)
    model = LogisticRegression(C=2 / query.n_vars, max_iter=200).fit(x, bench.code)
    return np.asarray(model.predict_proba(new))


def by_svm(bench: Bench, query: ad.AnnData) -> np.ndarray:
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.svm import LinearSVC

    x, new = _scaled(bench, query)
    folds = int(min(5, max(2, np.bincount(bench.code).min())))
    model = CalibratedClassifierCV(LinearSVC(), cv=folds).fit(x, bench.code)
    return np.asarray(model.predict_proba(new))


def by_scvi(bench: Bench, query: ad.AnnData) -> np.ndarray:
    from sklearn.neighbors import KNeighborsClassifier

    reference = bench.scvi.get_latent_representation()
    knn = KNeighborsClassifier(_NEIGHBOURS).fit(reference, bench.code)
    return np.asarray(knn.predict_proba(bench.scvi.get_latent_representation(bench.filled(query))))


def by_scanvi(bench: Bench, query: ad.AnnData) -> np.ndarray:
    import scvi

    if not hasattr(bench, "scanvi"):
        found = scvi.model.SCANVI.from_scvi_model(bench.scvi, unlabeled_category="unknown")
        found.train(20, accelerator="cpu", enable_progress_bar=False)
        bench.scanvi = found  # type: ignore[attr-defined]
    soft = bench.scanvi.predict(bench.filled(query), soft=True)
    return soft[list(bench.kinds)].to_numpy(dtype=float)


METHODS: dict[str, Method] = {
    "tl.transfer_labels": by_scuvae,
    "votes alone": lambda bench, query: by_scuvae(bench, query, False),
    "logistic regression": by_regression,
    "linear SVM, Platt": by_svm,
    "SCVI, 15 nearest": by_scvi,
    "scANVI": by_scanvi,
}
GROUPS = {
    "ours": ["tl.transfer_labels", "votes alone"],
    "regression": ["logistic regression"],
    "svm": ["linear SVM, Platt"],
    "scvi": ["SCVI, 15 nearest"],
    "scanvi": ["scANVI"],
}


# --- what is judged ------------------------------------------------------------------------------


def macro_f1(found: np.ndarray, truth: np.ndarray) -> float:
    """Mean over kinds that are there or were given, as scikit-learn has it."""
    scores = []
    for kind in np.union1d(found, truth):
        both = ((found == kind) & (truth == kind)).sum()
        scores.append(2 * both / ((found == kind).sum() + (truth == kind).sum()))
    return float(np.mean(scores))


def judged(answers: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Of the probabilities and the truth of each seed."""
    sure = np.concatenate([p.max(1) for p, _ in answers])
    right = np.concatenate([p.argmax(1) == truth for p, truth in answers])
    nats = [np.log(np.maximum(p[np.arange(len(t)), t], 1e-6)) for p, t in answers]
    order = np.argsort(-sure, kind="stable")
    kept = {share: right[order[: round(share * len(order))]].mean() for share in (0.9, 0.7)}
    return {
        "accuracy": float(np.mean([(p.argmax(1) == t).mean() for p, t in answers])),
        "f1": float(np.mean([macro_f1(p.argmax(1), t) for p, t in answers])),
        "ece": expected_calibration_error(reliability(sure, right)),
        "over": float(sure.mean() - right.mean()),
        "nats": float(np.mean(np.concatenate(nats))),
        "surest_90": float(kept[0.9]),
        "surest_70": float(kept[0.7]),
        "n": len(right),
    }


COLUMNS: dict[str, tuple[str, str]] = {
    "method": ("method", ""),
    "accuracy": ("accuracy", ".3f"),
    "f1": ("macro F1", ".3f"),
    "ece": ("ECE", ".3f"),
    "over": ("over-confident by", "+.3f"),
    "nats": ("nats", ".3f"),
    "surest_90": ("surest 90 %", ".3f"),
    "surest_70": ("surest 70 %", ".3f"),
    "cpu_s": ("CPU s", ".1f"),
}


def measure(data: str, args: argparse.Namespace) -> dict[str, Any]:
    adata = load(data, args.n_genes)
    if adata.n_obs > args.cells:
        rows = np.random.default_rng(0).choice(adata.n_obs, args.cells, replace=False)
        adata = adata[np.sort(rows)].copy()
    print(f"\n## {name_of(data)}: {adata.n_obs} cells x {adata.n_vars} genes\n", flush=True)
    methods = [name for group in args.methods for name in GROUPS[group]]
    answers: dict[tuple[str, str], list[tuple[np.ndarray, np.ndarray]]] = {}
    seconds: dict[tuple[str, str], list[float]] = {}
    for seed in args.seed:
        bench = Bench(adata, data, seed, args)
        for name in methods:
            for condition in CONDITIONS:
                query = bench.query(condition)
                clock = Clock()
                found = METHODS[name](bench, query)
                seconds.setdefault((condition, name), []).append(clock.seconds())
                answers.setdefault((condition, name), []).append((found, bench.truth))
    tables = {}
    for condition in CONDITIONS:
        rows = [
            {
                "method": name,
                **judged(answers[condition, name]),
                "cpu_s": float(np.median(seconds[condition, name])),
            }
            for name in methods
        ]
        print(f"\n{name_of(data)}, {condition}, {rows[0]['n']} answers, seeds {args.seed}\n")
        print_table(rows, COLUMNS)
        tables[condition] = rows
    return {"data": name_of(data), "tables": tables}


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--set", nargs="+", default=["pbmc68k"], help="files of raw counts, or pbmc68k")
    add("--seed", type=int, nargs="+", default=[0, 1, 2], help="of split, genes, thinning, fits")
    add("--cells", type=int, default=5000, help="of larger sets, so many")
    add("--n-genes", type=int, default=2000)
    add("--label", default="cell_type", help="column of obs with labels")
    add("--scvi-epochs", type=int, default=400, help="at most")
    add("--methods", nargs="+", default=["ours", "regression", "svm"], choices=list(GROUPS))
    add("--cache", help="folder for our fits and SCVI's")
    add("--json", help="file for all figures")
    args = parser.parse_args()
    results = []
    for data in args.set:
        results.append(measure(data, args))
        arguments = {k: v for k, v in vars(args).items() if k not in ("json", "cache")}
        write_json(
            args.json, {"arguments": arguments, "platform": platform_of(), "results": results}
        )


if __name__ == "__main__":
    main()
