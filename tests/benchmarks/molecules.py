"""Held-out molecules and means of genes: scuvae beside SCVI, neighbour sums and MAGIC.

    python tests/benchmarks/molecules.py DATA.h5ad ... --seeds 0 1 2 --cache DIR --json out.json

Every count is split binomially in two halves. Each method is fitted to one, and its means explain
the other.
"""

from collections.abc import Callable
from typing import Any

import _methods as methods
import _views as views
import numpy as np
from _common import Clock, medians, platform_of, print_table, write_json
from _methods import Data
from scipy import sparse as sp

COLUMNS = {
    "model": ("model", ""),
    "cpu_s": ("CPU s", ".1f"),
    "poisson": ("Poisson", ".1f"),
    "nb": ("NB", ".1f"),
    "worst_gene": ("worst gene", ".2f"),
    "genes_2": ("> 2 %", ".3f"),
    "genes_10": ("> 10 %", ".3f"),
    "worst_type": ("worst in type", ".2f"),
    "types_20": ("> 20 %", ".3f"),
    "op_mse": ("OP MSE", ".4f"),
    "op_poisson": ("OP Poisson", ".4f"),
}
NEIGHBOURS = 10, 20, 40, 80
COMPONENTS = 10, 20, 50
PSEUDOCOUNTS = 0.001, 0.003, 0.01, 0.03, 0.1, 0.2
# Diffusion times by what is diffused.
MAGIC: dict[str, tuple[int | str, ...]] = {"sqrt": (3, "auto"), "counts": (3, 6)}
MODELS = [*methods.OURS, "scvi", "knn", "magic", "magic_counts", "type", "mean"]


class Halves:
    """One data set and seed: the half that methods see, the half that judges them."""

    def __init__(self, data: Data, seed: int) -> None:
        self.data, self.seed = data, seed
        self.seen, hidden = views.halves(data.adata.X, seed)
        # Of genes without a molecule in this half nothing can be learned: they are not scored.
        self.hidden = sp.csr_matrix(hidden @ sp.diags((views.totals(self.seen, 0) > 0) * 1.0))
        self.hidden.eliminate_zeros()
        self.mean = views.mean_profile(self.seen)
        self._reference: tuple[float, float] | None = None

    @property
    def reference(self) -> tuple[float, float]:
        """Mean Poisson and NB scores of the mean profile."""
        if self._reference is None:
            self._reference = (
                float(views.poisson_score(self.hidden, self.mean).mean()),
                float(views.nb_score(self.seen, self.hidden, self.mean).mean()),
            )
        return self._reference

    def poisson(self, profiles: np.ndarray) -> float:
        """Mean score of a cell beyond the mean profile's, nats."""
        return float(views.poisson_score(self.hidden, profiles).mean()) - self.reference[0]

    def nb(self, profiles: np.ndarray) -> float:
        found = views.nb_score(self.seen, self.hidden, profiles)
        return float(found.mean()) - self.reference[1]

    def row(self, profiles: np.ndarray) -> dict[str, float]:
        genes = views.gene_ratios(self.seen, profiles)
        types = views.type_ratios(self.seen, profiles, self.data.labels)
        return {
            "poisson": self.poisson(profiles),
            "nb": self.nb(profiles),
            "worst_gene": views.worst_ratio(genes),
            "genes_2": views.share_off(genes, 0.02),
            "genes_10": views.share_off(genes, 0.1),
            "worst_type": views.worst_ratio(types),
            "types_20": views.share_off(types, 0.2),
            **views.open_problems(self.seen, self.hidden, profiles),
        }

    def best_mixed(self, profiles: np.ndarray) -> tuple[float, np.ndarray, float]:
        """Of some pseudocounts the one of the best Poisson score: that, the profiles, the share."""
        x = self.hidden.tocoo()
        own, mean = profiles[x.row, x.col], self.mean[0, x.col]
        # Up to what all shares have in common.
        gain = [x.data @ np.log((1 - s) * own + s * mean) for s in PSEUDOCOUNTS]
        share = PSEUDOCOUNTS[int(np.argmax(gain))]
        best = views.mixed(profiles, self.mean, share)
        return self.poisson(best), best, share


# --- methods: CPU seconds and profiles -----------------------------------------------------------


def ours(halves: Halves, arguments: dict[str, Any]) -> dict[str, Any]:
    import scuvae

    adata, seconds = methods.fit(halves.data, halves.seen, halves.seed, arguments)
    scuvae.tl.denoise(adata, device="cpu")
    profiles = views.as_profiles(np.asarray(adata.layers["scuvae_denoised"]))
    return {"cpu_s": seconds, **halves.row(profiles)}


def scvi(halves: Halves) -> dict[str, Any]:
    found = methods.scvi(halves.data, halves.seed, half=halves.seen)
    return {"cpu_s": float(found["cpu_s"]), **halves.row(views.as_profiles(found["profiles"]))}


