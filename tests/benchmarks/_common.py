"""What the benchmarks share: data, splits, clocks, one evaluation for all models, tables."""

# ruff: noqa: E402

import os

# Before torch and numba are imported: one thread, so that CPU time is the time of one core.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import torch
from scipy import sparse as sp

from scuvae.batches import Cells
from scuvae.batches.sources.registry import source_of
from scuvae.distributions.gaussian import Gaussian, concatenate
from scuvae.inference.evaluation.importance_sampling import draw_weights, log_mean
from scuvae.inference.posteriors.objectives import elbo
from scuvae.inference.refinement.initialization import likeliest_start
from scuvae.inference.refinement.refine import THOROUGH, refine
from scuvae.model import VAE

torch.set_num_threads(1)

# Cells that an evaluation takes at once: draws × cells × genes stay in a core's cache.
_CHUNK = 64
_DRAWS_AT_ONCE = 10
# Cells that are simulated at once.
_BLOCK = 10_000


# --- data ----------------------------------------------------------------------------------------


def load(data: str, n_genes: int = 2000) -> ad.AnnData:
    """Counts of a file's most variable genes (``seurat_v3``), or of all where there are fewer.

    ``data`` is a path, or ``"pbmc68k"`` for :func:`scuvae.datasets.pbmc68k_counts`. Genes are
    chosen over all cells; cells without a count in them are left out.
    """
    import scanpy as sc

    import scuvae

    full = scuvae.datasets.pbmc68k_counts() if data == "pbmc68k" else ad.read_h5ad(data)
    if full.n_vars > n_genes:
        sc.pp.highly_variable_genes(full, flavor="seurat_v3", n_top_genes=n_genes)
        full = full[:, full.var["highly_variable"]]
    counts = sp.csr_matrix(full.X, dtype=np.float32)
    adata = ad.AnnData(counts, obs=full.obs.copy(), var=full.var[[]].copy())
    return adata[np.asarray(counts.sum(1)).ravel() > 0].copy()


