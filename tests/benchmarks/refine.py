"""Natural steps against Adam on q, the decoder frozen: held-out ELBO and CPU seconds.

    python tests/benchmarks/refine.py DATA.h5ad ... --seeds 0 1 2 --cache DIR --json out.json

Two decoders with an encoder for each data set and seed, SCVI's (cached by ``quality.py``) and that
of an amortized fit. Held-out cells get their q by Adam from the encoder's q, by natural steps from
the prior, and by natural steps from the encoder's q; all by the same likelihood code, one thread.
"""

import argparse
import copy
from collections.abc import Callable
from typing import Any

import _scvi
import torch
from _common import (
    Clock,
    cells_of,
    elbos,
    encoded,
    load,
    medians,
    name_of,
    print_table,
    split,
    write_json,
)
from torch.distributions import Distribution

import scuvae
from scuvae.inference.objectives import elbo
from scuvae.inference.refine import (
    as_family,
    concatenate,
    likeliest_start,
    prior_start,
    refine,
)
from scuvae.io.sources import Cells
from scuvae.model import VAE, gaussian, raw_scale

COLUMNS = {
    "model": ("decoder, q", ""),
    "cpu_s": ("CPU s", ".2f"),
    "share": ("/ Adam's", ".4f"),
    "elbo": ("ELBO", ".2f"),
    "gain": ("above Adam's", ".2f"),
    "worse": ("cells below start", ".0f"),
}
# A cell is below its start when it loses more than the noise of 100 paired draws explains.
_NOISE = 0.1


def adam(
    model: VAE, cells: Cells, start: Distribution, *, steps: int, draws: int, rate: float
) -> Distribution:
    """Plain Adam on mean and scale of q, fresh draws at every step."""
    parts = []
    for batch in cells.loader(torch.arange(len(cells)), 512):
        first = take(start, batch.index)
        mean = first.mean.clone().requires_grad_()
        raw = raw_scale(first).clone().requires_grad_()
        optimizer = torch.optim.Adam([mean, raw], lr=rate)
        for _ in range(steps):
            loss = -elbo(model, batch, gaussian(mean, raw), draws).elbo.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        parts.append(gaussian(mean.detach(), raw.detach()))
    return concatenate(parts)


def natural(model: VAE, cells: Cells, start: Distribution | None, covariance: str) -> Distribution:
    """``refine`` with its defaults, from ``start`` or else without an encoder."""
    parts = []
    for batch in cells.loader(torch.arange(len(cells)), 512):
        if start is None:
            first = likeliest_start(model, batch, covariance)
        else:
            first = take(start, batch.index)
        parts.append(refine(model, batch, [first]))
    return concatenate(parts)


def take(q: Distribution, rows: torch.Tensor) -> Distribution:
    return gaussian(q.mean[rows], raw_scale(q)[rows])


def rows(name: str, model: VAE, cells: Cells, args: argparse.Namespace) -> list[dict[str, Any]]:
    model = copy.deepcopy(model).eval().requires_grad_(False)
    out = []
    full = encoded(model, cells)
    prior = prior_start(model, len(cells), args.covariance)
    own = gaussian(full.mean, raw_scale(as_family(full, args.covariance)))

    def add(label: str, make: Callable[[], Distribution], start: Distribution) -> dict[str, Any]:
        clock = Clock()
        q = make()
        seconds = clock.seconds()
        values = elbos(model, cells, q)
        worse = int((values < elbos(model, cells, start) - _NOISE).sum())
        row = {"model": f"{name}: {label}", "cpu_s": seconds, "elbo": float(values.mean())}
        out.append(row | {"worse": float(worse)})
        return out[-1]

    encoder_row = add("encoder", lambda: own, own)
    encoder_row["cpu_s"] = float("nan")
    tried = []
    for rate in args.rates:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            options = {"steps": args.steps, "draws": args.draws, "rate": rate}
            label = f"Adam {args.steps} x {args.draws}, rate {rate:g}"
            tried.append(add(label, lambda: adam(model, cells, own, **options), own))  # noqa: B023
    best = max(tried, key=lambda row: row["elbo"])
    add("natural from the prior", lambda: natural(model, cells, None, args.covariance), prior)
    add("natural from the encoder", lambda: natural(model, cells, own, args.covariance), own)
    for row in out:
        row["share"] = row["cpu_s"] / best["cpu_s"]
        row["gain"] = row["elbo"] - best["elbo"]
    return [row for row in out if row not in tried or row is best]


def measure(data: str, args: argparse.Namespace) -> dict[str, Any]:
    adata = load(data, args.n_genes)
    print(f"\n## {name_of(data)}: {adata.n_obs} cells x {adata.n_vars} genes\n", flush=True)
    found: list[dict[str, Any]] = []
    for seed in args.seeds:
        train, held_out = split(adata, seed)
        cells = cells_of(held_out)
        if "scvi" in args.models:
            trace = _scvi.trace(train, seed, args.epochs, name=name_of(data), cache=args.cache)
            found += [
                {**row, "seed": seed} for row in rows("SCVI", trace.model(args.epochs), cells, args)
            ]
        if "scuvae" in args.models:
            scuvae.tl.fit(train, amortized=True, likelihood="nb", rng=seed, device="cpu")
            model = scuvae.get.model(train)
            found += [{**row, "seed": seed} for row in rows("scuvae", model, cells, args)]
    print(
        f"{len(held_out)} held-out cells, {args.covariance} covariance, medians of {args.seeds}\n"
    )
    table = medians([{**row, "model": row["model"].split(", rate")[0]} for row in found], "model")
    print_table(table, COLUMNS)
    return {"data": name_of(data), "table": table, "rows": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("data", nargs="+", help="files of raw counts, or pbmc68k for the data that ships")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--n-genes", type=int, default=2000)
    add("--models", nargs="+", default=["scvi", "scuvae"], choices=["scvi", "scuvae"])
    add("--epochs", type=int, default=160, help="of SCVI")
    add("--cache", help="folder of SCVI's weights, as quality.py keeps them")
    add("--covariance", default="diagonal", choices=["diagonal", "full"])
    add("--steps", type=int, default=150, help="of Adam")
    add("--draws", type=int, default=5, help="of Adam, each step")
    add(
        "--rates",
        type=float,
        nargs="+",
        default=[0.01, 0.03, 0.1],
        help="of Adam: the one with the highest ELBO is shown",
    )
    add("--json", help="file for all figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = [measure(data, args) for data in args.data]
    arguments = {k: v for k, v in vars(args).items() if k not in ("json", "cache")}
    write_json(args.json, {"arguments": arguments, "results": results})


if __name__ == "__main__":
    main()
