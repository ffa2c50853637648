"""Time of an epoch and peak memory by the number of cells: simulated sparse counts × 2,000 genes.

    python tests/benchmarks/scaling.py --cells 1000 10000 100000 1000000 --json out.json
    python tests/benchmarks/scaling.py --cells 100000 1000000 --store memory h5ad zarr --held-out .1
    python tests/benchmarks/scaling.py --cells 100000 --store h5ad scvi    # SCVI from that file

Each size is a process of its own, so that its peak resident memory is its own: it reads the matrix
that this one simulated by blocks, then calls ``tl.fit``. The time of an epoch is that of the
training loop; the start by PCA and the final posteriors have columns of theirs. Seconds are CPU
seconds, on a GPU wall seconds; cells a second are by wall time. With ``--store`` the same matrix is
read from files too, which the system has in its cache.
"""

import argparse
import importlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from _common import Clock, platform_of, print_table, simulated, write_json
from scipy import sparse as sp

COLUMNS = {
    "cells": ("cells", ",d"),
    "store": ("from", ""),
    "nonzeros": ("nonzeros", ".2e"),
    "epoch_s": ("s an epoch", ".2f"),
    "us_per_cell": ("µs a cell", ".1f"),
    "growth": ("/ that of 10⁴", ".2f"),
    "epochs": ("epochs", "d"),
    "train_s": ("training, s", ".1f"),
    "whole_s": ("whole fit, s", ".1f"),
    "start_s": ("start", ".1f"),
    "final_s": ("final q", ".1f"),
    "matrix_mb": ("CSR, MB", ".0f"),
    "before_mb": ("before the fit, MB", ".0f"),
    "peak_mb": ("peak, MB", ".0f"),
    "bound_mb": ("1.3 × bound, MB", ".0f"),
    "share": ("peak / bound", ".2f"),
    "per_s": ("cells a second", ",.0f"),
    "elbo": ("held-out ELBO", ".2f"),
    "gpu_mb": ("on the GPU, MB", ".0f"),
}
N_LATENT = 10
ARRAYS = ("data", "indices", "indptr")


class Trained(Exception):
    """The training loop is over, and nobody asked for the final posteriors."""


