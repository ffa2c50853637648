"""Coverage of posterior intervals on cells simulated from fitted decoders, and what it takes.

    python tests/benchmarks/calibration.py pbmc68k DATA.h5ad ... --seeds 0 1 2 --json out.json

A fit for each data set and seed, then ``tl.calibration`` with q as ``tl.project`` hands them out,
polished, and with moments by importance weights: the share of central intervals that hold the z a
cell was simulated from, in per cent, for full and for diagonal covariances, beside what the full
ones predict of the diagonal ones. Last the real cells, whose q are found anew in each way: CPU
time, and their mean ELBO in nats per cell.
"""

import argparse
from typing import Any

import torch
from _common import Clock, load, medians, name_of, print_table, write_json

import scuvae

LEVELS = (0.5, 0.8, 0.95)
COLUMNS = {
    "q": ("q", ""),
    **{f"level_{level:g}": (f"{100 * level:g} %", ".1f") for level in LEVELS},
    "r2": ("r²", ".3f"),
    "z2": ("z²", ".3f"),
    "cpu_ms": ("CPU ms a cell", ".1f"),
    "elbo": ("ELBO, real cells", ".2f"),
}


def rows(adata: Any, args: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    scuvae.tl.fit(adata, likelihood="nb", rng=seed, device="cpu")
    out = []
    for polish, label in ((False, ""), (True, ", polished"), ("moments", ", moments")):
        options: dict[str, Any] = {"polish": polish, "device": "cpu"}
        scuvae.tl.calibration(adata, n_cells=args.n_cells, levels=LEVELS, rng=seed, **options)
        found = adata.uns["scuvae_calibration"]
        for covariance in ("full", "diagonal"):
            new, clock = adata.copy(), Clock()
            scuvae.tl.project(new, adata, covariance=covariance, **options)
            seconds = clock.seconds()
            scuvae.tl.score(new, device="cpu")
            moments = found["residuals"].loc[covariance]
            out.append(
                {
                    "q": f"{covariance}{label}",
                    "seed": seed,
                    **levels(found, covariance),
                    "r2": float(moments["r2"]),
                    "z2": float(moments["z2"]),
                    "cpu_ms": 1000 * seconds / adata.n_obs,
                    "elbo": float(new.obs["scuvae_elbo"].mean()),
                }
            )
        if "diagonal_predicted" not in found["coverage"]:
            continue
        predicted = levels(found, "diagonal_predicted")
        out.append({"q": f"diagonal{label}: predicted", "seed": seed, **predicted})
    return out


def levels(found: dict[str, Any], column: str) -> dict[str, float]:
    return {f"level_{k:g}": 100 * float(v) for k, v in found["coverage"][column].items()}


def measure(data: str, args: argparse.Namespace) -> dict[str, Any]:
    adata = load(data, args.n_genes)
    print(f"\n## {name_of(data)}: {adata.n_obs} cells x {adata.n_vars} genes\n", flush=True)
    found = [row for seed in args.seeds for row in rows(adata, args, seed)]
    print(f"{args.n_cells} simulated cells, medians of seeds {args.seeds}\n")
    table = medians(found, "q")
    print_table(table, COLUMNS)
    return {"data": name_of(data), "table": table, "rows": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("data", nargs="*", default=["pbmc68k"], help="files of raw counts, or pbmc68k")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--n-genes", type=int, default=2000)
    add("--n-cells", type=int, default=2000, help="cells to simulate")
    add("--json", help="file for all figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = [measure(data, args) for data in args.data]
    arguments = {k: v for k, v in vars(args).items() if k != "json"}
    write_json(args.json, {"arguments": arguments, "results": results})


if __name__ == "__main__":
    main()
