"""Integration on both axes: do batches mix, and do types stay apart?

    python tests/benchmarks/integration.py DATA.h5ad ... --batch-key batch --cache DIR

PCA, Harmony, ComBat, SCVI (default, and as its integration tutorials set it), scANVI (told the
labels: for orientation), ours: latent means and the map; ``--variants`` ways in which covariates
enter our decoder. Figures are scib-metrics', 0 to 1, 1 best, totals too. Beside them ``best NMI``
and ``best ARI`` over Leiden resolutions, ``across``, the share of cells whose type 15 neighbours of
other batches tell, and ``told``: by how many points neighbours within a type say a cell's batch
better than chance, 0 best. ``--elbo`` adds the held-out ELBO (nats a cell, a fifth of the cells) of
each variant, and of a fit that is not told of batches.
"""

from contextlib import contextmanager
from functools import partial

import _methods as methods
import _mixing as mixing
import _views as views
import numpy as np
import torch
from _common import Clock, medians, print_table, split, write_json
from _methods import Data

import scuvae
from scuvae.inference.training.level_effects import LevelEffects
from scuvae.inference.training.step import Step
from scuvae.model import decoder
from scuvae.model.decoder import Decoder
from scuvae.tl import _embed, _fit

RESOLUTIONS = tuple(np.round(np.arange(0.1, 2.01, 0.1), 1))
COLUMNS = {
    "model": ("representation", ""),
    "cpu_s": ("CPU s", ".1f"),
    "total": ("total", ".3f"),
    "batch": ("batch", ".3f"),
    "bio": ("bio", ".3f"),
    "ilisi": ("iLISI", ".3f"),
    "kbet": ("kBET", ".3f"),
    "graph": ("graph", ".3f"),
    "bras": ("BRAS", ".3f"),
    "pcr": ("PCR", ".3f"),
    "told": ("told", ".3f"),
    "nmi": ("NMI", ".3f"),
    "ari": ("ARI", ".3f"),
    "silhouette": ("silhouette", ".3f"),
    "isolated": ("isolated", ".3f"),
    "clisi": ("cLISI", ".3f"),
    "leiden_nmi": ("best NMI", ".3f"),
    "leiden_ari": ("best ARI", ".3f"),
    "across": ("across", ".3f"),
    "elbo": ("ELBO held out", ".2f"),
}


def judged(data, points):
    """All figures of one representation."""
    before = views.pca(views.log_normalised(data.adata.X), 50)
    code = np.unique(data.batches, return_inverse=True)[1]
    others = views.neighbours(points, 15, among=code)
    best = views.best_agreement(views.leiden(points, RESOLUTIONS), data.labels)
    return {
        **mixing.scib(points, data.labels, data.batches, before),
        **{f"leiden_{name}": value for name, value in best.items()},
        "across": float((views.vote(others, data.labels) == data.labels).mean()),
        "told": mixing.told_apart(points, data.labels, data.batches),
    }


# --- ways in which covariates enter --------------------------------------------------------------


@contextmanager
def variant(name):
    """Inside, decoders are told of covariates in another way.

    ``as it is``: in the first layer and at the output, whose prior learns its width; ``output``: at
    the output alone; ``first``: in the first layer alone; ``fixed``: at the output under a normal
    prior of fixed width, ``free``, ``shrunk``: one a tenth or ten times as tight; ``low rank 2``:
    batches' shifts at the output of so many directions; ``no slopes``: as shifts alone; ``slopes
    30``: slopes of levels under a prior of this precision; ``unaligned``: the map of z as it is.
    """
    precision, beside, shift = Decoder.output_precision, Decoder._beside, Decoder._shift
    with_slopes, of_slopes = _fit.with_slopes, decoder._SLOPE_PRECISION
    fit_alignment, update, move = _embed.fit_alignment, LevelEffects.update, Step._move

    def of_low_rank(rank):
        def moved(self, end):
            move(self, end)
            decoder = self.model.decoder
            shifts = decoder.output.weight.data[:, -decoder.n_covariates :]
            u, s, vh = torch.linalg.svd(shifts, full_matrices=False)
            shifts.copy_(u[:, :rank] * s[:rank] @ vh[:rank])

        return moved

    def other_precision(by):
        def changed(self, n_obs):
            found = precision(self, n_obs)
            if self.n_covariates and self.linear_path:
                found[:, -self.n_covariates :] *= by
            return found

        return changed

    def without_output(self, hidden, z, covariates):
        return beside(self, hidden, z, None if covariates is None else 0 * covariates)

    def without_first(self, values, covariates):
        return values if len(self.layers) > 1 else shift(self, values, covariates)

    if name == "output":
        Decoder._shift = without_first
    elif name in ("fixed", "free", "shrunk"):
        LevelEffects.update = lambda *args: None
        by = {"fixed": 1.0, "free": 0.1, "shrunk": 10.0}[name]
        Decoder.output_precision = other_precision(by)
    elif name.startswith("low rank "):
        Step._move = of_low_rank(int(name.removeprefix("low rank ")))
    elif name == "first":
        Decoder._beside = without_output
    elif name == "unaligned":
        _embed.fit_alignment = lambda *args: None
    elif name == "no slopes":
        _fit.with_slopes = lambda *args: False
    elif name.startswith("slopes "):
        decoder._SLOPE_PRECISION = float(name.removeprefix("slopes "))
    try:
        yield
    finally:
        Decoder.output_precision, Decoder._beside, Decoder._shift = precision, beside, shift
        _fit.with_slopes, decoder._SLOPE_PRECISION = with_slopes, of_slopes
        _embed.fit_alignment, LevelEffects.update, Step._move = fit_alignment, update, move


