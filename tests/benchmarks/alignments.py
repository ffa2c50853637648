"""How many mixtures of regressions align the map: neighbours of seeds, types, batches, CPU time.

    python tests/benchmarks/alignments.py DATA.h5ad ... --batch-key batch --cells 2500 --seeds 0 1 2

The same fits are embedded anew by each way, ``kinds' sizes, starts of k-means, rounds``. Jaccard of
15 neighbours and ARI of clusters are means over pairs of seeds; own, across and told as in
integration.py; seconds are CPU seconds of ``tl.embed``.
"""

import argparse
from itertools import combinations
from typing import Any
from unittest.mock import patch

import _methods as methods
import _mixing as mixing
import _views as views
import numpy as np
import torch
from _common import Clock, print_table
from _methods import Data
from seeds import Picture, compared

import scuvae
from scuvae.inference.mapping import alignment

WIDE = (60, 70, 80, 90, 100, 115, 130, 150, 175, 200)
# Cells for each kind, starts of k-means, rounds.
WAYS: dict[str, tuple[tuple[int, ...], int, int]] = {
    "3 of 80 to 125, 10, 30 (before)": ((80, 100, 125), 10, 30),
    "10 of 75 to 135, 10, 30": ((75, 81, 88, 95, 101, 108, 115, 121, 128, 135), 10, 30),
    "5 of 125 to 250, 10, 30": ((125, 150, 175, 200, 250), 10, 30),
    "6, 3, 30": ((60, 80, 100, 125, 160, 200), 3, 30),
    "10, 10, 30": (WIDE, 10, 30),
    "10, 1, 30": (WIDE, 1, 30),
    "10, 3, 15": (WIDE, 3, 15),
    "20, 10, 30": (tuple(range(60, 200, 7)), 10, 30),
}
COLUMNS = {
    "way": ("mixtures, starts, rounds", ""),
    "cpu_s": ("CPU s", ".1f"),
    "jaccard": ("Jaccard", ".3f"),
    "ari": ("ARI", ".3f"),
    "own": ("own type", ".3f"),
    "across": ("across", ".3f"),
    "told": ("told", ".3f"),
}


def judged(way: str, fits: list[Any], data: Data) -> dict[str, Any]:
    sizes, starts, rounds = WAYS[way]
    clock, maps = Clock(), []
    with patch.multiple(alignment, CELLS_A_KIND=sizes, _STARTS=starts, _ROUNDS=rounds):
        for adata in fits:
            scuvae.tl.embed(adata)
            maps.append(np.array(adata.obsm["X_scuvae_embed"]))
    seconds = clock.seconds() / len(fits)
    pictures = [Picture(points) for points in maps]
    code = np.unique(data.batches, return_inverse=True)[1]
    own = [(data.labels[p.near] == data.labels[:, None]).mean() for p in pictures]
    others = [views.vote(views.neighbours(x, 15, among=code), data.labels) for x in maps]
    return {
        "way": way,
        "cpu_s": seconds,
        **compared(list(combinations(pictures, 2))),
        "own": float(np.mean(own)),
        "across": float(np.mean([(found == data.labels).mean() for found in others])),
        "told": float(np.mean([mixing.told_apart(x, data.labels, data.batches) for x in maps])),
    }


def main() -> None:
    parser: argparse.ArgumentParser = methods.parser(__doc__, ["unamortized"], ["unamortized"])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    methods.warm_up()
    for path in args.data:
        data = Data(path, args)
        print(f"\n## {data}\n", flush=True)
        fits = [methods.fit(data, data.adata.X, seed, {})[0] for seed in args.seeds]
        print_table([judged(way, fits, data) for way in args.ways], COLUMNS)


if __name__ == "__main__":
    main()