def simulated(n_obs: int, n_vars: int, density: float, seed: int = 0) -> sp.csr_matrix:
    """Counts with three programmes and about this share of nonzeros, made a block at a time.

    Of every cell the genes are drawn that are there, by their weights, then their counts: nothing
    of the matrix is ever dense, and its arrays are made once (int32 indices, float32 counts).
    """
    weights = np.random.default_rng(seed).gamma(0.5, size=(3, n_vars)) + 0.05
    edges = np.cumsum(weights / weights.sum(1, keepdims=True), axis=1)
    # Some of the draws meet in one gene: with so many, the share is about right.
    draws = _draws_for(weights / weights.sum(1, keepdims=True), density)

    def block(start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng([seed, start])
        n = min(_BLOCK, n_obs - start)
        kind = rng.integers(3, size=n)
        size = np.maximum(1, rng.normal(draws, 0.2 * draws, n).astype(np.int64))
        row = np.repeat(np.arange(n), size)
        gene = np.empty(len(row), np.int64)
        for k in range(3):
            mine = kind[row] == k
            gene[mine] = np.searchsorted(edges[k], rng.random(int(mine.sum())) * edges[k, -1])
        key, count = np.unique(row * n_vars + np.minimum(gene, n_vars - 1), return_counts=True)
        column, value = (key % n_vars).astype(np.int32), count.astype(np.float32)
        return np.bincount(key // n_vars, minlength=n), column, value

    with ThreadPoolExecutor() as pool:  # numpy lets go of the interpreter for most of it
        blocks = list(pool.map(block, range(0, n_obs, _BLOCK)))
    lengths, columns, values = zip(*blocks, strict=True)
    starts = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    index = np.int32 if starts[-1] < 2**31 else np.int64
    return sp.csr_matrix(
        (np.concatenate(values), np.concatenate(columns), starts.astype(index)),
        shape=(n_obs, n_vars),
        copy=False,
    )


def _draws_for(shares: np.ndarray, density: float) -> float:
    """How many draws of genes leave ``density`` of them with a count, by bisection."""
    low, high = 0.0, 1e7
    for _ in range(60):
        middle = 0.5 * (low + high)
        found = -np.expm1(-middle * shares).mean()
        low, high = (middle, high) if found < density else (low, middle)
    return 0.5 * (low + high)


def name_of(data: str) -> str:
    return Path(data).stem


def split(adata: ad.AnnData, seed: int, held_out: float = 0.2) -> tuple[ad.AnnData, ad.AnnData]:
    """Training and held-out cells: the same for a seed, whatever the model."""
    order = np.random.default_rng(seed).permutation(adata.n_obs)
    n = round(adata.n_obs * held_out)
    return adata[np.sort(order[n:])].copy(), adata[np.sort(order[:n])].copy()


def cells_of(adata: ad.AnnData) -> Cells:
    return Cells(source_of(adata.X, torch.device("cpu")))


# --- clocks --------------------------------------------------------------------------------------


def seconds_now(device: str = "cpu") -> float:
    """CPU seconds of this process; for a GPU wall seconds, once it has done what it was given."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class Clock:
    """Seconds as above since it was made, less those spent inside ``paused()``."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.started, self.excluded = seconds_now(device), 0.0

    def seconds(self) -> float:
        return seconds_now(self.device) - self.started - self.excluded

    @contextmanager
    def paused(self) -> Iterator[None]:
        before = seconds_now(self.device)
        try:
            yield
        finally:
            self.excluded += seconds_now(self.device) - before


# --- evaluation: the same code for every model ---------------------------------------------------


def rows_of(q: Gaussian, rows: torch.Tensor) -> Gaussian:
    return q.as_family("full")[rows]


def _batches(cells: Cells, size: int) -> Any:
    return cells.loader(torch.arange(len(cells)), size)


@torch.no_grad()
def encoded(model: VAE, cells: Cells) -> Gaussian | None:
    """The encoder's q as a full Gaussian, or None where there is no encoder."""
    if model.encoder is None:
        return None
    parts = [model.encode(batch).as_family("full") for batch in _batches(cells, 512)]
    return concatenate(parts)


@torch.no_grad()
def refined(
    model: VAE, cells: Cells, *starts: Gaussian | None, prior: bool = True, **options: Any
) -> Gaussian:
    """Full-covariance q after natural steps from the starts and the prior: each cell's best."""
    parts = []
    for batch in _batches(cells, 512):
        first = [rows_of(q, batch.index) for q in starts if q is not None]
        if prior or not first:
            first.append(likeliest_start(model, batch, "full"))
        parts.append(refine(model, batch, first, **options))
    return concatenate(parts)


@torch.no_grad()
def elbos(model: VAE, cells: Cells, q: Gaussian, n_draws: int = 100) -> np.ndarray:
    """Each cell's ELBO in nats, the KL analytic, over independent draws (the same seed always)."""
    out = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for batch in _batches(cells, _CHUNK):
            part, total, done = rows_of(q, batch.index), torch.zeros(len(batch)), 0
            while done < n_draws:
                n = min(_DRAWS_AT_ONCE, n_draws - done)
                total += n * elbo(model, batch, part, n).elbo
                done += n
            out.append(total / n_draws)
    return torch.cat(out).double().numpy()


@torch.no_grad()
def evidence(model: VAE, cells: Cells, q: Gaussian, n_draws: int = 100) -> np.ndarray:
    """Each cell's importance-weighted bound on log p(x) in nats."""
    out = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for batch in _batches(cells, _CHUNK):
            part = rows_of(q, batch.index)
            weights = draw_weights(model, batch, [part], n_draws)[0].log_weight
            out.append(log_mean(weights)[0])
    return torch.cat(out).double().numpy()


def held_out_scores(model: VAE, cells: Cells) -> tuple[dict[str, float], Gaussian]:
    """Mean ELBO of the encoder's q and of the refined q, and the bound at the refined q."""
    first = encoded(model, cells)
    best = refined(model, cells, first, **THOROUGH)
    scores = {
        "elbo_encoder": float("nan") if first is None else elbos(model, cells, first).mean(),
        "elbo_refined": elbos(model, cells, best).mean(),
        "evidence": evidence(model, cells, best).mean(),
    }
    return {name: float(value) for name, value in scores.items()}, best


def curve(
    points: Sequence[tuple[int, float, Callable[[], VAE]]],
    cells: Cells,
    *,
    refine_q: bool,
    n_draws: int = 20,
) -> list[dict[str, float]]:
    """Held-out ELBO at each (epoch, CPU seconds, model): of refined q, or of the encoder's.

    A refined q starts at the one of the point before, which spares steps.
    """
    out, q = [], None
    for epoch, seconds, make in points:
        model = make()
        q = refined(model, cells, q, prior=q is None) if refine_q else encoded(model, cells)
        value = float(elbos(model, cells, q, n_draws).mean())
        out.append({"epoch": epoch, "cpu_s": seconds, "elbo": value})
    return out


def seconds_until(points: Sequence[dict[str, float]], target: float) -> float:
    """CPU seconds at the first point that is no lower than ``target``; NaN if there is none."""
    return next((p["cpu_s"] for p in points if p["elbo"] >= target), float("nan"))


# --- embeddings ----------------------------------------------------------------------------------


def neighbour_accuracy(
    train: np.ndarray, labels: np.ndarray, held_out: np.ndarray, truth: np.ndarray, k: int = 15
) -> float:
    """Share of held-out cells whose label most of their ``k`` nearest training cells carry."""
    from sklearn.neighbors import KNeighborsClassifier

    guess = KNeighborsClassifier(k).fit(train, labels).predict(held_out)
    return float((guess == truth).mean())


def clustering(embedding: np.ndarray, labels: np.ndarray, resolution: float) -> dict[str, float]:
    """Leiden clusters of scanpy's neighbour graph against labels."""
    import scanpy as sc
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    adata = ad.AnnData(obsm={"X": embedding})
    sc.pp.neighbors(adata, use_rep="X", random_state=0)
    sc.tl.leiden(
        adata,
        resolution=resolution,
        flavor="igraph",
        n_iterations=2,
        directed=False,
        random_state=0,
    )
    found = adata.obs["leiden"].to_numpy()
    return {
        "clusters": float(len(np.unique(found))),
        "ari": float(adjusted_rand_score(labels, found)),
        "nmi": float(normalized_mutual_info_score(labels, found)),
    }


# --- tables --------------------------------------------------------------------------------------


def medians(rows: Sequence[dict[str, Any]], by: str) -> list[dict[str, Any]]:
    """One row for each value of ``by``, in order: medians, and the spread of several seeds."""
    out = []
    for value in dict.fromkeys(row[by] for row in rows):
        group = [row for row in rows if row[by] == value]
        merged: dict[str, Any] = {by: value, "seeds": len(group)}
        for name in group[0]:
            numbers = [row[name] for row in group if isinstance(row.get(name), float)]
            numbers = [number for number in numbers if not np.isnan(number)]
            if numbers:
                merged[name] = float(np.median(numbers))
                merged[f"{name}_range"] = [min(numbers), max(numbers)]
        out.append(merged)
    return out


def print_table(rows: Sequence[dict[str, Any]], columns: dict[str, tuple[str, str]]) -> None:
    """Markdown; ``columns`` maps a key to its heading and number format."""
    lines = [[heading for heading, _ in columns.values()]]
    for row in rows:
        lines.append([_cell(row, name, form) for name, (_, form) in columns.items()])
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for i, line in enumerate(lines):
        print("| " + " | ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)) + " |")
        if i == 0:
            print("|" + "|".join("-" * (w + 2) for w in widths) + "|")
    print(flush=True)


def _cell(row: dict[str, Any], name: str, form: str) -> str:
    value = row.get(name)
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return ""
    text = format(value, form)
    low_high = row.get(f"{name}_range")
    if low_high and row["seeds"] > 1:
        text += f" ({format(low_high[0], form)} to {format(low_high[1], form)})"
    return text


def platform_of(device: str = "cpu") -> dict[str, str]:
    """What the figures were measured with."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "cpu": platform.processor()}
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        found["cpu"] = lines[0].split(":")[1].strip() if lines else found["cpu"]
    if device != "cpu":
        found["gpu"] = torch.cuda.get_device_name()
    for name in ("torch", "scvi-tools", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_json(path: str | None, content: Any) -> None:
    if path:
        Path(path).write_text(json.dumps(content, indent=1, allow_nan=True) + "\n")
