"""Does a dispersion for each batch explain held-out cells better than one for all, and how tied?

    python tests/benchmarks/dispersion.py DATA.h5ad ... --precisions 1 4 16 --seeds 0 1

Held-out ELBO in nats a cell of ``tl.fit(batch_key=)`` with ``dispersion="gene"``, and by how much
``"gene-batch"`` is above it for each precision of the prior about a gene's mean over batches.
"""

import argparse
import time

import numpy as np
from _common import split
from _methods import Data

import scuvae
from scuvae.model.likelihoods import by_level


def held_out(data, seed, likelihood, dispersion, n_epochs):
    """ELBO of held-out cells in nats a cell, and CPU seconds of the fit."""
    train, new = split(data.with_counts(data.adata.X), seed)
    started = time.process_time()
    scuvae.tl.fit(
        train,
        batch_key=data.batch_key,
        likelihood=likelihood,
        dispersion=dispersion,
        max_epochs=n_epochs,
        rng=seed,
        progress=False,
        device="cpu",
    )
    seconds = time.process_time() - started
    scuvae.tl.project(new, train)
    scuvae.tl.score(new)
    return float(np.mean(new.obs["scuvae_elbo"])), seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", nargs="+")
    parser.add_argument("--precisions", type=float, nargs="+", default=[by_level.PRECISION])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--cells", type=int, default=2500)
    parser.add_argument("--n-genes", type=int, default=2000)
    parser.add_argument("--likelihood", default="nb")
    parser.add_argument("--batch-key", default="batch")
    parser.add_argument("--max-epochs", type=int)
    parser.set_defaults(label="cell_type", cache=None)
    args = parser.parse_args()
    for path in args.data:
        data = Data(path, args)
        print(data, flush=True)
        for seed in args.seeds:
            base, seconds = held_out(data, seed, args.likelihood, "gene", args.max_epochs)
            print(f"seed {seed}: gene {base:.2f} ({seconds:.0f} CPU s)", end="", flush=True)
            for precision in args.precisions:
                by_level.PRECISION = precision
                found = held_out(data, seed, args.likelihood, "gene-batch", args.max_epochs)
                more = f"; {precision:g}: {found[0] - base:+.2f} ({found[1]:.0f} CPU s)"
                print(more, end="", flush=True)
            print(flush=True)


if __name__ == "__main__":
    main()
