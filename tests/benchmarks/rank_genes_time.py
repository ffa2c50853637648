"""Time and memory of ``tl.rank_genes``: simulated sparse counts, a fit of one epoch.

    python tests/benchmarks/rank_genes_time.py --cells 100000 --genes 2000 --groups 10 [--donors 8]

Groups are random, and so are donors: what they are costs nothing. CPU seconds of one thread, and
the process's peak resident memory before (the data and the fit) and after.
"""

import argparse
import resource
import time

from _common import platform_of, simulated, write_json  # isort: skip
import anndata as ad
import numpy as np

import scuvae


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--groups", type=int, default=10)
    parser.add_argument("--donors", type=int, default=0, help="0: cells are the replicates")
    parser.add_argument("--density", type=float, default=0.08)
    parser.add_argument("--json")
    args = parser.parse_args()
    adata = ad.AnnData(simulated(args.cells, args.genes, args.density))
    rng = np.random.default_rng(0)
    adata.obs["group"] = rng.choice([f"g{i}" for i in range(args.groups)], args.cells)
    donor = None
    if args.donors:
        donor = "donor"
        adata.obs[donor] = rng.choice([f"d{i}" for i in range(args.donors)], args.cells)
    clock = time.process_time()
    scuvae.tl.fit(adata, max_epochs=1, n_latent=5, device="cpu", progress=False)
    found = {"fit_s": time.process_time() - clock, "before_gb": peak()}
    clock = time.process_time()
    scuvae.tl.rank_genes(adata, "group", donor_key=donor, device="cpu")
    found |= {"rank_genes_s": time.process_time() - clock, "after_gb": peak()}
    print({name: round(value, 2) for name, value in found.items()})
    write_json(args.json, {"arguments": vars(args), "platform": platform_of(), **found})


if __name__ == "__main__":
    main()
