"""What stock SCVI's encoder loses per cell, and what external.scvi.refine brings back.

    python tests/benchmarks/bridge.py DATA.h5ad ... --seeds 0 1 2 --cache DIR --json out.json

SCVI is trained on four fifths of the cells, then training and held-out cells are refined. Beside
it, on some of the cells, stands what a user would write: 1,000 steps of Adam on each cell's mean
and scales, 10 draws a step, from the encoder's q, at a fixed rate and at one that falls to zero.
One thread, CPU seconds; ELBOs of compared posteriors over the same draws, other than those that
either was fitted to.
"""

import argparse
from typing import Any

import _scvi
import anndata as ad
import numpy as np
import pandas as pd
import torch
from _common import Clock, load, medians, name_of, print_table, split, write_json

import scuvae
from scuvae.distributions.gaussian import Gaussian, concatenate
from scuvae.external._scvi_checks import loader_of
from scuvae.external._scvi_module import Bridge
from scuvae.inference.evaluation.paired_elbo import compare
from scuvae.inference.refinement.stein import refine_diagonal

COLUMNS = {
    "what": ("cells", ""),
    "encoder": ("encoder", ".2f"),
    "refined": ("refined", ".2f"),
    "gap": ("gap", ".2f"),
    "gap_se": ("SE", ".3f"),
    "worse": ("cells worse", ".0f"),
    "worst_type": ("worst type's gap", ".2f"),
    "cpu_s": ("refine, CPU s", ".1f"),
    "whole_s": ("with scores", ".1f"),
    "of_training": ("/ training", ".3f"),
    "over_fixed": ("refined − Adam", ".3f"),
    "over_decaying": ("− decaying", ".3f"),
    "over_se": ("SE", ".3f"),
    "below_adam": ("cells below Adam", ".0f"),
    "speed": ("Adam's time / ours", ".0f"),
}
# A cell is worse where it is so by more than this many standard errors, and than float32's noise.
_ERRORS, _NOISE = 4.0, 1e-2
_AT_ONCE = 104  # cells, as refine takes them of 2,000 genes


def adam(
    model: Any, batch: Any, q: Gaussian, *, decaying: bool, n_steps: int, n_draws: int = 10
) -> Gaussian:
    mean, log_scale = q.mean.clone().requires_grad_(), q.stddev.log().requires_grad_()
    rate = 0.03 if decaying else 0.01
    optimizer = torch.optim.Adam([mean, log_scale], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    for _ in range(n_steps):
        current = Gaussian(mean, log_scale.exp())
        expected = model.log_likelihood(batch, current.rsample((n_draws,))).mean(0)
        loss = (model.prior.kl(current) - expected).sum()
        mean.grad, log_scale.grad = torch.autograd.grad(loss, [mean, log_scale])
        optimizer.step()
        if decaying:
            schedule.step()
    return Gaussian(mean.detach(), log_scale.exp().detach())


def beside_adam(
    model: Any, adata: ad.AnnData, seed: int, args: argparse.Namespace
) -> dict[str, float]:
    """Refinement and Adam on some of the cells: seconds, and the ELBO of one less the other's."""
    n = min(args.adam_cells, adata.n_obs)
    rows = np.sort(np.random.default_rng(seed).choice(adata.n_obs, n, replace=False))
    bridge = Bridge(model.module, torch.device("cpu"))
    parts: dict[str, list[Gaussian]] = {"ours": [], "fixed": [], "decaying": []}
    seconds = dict.fromkeys(parts, 0.0)
    batches = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for tensors in loader_of(model, adata[rows].copy(), _AT_ONCE):
            batch, start = bridge.read(tensors, torch.arange(len(tensors["X"])))
            batches.append(batch)
            for name, found in parts.items():
                clock = Clock()
                if name == "ours":
                    found.append(refine_diagonal(bridge.as_vae(), batch, start))
                else:
                    decaying = name == "decaying"
                    found.append(adam(bridge, batch, start, decaying=decaying, n_steps=args.steps))
                seconds[name] += clock.seconds()
        out = {"speed": seconds["fixed"] / seconds["ours"]}
        for name in ("fixed", "decaying"):
            pairs = zip(batches, parts["ours"], parts[name], strict=True)
            results = [compare(bridge.as_vae(), batch, a, b, 400) for batch, a, b in pairs]
            gain = torch.cat([r["amortization_gap"] for r in results]).numpy()
            error = torch.cat([r["amortization_gap_se"] for r in results]).numpy()
            out[f"over_{name}"] = float(gain.mean())
            out[f"over_{name}_median"] = float(np.median(gain))
            out[f"over_{name}_lowest"] = float(gain.min())
            if name == "fixed":
                out["over_se"] = float(np.sqrt((error**2).sum()) / len(error))
                out["below_adam"] = float((gain < -_ERRORS * error - _NOISE).sum())
        return {**out, "adam_cells": float(n), "adam_s": seconds["fixed"]}


def refine_seconds(model: Any, adata: ad.AnnData) -> float:
    """CPU seconds of refinement alone, loading and encoding included."""
    clock = Clock()
    bridge = Bridge(model.module, torch.device("cpu"))
    parts = []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for tensors in loader_of(model, adata, _AT_ONCE):
            batch, start = bridge.read(tensors, torch.arange(len(tensors["X"])))
            parts.append(refine_diagonal(bridge.as_vae(), batch, start))
    concatenate(parts)
    return clock.seconds()


def worse_cells(model: Any, adata: ad.AnnData, seed: int) -> int:
    """Cells whose stored q is worse than the encoder's, over draws that did not choose it."""
    bridge = Bridge(model.module, torch.device("cpu"))
    count, first = 0, 0
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 + seed)
        for tensors in loader_of(model, adata, _AT_ONCE):
            batch, start = bridge.read(tensors, torch.arange(len(tensors["X"])))
            rows = slice(first, first + len(batch))
            first += len(batch)
            mean, scale = (
                torch.as_tensor(adata.obsm[name][rows]) for name in ("X_scvi", "X_scvi_scale")
            )
            stored = Gaussian(mean, scale)
            found = compare(bridge.as_vae(), batch, stored, start, 64)
            lost = -found["amortization_gap"] > _ERRORS * found["amortization_gap_se"] + _NOISE
            count += int(lost.sum())
    return count


