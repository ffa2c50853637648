"""Encoders for finished decoders: the gap that ``tl.to_encoder`` leaves, and how it gets there.

    python tests/benchmarks/distil.py DATA.h5ad ... --seeds 0 1 2 --json out.json

An amortized fit beside an unamortized one and encoders distilled from it: as ``tl.to_encoder``
makes them, on the training cells alone, and without weight decay. The gap of held-out cells is to
the best q of full covariance, found from the encoder's q, for all; label accuracy is of the 15
nearest training cells among encoder means. CPU seconds of a distilled encoder come on top of its
fit's. One thread.
"""

import argparse
from typing import Any
from unittest import mock

import numpy as np
import torch
from _common import (
    Clock,
    cells_of,
    elbos,
    encoded,
    load,
    medians,
    name_of,
    neighbour_accuracy,
    platform_of,
    print_table,
    refined,
    write_json,
)
from anndata import AnnData

import scuvae
from scuvae.inference.refinement.refine import THOROUGH
from scuvae.inference.training.distillation import distil
from scuvae.model import VAE
from scuvae.tl import _to_encoder

COLUMNS = {
    "model": ("encoder", ""),
    "cpu_s": ("CPU s", ".1f"),
    "gap": ("held-out gap", ".2f"),
    "gap_training": ("training gap", ".2f"),
    "elbo": ("its ELBO", ".2f"),
    "elbo_refined": ("refined ELBO", ".2f"),
    "accuracy": ("label accuracy", ".3f"),
}
# What is left out of the recipe: keyword arguments of distil.
VARIANTS: dict[str, dict[str, float]] = {
    "distilled": {},
    "training cells alone": {"share_simulated": 0.0},
    "no weight decay": {"weight_decay": 0.0},
}


def row(
    name: str, seconds: float, model: VAE, adata: AnnData, key: str, labels: str
) -> dict[str, Any]:
    held_out = (adata.obs[f"{key}_split"] == "validation").to_numpy()
    out: dict[str, Any] = {"model": name, "cpu_s": seconds}
    for part, rows in (("", held_out), ("_training", ~held_out)):
        # As many training cells as are held out.
        cells = cells_of(adata[np.flatnonzero(rows)[: held_out.sum()]])
        first = encoded(model, cells)
        best = elbos(model, cells, refined(model, cells, first, prior=False, **THOROUGH)).mean()
        own = elbos(model, cells, first).mean()
        out |= {f"gap{part}": float(best - own)}
        if not part:
            out |= {"elbo": float(own), "elbo_refined": float(best)}
    with torch.no_grad():
        means = encoded(model, cells_of(adata)).mean.numpy()
    truth = adata.obs[labels].astype(str).to_numpy()
    out["accuracy"] = neighbour_accuracy(
        means[~held_out], truth[~held_out], means[held_out], truth[held_out]
    )
    return out


class Distilling:
    """``inference.distil.distil`` with some arguments replaced, and the seconds of its last call.

    ``tl.to_encoder`` also measures every cell's gap, which is no part of the training.
    """

    def __init__(self, options: dict[str, float]) -> None:
        self.options = options
        self.seconds = float("nan")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        clock = Clock()
        history = distil(*args, **(kwargs | self.options))
        self.seconds = clock.seconds()
        return history


def measure(data: str, args: argparse.Namespace) -> dict[str, Any]:
    adata = load(data, args.n_genes)
    print(f"\n## {name_of(data)}: {adata.n_obs} cells x {adata.n_vars} genes\n", flush=True)
    found: list[dict[str, Any]] = []
    for seed in args.seeds:
        options = {"likelihood": "nb", "rng": seed, "device": "cpu"}
        clock = Clock()
        scuvae.tl.fit(adata, amortized=True, key_added="amortized", **options)
        seconds = clock.seconds()
        model = scuvae.get.model(adata, key="amortized")
        found.append(row("amortized fit", seconds, model, adata, "amortized", args.labels))
        scuvae.tl.fit(adata, key_added="own", **options)
        for name in args.variants:
            distilling = Distilling(VARIANTS[name])
            with mock.patch.object(_to_encoder, "distil", distilling):
                scuvae.tl.to_encoder(adata, key="own", key_added="k", rng=seed, device="cpu")
            model = scuvae.get.model(adata, key="k")
            found.append(row(name, distilling.seconds, model, adata, "k", args.labels))
    table = medians(found, "model")
    print_table(table, COLUMNS)
    return {"data": name_of(data), "table": table, "rows": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("data", nargs="+", help="files of raw counts, or pbmc68k for the data that ships")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--n-genes", type=int, default=2000)
    add("--labels", default="cell_type", help="column of obs")
    add("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    add("--json", help="file for all figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = [measure(data, args) for data in args.data]
    arguments = {k: v for k, v in vars(args).items() if k != "json"}
    write_json(args.json, {"arguments": arguments, "platform": platform_of(), "results": results})


if __name__ == "__main__":
    main()