def knn(halves: Halves) -> dict[str, Any]:
    """The best of numbers of components, neighbours and pseudocounts, by the Poisson score.

    The NB score is the best over numbers of neighbours at the best components, each at its best
    pseudocount: better than any one choice that a user could make.
    """
    clock = Clock()
    values = views.log_normalised(halves.seen)
    tried: dict[tuple[int, int], tuple[float, np.ndarray, float]] = {}
    for n in COMPONENTS:
        near = views.neighbours(views.pca(values, n), max(NEIGHBOURS) - 1)
        for k in NEIGHBOURS:
            profiles = methods.neighbour_sums(halves.seen, near[:, : k - 1])
            tried[n, k] = halves.best_mixed(profiles)
        best = max(tried, key=lambda key: tried[key][0])
        tried = {key: found for key, found in tried.items() if key[0] in (n, best[0])}
    seconds = clock.seconds() / len(COMPONENTS) / len(NEIGHBOURS)  # of one choice
    n, k = max(tried, key=lambda key: tried[key][0])
    row = halves.row(tried[n, k][1])
    others = [
        halves.nb(tried[n, other][1]) for other in NEIGHBOURS if other != k and (n, other) in tried
    ]
    row["nb"] = max([row["nb"], *others])
    chosen = {"components": n, "k": k, "pseudocount": tried[n, k][2]}
    return {"cpu_s": seconds, **row, "chosen": chosen}


def magic(halves: Halves, values: str, name: str) -> dict[str, Any]:
    """The best of ``t`` and pseudocounts, by the Poisson score; NB likewise."""

    def make() -> dict[str, Any]:
        clock = Clock()
        tried = {}
        for t in MAGIC[values]:
            found = methods.magic(halves.seen, t, halves.seed, values)
            score, best, share = halves.best_mixed(found)
            tried[str(t), share] = score, best
        seconds = clock.seconds() / len(MAGIC[values])  # of one choice
        chosen = max(tried, key=lambda key: tried[key][0])
        return {
            "profiles": tried[chosen][1],
            "cpu_s": seconds,
            "nb": max(halves.nb(found[1]) for found in tried.values()),
            "chosen": np.array([values, *map(str, chosen)]),
        }

    found = halves.data.keep(f"{name}_half_seed{halves.seed}", make)
    row = halves.row(found["profiles"])
    chosen = dict(zip(("values", "t", "pseudocount"), found["chosen"].tolist(), strict=True))
    return {"cpu_s": float(found["cpu_s"]), **row, "nb": float(found["nb"]), "chosen": chosen}


def of_type(halves: Halves) -> dict[str, Any]:
    """The mean profile of the cell's own type: an oracle, for orientation."""
    names, code = np.unique(halves.data.labels, return_inverse=True)
    sums = np.stack([views.totals(halves.seen[code == j], 0) for j in range(len(names))])
    return {
        "cpu_s": float("nan"),
        **halves.row(halves.best_mixed(views.as_profiles(sums)[code])[1]),
    }


def of_all(halves: Halves) -> dict[str, Any]:
    profiles = np.repeat(halves.mean, halves.seen.shape[0], 0)
    return {"cpu_s": float("nan"), **halves.row(profiles)}


OTHERS: dict[str, tuple[str, Callable[[Halves], dict[str, Any]]]] = {
    "scvi": ("SCVI", scvi),
    "knn": ("k nearest, summed", knn),
    "magic": ("MAGIC", lambda halves: magic(halves, "sqrt", "magic")),
    "magic_counts": (
        "counts over MAGIC's graph",
        lambda halves: magic(halves, "counts", "magic_counts"),
    ),
    "type": ("mean of the type (oracle)", of_type),
    "mean": ("mean of all cells", of_all),
}


def measure(path: str, args: Any) -> dict[str, Any]:
    data = Data(path, args)
    print(f"\n## {data}\n", flush=True)
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        halves = Halves(data, seed)
        for label, arguments in methods.fits_of(args):
            rows.append({"model": label, "seed": seed, **ours(halves, arguments)})
            methods.say(rows[-1])
        for name in (name for name in OTHERS if name in args.models):
            label, method = OTHERS[name]
            what = f"molecules_{methods.row_name(name, args)}_seed{seed}"
            found = data.remember(what, lambda method=method, halves=halves: method(halves))
            rows.append({"model": label, "seed": seed, **found})
            methods.say(rows[-1])
    print(f"\n{data}; halves of the molecules, medians of seeds {args.seeds} (lowest to highest)\n")
    table = medians(rows, "model")
    print_table(table, COLUMNS)
    return {"data": data.name, "table": table, "rows": rows}


def main() -> None:
    default = [name for name in MODELS if name != "semi"]
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
