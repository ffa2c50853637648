"""Cells added to a finished fit, beside a fit of all from the start.

    python tests/benchmarks/growing.py pbmc68k DATA.h5ad --seeds 0 1
    python tests/benchmarks/growing.py DATA.h5ad --batch-key batch --epochs .15 .3 --rates .5 1

A seventh of the cells is nobody's: decoders are judged by the ELBO of these cells, projected and
scored. Of the others a half is fitted (with ``--batch-key`` all batches but the last, or but
``--new``), and the rest added: with the decoder as it is, and trained on for shares of the default
epochs with shares of the default step size. ``known`` and ``new`` are the judges from the half's
batches, or all, and from the new batch. CPU seconds are of the call alone.
"""

import argparse
import time
from typing import Any

import numpy as np
from _common import load, name_of, platform_of, print_table, write_json
from anndata import AnnData

import scuvae
from scuvae.inference.training.settings import LEARNING_RATES, epochs_for

COLUMNS = {
    "data": ("data", ""),
    "seed": ("seed", "d"),
    "who": ("decoder", ""),
    "epochs": ("epochs", "d"),
    "cpu_s": ("CPU s", ".1f"),
    "elbo": ("ELBO, all", ".2f"),
    "known": ("known", ".2f"),
    "new": ("new", ".2f"),
}


def judged(adata: AnnData, judges: AnnData, fresh: np.ndarray) -> dict[str, float]:
    """The mean ELBO of cells that no decoder has seen."""
    found = judges.copy()
    knows = "batch_key" in adata.uns["scuvae"]["params"]
    scuvae.tl.project(found, adata, new_batches="estimate" if knows else "error")
    scuvae.tl.score(found)
    elbo = found.obs["scuvae_elbo"].to_numpy()
    known = float(elbo[~fresh].mean()) if not fresh.all() else float("nan")
    return {"elbo": float(elbo.mean()), "known": known, "new": float(elbo[fresh].mean())}


def one(name: str, counts: AnnData, seed: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    order = rng.permutation(counts.n_obs)[: args.cells]
    judge = np.zeros(len(order), bool)
    judge[: len(order) // 7] = True
    counts = counts[order].copy()
    if args.batch_key:
        batch = counts.obs[args.batch_key].astype(str).to_numpy()
        fresh = batch == (args.new or sorted(set(batch))[-1])
    else:
        fresh = np.arange(len(order)) % 2 == 1
    judges, all_cells = counts[judge].copy(), counts[~judge].copy()
    half = counts[~judge & ~fresh].copy()
    whose = fresh[judge] if args.batch_key else np.ones(judge.sum(), bool)
    fit_args = {"batch_key": args.batch_key, "rng": seed, "progress": False}
    rows = []

    def add(who: str, cells: AnnData, **arguments: Any) -> None:
        start = time.process_time()
        scuvae.tl.fit(cells, **arguments)
        took = time.process_time() - start
        epochs = 0 if who == "frozen" else len(cells.uns["scuvae"]["history"])
        found = {"data": name, "seed": seed, "who": who, "cpu_s": took, "epochs": epochs}
        scores = judged(cells, judges, whose)
        if who == "half" and args.batch_key:  # the judges themselves say what the new batch adds
            scores |= {"elbo": float("nan"), "new": float("nan")}
        rows.append(found | scores)
        print(rows[-1], flush=True)

    add("half", half, **fit_args)
    add("whole", all_cells.copy(), **fit_args)
    add("frozen", all_cells.copy(), reference=half, rng=seed)
    epochs = epochs_for(0.9 * all_cells.n_obs, 128)
    if not args.epochs:
        grown = {"reference": half, "fine_tune": True, "rng": seed, "progress": False}
        add("fine-tuned", all_cells.copy(), **grown)
    for share in args.epochs:
        for rate in args.rates:
            add(
                f"{share:g} of the epochs, {rate:g} of the rate",
                all_cells.copy(),
                reference=half,
                fine_tune=True,
                max_epochs=max(5, round(share * epochs)),
                learning_rate=2 * rate * LEARNING_RATES["adam"],
                rng=seed,
                progress=False,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("data", nargs="+")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--cells", type=int, default=6000, help="cells at most, drawn at random")
    add("--batch-key", help="the last batch is new")
    add("--new", help="or this one")
    add("--epochs", type=float, nargs="*", default=[], help="shares of the default's")
    add("--rates", type=float, nargs="*", default=[1.0], help="shares of the default step size")
    add("--json", help="file for all figures")
    args = parser.parse_args()
    rows = []
    for path in args.data:
        name, counts = name_of(path), load(path)
        for seed in args.seeds:
            rows += one(name, counts, seed, args)
    print_table(rows, COLUMNS)
    write_json(args.json, {"platform": platform_of("cpu"), "arguments": vars(args), "rows": rows})


if __name__ == "__main__":
    main()