def one_size(folder: str, args: argparse.Namespace) -> dict[str, Any]:
    """Fit the matrix in ``folder``, and say what it took; to be called in a fresh process."""
    import anndata as ad

    import scuvae
    from scuvae.inference.training.loop import train

    run = importlib.import_module("scuvae.inference.training.fit")
    store = args.store[0]
    if store == "scvi":
        return scvi_tools(folder, args)
    if store == "memory":
        arrays = [np.load(Path(folder) / f"{name}.npy") for name in ARRAYS]
        x = sp.csr_matrix(tuple(arrays), shape=(len(arrays[2]) - 1, args.genes), copy=False)
        adata = ad.AnnData(x)
        del arrays, x
    elif store == "h5ad":
        adata = ad.read_h5ad(Path(folder) / "x.h5ad", backed="r")
    else:
        import zarr
        from anndata.io import sparse_dataset

        adata = ad.AnnData(sparse_dataset(zarr.open(f"{folder}/x.zarr", mode="r")["X"]))
    n_cells = adata.n_obs
    starts = np.load(Path(folder) / "indptr.npy", mmap_mode="r")
    nnz = int(starts[-1])
    before = _peak_mb()
    matrix = nnz * 8 + starts.nbytes
    clock = Clock(args.device)
    marks: dict[str, Any] = {"epochs": [], "walls": []}

    def traced(*positional: Any, **named: Any) -> Any:
        theirs = named.pop("on_epoch")

        def on_epoch(row: dict[str, float]) -> None:
            theirs(row)
            marks["epochs"].append(clock.seconds())
            marks["walls"].append(time.perf_counter())

        marks["walls"].append(time.perf_counter())
        marks["start"] = clock.seconds()
        found = train(*positional, on_epoch=on_epoch, **named)
        marks["end"] = clock.seconds()
        marks["elbo"] = max(row["validation_elbo"] for row in found)
        if args.no_final:
            raise Trained
        return found

    light = [
        patch.object(run, "refine", partial(run.refine, max_steps=1)),
        patch.object(run, "DENOISING_DRAWS", 1),
    ]
    with ExitStack() as stack:
        for changed in light if args.light_final else ():
            stack.enter_context(changed)
        stack.enter_context(patch("scuvae.tl._fit.train", traced))
        stack.enter_context(suppress(Trained))
        scuvae.tl.fit(
            adata,
            amortized={"unamortized": False, "amortized": True, "semi": "semi"}[args.inference],
            likelihood="nb",
            n_latent=N_LATENT,
            max_epochs=args.max_epochs or None,
            # Nothing is held out by default: the epochs are those of training alone.
            validation_fraction=args.held_out,
            early_stopping=args.held_out > 0,
            device=args.device,
            progress=False,
        )
    whole = clock.seconds()
    table = 4 * n_cells * (N_LATENT + N_LATENT * (N_LATENT + 1) // 2)
    if args.inference == "amortized":
        table = 4 * n_cells * 2 * N_LATENT
    peak = _peak_mb()
    # The CSR, the posterior table and its moments (as many numbers again), and 500 MB.
    bound = 1.3 * ((matrix + 2 * table) / 1e6 + 500)
    epochs = np.diff([marks["start"], *marks["epochs"]])
    return {
        "cells": n_cells,
        "store": store,
        "nonzeros": float(nnz),
        "per_s": n_cells * (1 - args.held_out) / float(np.median(np.diff(marks["walls"]))),
        "elbo": marks["elbo"],
        "epoch_s": float(np.median(epochs)),
        "us_per_cell": 1e6 * float(np.median(epochs)) / n_cells,
        "whole_s": whole,
        "start_s": marks["start"],
        "final_s": whole - marks["end"],
        "epochs": len(epochs),
        "train_s": marks["end"] - marks["start"],
        "gpu_mb": 0.0 if args.device == "cpu" else torch.cuda.max_memory_allocated() / 1e6,
        "matrix_mb": matrix / 1e6,
        "before_mb": before,
        "peak_mb": peak,
        "bound_mb": bound,
        "share": peak / bound,
    }


def scvi_tools(folder: str, args: argparse.Namespace) -> dict[str, Any]:
    """The epochs of scvi-tools' SCVI on the same .h5ad file, backed, by its own training plan."""
    import anndata as ad
    import scvi
    from lightning.pytorch.callbacks import Callback

    adata = ad.read_h5ad(Path(folder) / "x.h5ad", backed="r")
    nnz = int(np.load(Path(folder) / "indptr.npy", mmap_mode="r")[-1])
    before = _peak_mb()
    clock = Clock(args.device)
    seconds, walls = [], []

    class Marks(Callback):
        def mark(self, *_: Any) -> None:
            seconds.append(clock.seconds())
            walls.append(time.perf_counter())

        on_train_start = on_train_epoch_end = mark

    scvi.settings.seed = 0
    scvi.model.SCVI.setup_anndata(adata)
    model = scvi.model.SCVI(adata, n_latent=N_LATENT, gene_likelihood="nb")
    model.train(
        max_epochs=args.max_epochs,
        accelerator="cpu" if args.device == "cpu" else "gpu",
        train_size=1 - args.held_out,
        check_val_every_n_epoch=args.max_epochs + 1,
        enable_progress_bar=False,
        callbacks=[Marks()],
    )
    epoch = float(np.median(np.diff(seconds)))
    return {
        "cells": adata.n_obs,
        "store": "h5ad, scvi-tools",
        "nonzeros": float(nnz),
        "per_s": adata.n_obs * (1 - args.held_out) / float(np.median(np.diff(walls))),
        "epoch_s": epoch,
        "us_per_cell": 1e6 * epoch / adata.n_obs,
        "start_s": seconds[0],
        "epochs": len(seconds) - 1,
        "before_mb": before,
        "peak_mb": _peak_mb(),
    }


def _peak_mb() -> float:
    """Peak resident memory; Linux's ru_maxrss has that of the process which started this one."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(ln for ln in status.read_text().splitlines() if ln.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _write(folder: Path, n_cells: int, args: argparse.Namespace) -> None:
    """The matrix as plain arrays, and as the files that are asked for."""
    import anndata as ad

    x = simulated(n_cells, args.genes, args.density)
    for name in ARRAYS:
        np.save(folder / f"{name}.npy", getattr(x, name))
    if {"h5ad", "scvi"} & set(args.store):
        ad.AnnData(x).write_h5ad(folder / "x.h5ad")
    if "zarr" in args.store:
        ad.AnnData(x).write_zarr(folder / "x.zarr")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--cells", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    add("--genes", type=int, default=2000)
    add("--density", type=float, default=0.08)
    add("--inference", default="unamortized", choices=["unamortized", "amortized", "semi"])
    add("--max-epochs", type=int, default=2, help="0: those of tl.fit's default")
    add("--held-out", type=float, default=0.0, help="share, by which training is stopped early")
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--store", nargs="+", default=["memory"], choices=["memory", "h5ad", "zarr", "scvi"])
    add("--no-final", action="store_true", help="stop after training, without the final q")
    text = "one local step a cell and one draw for genes' totals: the final q's memory alone"
    add("--light-final", action="store_true", help=text)
    add("--one", help="the matrix in this folder alone, as JSON: what each process does")
    add("--json", help="file for all figures")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one_size(args.one, args)))
        return
    rows = []
    for n_cells in args.cells:
        with tempfile.TemporaryDirectory() as folder:
            _write(Path(folder), n_cells, args)
            for store in args.store:
                command = [sys.executable, __file__, "--one", folder, "--store", store]
                for name in ("genes", "density", "inference", "max_epochs", "held_out", "device"):
                    command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
                command += ["--no-final"] * args.no_final + ["--light-final"] * args.light_final
                found = subprocess.run(command, stdout=subprocess.PIPE, check=True)
                rows.append(json.loads(found.stdout.decode().splitlines()[-1]))
                print(f"{n_cells} cells, {store}: {rows[-1]['epoch_s']:.2f} s an epoch", flush=True)
    reference = next((row for row in rows if row["cells"] == 10_000), rows[0])
    for row in rows:
        row["growth"] = row["us_per_cell"] / reference["us_per_cell"]
    print()
    print_table(rows, COLUMNS)
    write_json(
        args.json, {"platform": platform_of(args.device), "arguments": vars(args), "rows": rows}
    )


if __name__ == "__main__":
    main()