def row(
    what: str, model: Any, adata: ad.AnnData, seconds: float, seed: int, args: argparse.Namespace
) -> tuple[dict[str, Any], pd.DataFrame]:
    clock = Clock()
    scuvae.external.scvi.refine(model, adata, device="cpu", progress=False)
    whole = clock.seconds()
    cpu_s = refine_seconds(model, adata)
    obs = adata.obs
    gap, error = obs["scvi_amortization_gap"], obs["scvi_amortization_gap_se"]
    by_type = pd.DataFrame()
    if args.label in obs:
        grouped = obs.groupby(args.label, observed=True)["scvi_amortization_gap"]
        by_type = grouped.agg(["size", "mean", "median", "max"])
    found = {
        "what": what,
        "encoder": float(obs["scvi_elbo_encoder"].mean()),
        "refined": float(obs["scvi_elbo"].mean()),
        "gap": float(gap.mean()),
        "gap_se": float(np.sqrt((error**2).sum()) / len(error)),
        "worse": float(worse_cells(model, adata, seed)),
        "kept": float((gap == 0).sum()),
        "cells": float(adata.n_obs),
        "worst_type": float(by_type["mean"].max()) if len(by_type) else float("nan"),
        "cpu_s": cpu_s,
        "whole_s": whole,
        "training_s": seconds,
        "of_training": cpu_s / seconds,
        **beside_adam(model, adata, seed, args),
    }
    print({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in found.items()})
    return found, by_type


def measure(data: str, args: argparse.Namespace) -> dict[str, Any]:
    adata = load(data, args.n_genes)
    print(f"\n## {name_of(data)}: {adata.n_obs} cells x {adata.n_vars} genes\n", flush=True)
    rows: list[dict[str, Any]] = []
    types: dict[str, Any] = {}
    for seed in args.seeds:
        train, held_out = split(adata, seed)
        for likelihood in args.likelihoods:
            run = _scvi.trace(
                train,
                seed,
                args.epochs,
                name=name_of(data),
                cache=args.cache,
                likelihood=likelihood,
                every=5 if likelihood == "nb" else 50,
            )
            speed = 1.0
            if args.calibrate:
                now = _scvi.seconds_per_epoch(train, args.calibrate, likelihood=likelihood)
                speed = now / (run.cpu_s[-1] / len(run.cpu_s))
                print(f"an epoch takes {now:.3f} CPU s now, {speed:.2f} x those cached")
            seconds = run.seconds(args.epochs) * speed
            model = _scvi.as_scvi(run, args.epochs, train)
            for name, cells in (("training", train), ("held out", held_out)):
                what = f"{likelihood.upper()}, {name}"
                found, by_type = row(what, model, cells.copy(), seconds, seed, args)
                rows.append({**found, "seed": seed})
                types[f"{what}, seed {seed}"] = by_type.reset_index().to_dict("records")
                if len(by_type):
                    print(f"\nGap in nats per cell by {args.label}, {what}, seed {seed}\n")
                    print(by_type.round(2).to_string(), "\n", flush=True)
    table = medians(rows, "what")
    print(f"\n{name_of(data)}: nats per cell, medians of seeds {args.seeds}\n")
    print_table(table, COLUMNS)
    return {"data": name_of(data), "table": table, "rows": rows, "types": types}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("data", nargs="+", help="files of raw counts, or pbmc68k for the data that ships")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of split, SCVI and draws")
    add("--likelihoods", nargs="+", default=["nb", "zinb"], choices=["nb", "zinb"])
    add("--epochs", type=int, default=200, help="of SCVI; other than 200 where cached weights have")
    add("--n-genes", type=int, default=2000)
    add("--label", default="cell_type", help="column of obs by which gaps are shown")
    add("--adam-cells", type=int, default=128, help="cells that Adam is run on")
    add("--steps", type=int, default=1000, help="of Adam")
    add("--cache", help="folder for SCVI's weights: each is trained once")
    add("--calibrate", type=int, default=3, help="epochs of SCVI to time now; 0: none")
    add("--json", help="file for all figures")
    args = parser.parse_args()
    results = []
    for data in args.data:
        results.append(measure(data, args))
        arguments = {k: v for k, v in vars(args).items() if k not in ("json", "cache")}
        write_json(args.json, {"arguments": arguments, "results": results})


if __name__ == "__main__":
    main()
