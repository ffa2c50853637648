"""The same picture twice: neighbours and clusters of fits that differ in their seed alone.

    python tests/benchmarks/seeds.py DATA.h5ad ... --seeds 0 1 2 --cache DIR --json out.json

Beside it, as a yardstick, what a PCA does when a tenth of the molecules is left out.
"""

from itertools import combinations
from typing import Any

import _methods as methods
import _views as views
import numpy as np
from _common import Clock, platform_of, print_table, write_json
from _methods import Data

COLUMNS = {
    "model": ("representation", ""),
    "cpu_s": ("CPU s", ".1f"),
    "jaccard": ("15-NN Jaccard", ".3f"),
    "lowest_jaccard": ("lowest", ".3f"),
    "ari": ("Leiden ARI", ".3f"),
    "lowest_ari": ("lowest", ".3f"),
    "clusters": ("clusters", ".1f"),
}
# What is left of the molecules in the yardstick.
KEPT = 0.9
MODELS = [*methods.OURS, "pca", "scvi"]


class Picture:
    """What is compared of one representation: its neighbours, and its clusters."""

    def __init__(self, points: np.ndarray) -> None:
        self.near = views.neighbours(points, 15)
        self.clusters = views.leiden(points, [1.0])[0]


def compared(pairs: list[tuple[Picture, Picture]]) -> dict[str, float]:
    """Means and lowest figures over pairs."""
    from sklearn.metrics import adjusted_rand_score

    shared = [views.jaccard(one.near, other.near) for one, other in pairs]
    same = [adjusted_rand_score(one.clusters, other.clusters) for one, other in pairs]
    found = [len(np.unique(picture.clusters)) for pair in pairs for picture in pair]
    return {
        "jaccard": float(np.mean(shared)),
        "lowest_jaccard": float(np.min(shared)),
        "ari": float(np.mean(same)),
        "lowest_ari": float(np.min(same)),
        "clusters": float(np.mean(found)),
    }


def ours(data: Data, args: Any, label: str, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Latent means and map: of all pairs of seeds, and of each seed with and without thinning."""

    def fitted(counts: Any, seed: int) -> tuple[dict[str, Picture], float]:
        adata, seconds = methods.fit(data, counts, seed, arguments)
        clock = Clock()
        points = {"latent": np.asarray(adata.obsm["X_scuvae"]), "map": methods.our_map(adata)}
        seconds += clock.seconds()
        return {name: Picture(values) for name, values in points.items()}, seconds

    fits = [fitted(data.adata.X, seed) for seed in args.seeds]
    seconds = float(np.median([found[1] for found in fits]))
    rows = []
    for name in ("latent", "map"):
        pairs = list(combinations([found[0][name] for found in fits], 2))
        rows.append({"model": f"{label}: {name}", "cpu_s": seconds, **compared(pairs)})
    if args.thinned:
        less = [fitted(views.thinned(data.adata.X, KEPT, s), s)[0] for s in args.seeds]
        for name in ("latent", "map"):
            pairs = [(a[0][name], b[name]) for a, b in zip(fits, less, strict=True)]
            rows.append({"model": f"{label}: {name}, a tenth left out", **compared(pairs)})
    return rows


def scvi(data: Data, args: Any) -> dict[str, Any]:
    runs = [methods.scvi(data, seed) for seed in args.seeds]
    pictures = [Picture(run["latent"]) for run in runs]
    seconds = float(np.median([run["cpu_s"] for run in runs]))
    return {"cpu_s": seconds, **compared(list(combinations(pictures, 2)))}


def pca(data: Data, args: Any, n_components: int = 50) -> dict[str, Any]:
    """All molecules against nine tenths of them, drawn by each seed."""

    def picture(counts: Any) -> Picture:
        return Picture(views.pca(views.log_normalised(counts), n_components))

    whole = picture(data.adata.X)
    less = [picture(views.thinned(data.adata.X, KEPT, seed)) for seed in args.seeds]
    return compared([(whole, other) for other in less])


def measure(path: str, args: Any) -> dict[str, Any]:
    data = Data(path, args)
    print(f"\n## {data}\n", flush=True)
    rows: list[dict[str, Any]] = []
    for label, arguments in methods.fits_of(args):
        rows += ours(data, args, label, arguments)
    which = "_".join(map(str, args.seeds))
    if "scvi" in args.models:
        what = f"seeds_{methods.row_name('scvi', args)}_{which}"
        rows.append({"model": "SCVI", **data.remember(what, lambda: scvi(data, args))})
    if "pca" in args.models:
        found = data.remember(f"seeds_pca_{which}", lambda: pca(data, args))
        rows.append({"model": "PCA 50, a tenth of the molecules left out", **found})
    print(f"{data}; all pairs of seeds {args.seeds}\n")
    print_table(rows, COLUMNS)
    return {"data": data.name, "table": rows}


def main() -> None:
    parser = methods.parser(__doc__, MODELS, ["unamortized", "amortized", "scvi", "pca"])
    parser.add_argument(
        "--thinned", action="store_true", help="ours too with a tenth of the molecules left out"
    )
    args = parser.parse_args()
    if len(args.seeds) < 2:
        parser.error("--seeds: two or more, to compare")
    if any(kind in args.models for kind in methods.OURS):
        methods.warm_up()
    results = []
    for path in args.data:
        results.append(measure(path, args))
        arguments = {k: v for k, v in vars(args).items() if k not in ("json", "cache")}
        content = {"arguments": arguments, "platform": platform_of(), "results": results}
        write_json(args.json, content)
    methods.print_all(results, COLUMNS)


if __name__ == "__main__":
    main()
