"""The map: neighbours, labels, clusters and batches of scuvae beside PCA, SCVI and Harmony.

    python tests/benchmarks/map.py DATA.h5ad ... --seeds 0 1 2 --cache DIR --json out.json

Every representation is of all cells and all counts, and is judged by what a user does with one: its
15 nearest neighbours, clusters of their graph.
"""

from typing import Any

import _methods as methods
import _views as views
import numpy as np
from _common import Clock, medians, platform_of, print_table, write_json
from _methods import Data

COLUMNS = {
    "model": ("representation", ""),
    "cpu_s": ("CPU s", ".1f"),
    "purity": ("own type", ".3f"),
    "accuracy": ("15-NN", ".3f"),
    "nmi": ("best NMI", ".3f"),
    "ari": ("best ARI", ".3f"),
    "across": ("across", ".3f"),
    "mixing": ("mixing", ".3f"),
    "clisi": ("cLISI", ".3f"),
    "split": ("split AUC", ".3f"),
    "split_chance": ("chance", ".3f"),
}
RESOLUTIONS = tuple(np.round(np.arange(0.1, 2.01, 0.1), 1))
COMPONENTS = 10, 20, 50
MODELS = [*methods.OURS, "pca", "harmony", "scvi"]


def judged(data: Data, points: np.ndarray) -> dict[str, float]:
    """All figures of one representation, but that of the split."""
    near = views.neighbours(points, 30)
    row = {
        "purity": views.purity(near[:, :15], data.labels),
        "accuracy": views.accuracy(near[:, :15], data.labels),
        "clisi": views.clisi(near, data.labels),
        **views.best_agreement(views.leiden(points, RESOLUTIONS), data.labels),
    }
    if data.batches is not None:
        code = np.unique(data.batches, return_inverse=True)[1]
        others = views.neighbours(points, 15, among=code)
        row["across"] = float((views.vote(others, data.labels) == data.labels).mean())
        row["mixing"] = views.mixing(near, data.batches)
    return row


def ours(data: Data, seed: int, label: str, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a fit's latent means and of its map."""
    adata, seconds = methods.fit(data, data.adata.X, seed, arguments)
    held_out = (adata.obs["scuvae_split"] != "train").to_numpy()
    out = []
    clock = Clock()
    made = methods.our_map(adata)
    views_of = {"latent": np.asarray(adata.obsm["X_scuvae"]), "map": made}
    times = {"latent": seconds, "map": seconds + clock.seconds()}
    for name, points in views_of.items():
        auc, chance = views.split_auc(points, held_out, data.labels)
        out.append(
            {
                "model": f"{label}: {name}",
                "seed": seed,
                "cpu_s": times[name],
                **judged(data, points),
                "split": auc,
                "split_chance": chance,
            }
        )
        methods.say(out[-1])
    return out


def others(data: Data, args: Any, seed: int) -> list[dict[str, Any]]:
    """Rows of what is not ours; a PCA has no seed."""
    out: list[dict[str, Any]] = []

    def add(what: str, label: str, make: Any) -> None:
        def row() -> dict[str, Any]:
            points, seconds = make()
            return {"cpu_s": seconds, **judged(data, points)}

        out.append({"model": label, "seed": seed, **data.remember(f"map_{what}", row)})
        methods.say(out[-1])

    def pca(n: int) -> tuple[np.ndarray, float]:
        clock = Clock()
        return views.pca(views.log_normalised(data.adata.X), n), clock.seconds()

    def harmony(n: int) -> tuple[np.ndarray, float]:
        clock = Clock()
        points = methods.harmony(pca(n)[0], data, seed)
        return points, clock.seconds()

    def scvi() -> tuple[np.ndarray, float]:
        found = methods.scvi(data, seed)
        return found["latent"], float(found["cpu_s"])

    for n in COMPONENTS:
        if "pca" in args.models:
            add(f"pca{n}", f"PCA {n}", lambda n=n: pca(n))
        if "harmony" in args.models and data.batch_key is not None:
            add(f"harmony{n}_seed{seed}", f"Harmony, PCA {n}", lambda n=n: harmony(n))
    if "scvi" in args.models:
        add(f"{methods.row_name('scvi', args)}_seed{seed}", "SCVI", scvi)
    return out


def measure(path: str, args: Any) -> dict[str, Any]:
    data = Data(path, args)
    print(f"\n## {data}\n", flush=True)
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        for label, arguments in methods.fits_of(args):
            rows += ours(data, seed, label, arguments)
        rows += others(data, args, seed)
    print(f"\n{data}; medians of seeds {args.seeds} (lowest to highest)\n")
    table = medians(rows, "model")
    columns = {key: form for key, form in COLUMNS.items() if any(key in row for row in table)}
    print_table(table, columns)
    return {"data": data.name, "table": table, "rows": rows}


def main() -> None:
    default = ["unamortized", "amortized", "pca", "harmony", "scvi"]
    args = methods.parser(__doc__, MODELS, default).parse_args()
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