def ours(data, seed, label, arguments, way):
    with variant(way):
        adata, seconds = methods.fit(data, data.adata.X, seed, arguments)
    name = label if way == "as it is" else f"{label}, {way}"
    for what, points in (("latent", adata.obsm["X_scuvae"]), ("map", methods.our_map(adata))):
        row = {"model": f"{name}: {what}", "seed": seed, "cpu_s": seconds}
        yield row | judged(data, np.asarray(points))


def held_out_elbo(data, seed, arguments, way):
    """Of cells that no fit of this seed has seen; ``not told``: without batches."""
    known, new = split(data.with_counts(data.adata.X), seed)
    options = {"likelihood": "nb", "batch_key": data.batch_key, **arguments}
    if way == "not told":
        options["batch_key"] = None
    with variant(way):
        scuvae.tl.fit(known, rng=seed, progress=False, device="cpu", **options)
    scuvae.tl.project(new, known)
    scuvae.tl.score(new)
    return float(new.obs["scuvae_elbo"].mean())


def others(data, args, seed):
    def row(what, label, make):
        def made():
            points, seconds = make()
            return {"cpu_s": seconds, **judged(data, points)}

        return {"model": label, "seed": seed, **data.remember(f"scib_{what}", made)}

    def pca():
        clock = Clock()
        return views.pca(views.log_normalised(data.adata.X), 50), clock.seconds()

    def harmony():
        clock = Clock()
        return methods.harmony(pca()[0], data, seed), clock.seconds()

    def combat():
        import scanpy as sc

        clock = Clock()
        adata = data.with_counts(data.adata.X)
        adata.X = views.log_normalised(data.adata.X)
        sc.pp.combat(adata, key=data.batch_key)
        return views.pca(np.asarray(adata.X), 50), clock.seconds()

    def scvi(setting):
        found = methods.scvi(data, seed, setting=setting)
        return found["latent"], float(found["cpu_s"])

    def scanvi():
        found = methods.scanvi(data, seed)
        return found["latent"], float(found["cpu_s"])

    if "pca" in args.models:
        yield row("pca", "PCA 50", pca)
    if "combat" in args.models:
        yield row("combat", "ComBat, PCA 50", combat)
    if "harmony" in args.models:
        yield row(f"harmony_seed{seed}", "Harmony, PCA 50", harmony)
    labels = {"scvi": "SCVI", "scvi_tutorial": "SCVI, 2 layers, 30 latent"}
    for setting in (name for name in labels if name in args.models):
        what = f"{methods.row_name(setting, args)}_seed{seed}"
        yield row(what, labels[setting], partial(scvi, setting))
    if "scanvi" in args.models:
        yield row(f"scanvi_seed{seed}", "scANVI (knows labels)", scanvi)


def main():
    those = ["pca", "combat", "harmony", "scvi", "scvi_tutorial", "scanvi"]
    models = [*methods.OURS, *those]
    parser = methods.parser(__doc__, models, ["unamortized", *those])
    parser.add_argument("--variants", nargs="+", default=["as it is"])
    parser.add_argument("--elbo", action="store_true", help="held-out ELBO of ours too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    methods.warm_up()
    results = []
    for path in args.data:
        data = Data(path, args)
        print(f"\n## {data}\n", flush=True)
        rows = []
        for seed in args.seeds:
            for label, arguments in methods.fits_of(args):
                for way in args.variants + (["not told"] if args.elbo else []):
                    elbo = held_out_elbo(data, seed, arguments, way) if args.elbo else None
                    if way == "not told":
                        found = [{"model": f"{label}, {way}", "seed": seed}]
                    else:
                        found = ours(data, seed, label, arguments, way)
                    for row in found:
                        row["elbo"] = elbo
                        methods.say(row)
                        rows.append(row)
            rows += others(data, args, seed)
        table = medians(rows, "model")
        print_table(table, COLUMNS)
        results.append({"data": data.name, "table": table, "rows": rows})
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    main()
