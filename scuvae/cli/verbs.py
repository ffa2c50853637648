"""The verbs: what each is for, and which arguments of its function it takes.

A new argument of a function gets a flag by its name in the verb's table here; until then
``tests/test_cli_flags.py`` fails.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from scuvae.cli.arguments import (
    Flag,
    choose,
    column,
    fraction,
    needed,
    number,
    one_or_more,
    pairs,
    some_or_all,
    switch,
    switch_off,
    word,
)
from scuvae.cli.fit_flags import FIT, FIT_GROUPS
from scuvae.cli.paths import lines


@dataclass(frozen=True)
class Verb:
    """``calls`` a function, such as ``tl.score``, with the input and what flags say.

    ``reads``: ``counts``; a ``fit`` in the input; or counts and a ``reference`` with the fit.
    ``adds``: what is in the output that was not in the input. ``table``: the result can also be
    written as a table of this kind.
    """

    calls: str
    text: str
    adds: str
    names: tuple[str, ...] = ()
    own: dict[str, Flag] = field(default_factory=dict)
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    reads: str = "fit"
    table: str | None = None

    @property
    def flags(self) -> dict[str, dict[str, Flag]]:
        """Flags by title of their group."""
        groups = self.groups or {f"arguments of scuvae.{self.calls}": self.names}
        return {title: choose(names, self.own) for title, names in groups.items()}

    def all_flags(self) -> Iterator[tuple[str, Flag]]:
        for flags in self.flags.values():
            yield from flags.items()


CHECKS: dict[str, Verb] = {
    "predictive": Verb(
        "tl.predictive_check",
        "compare zeros, mean and variance of each gene with what the fit predicts",
        "uns: a table of genes (draw it: scuvae plot predictive-check)",
        ("key", "n_samples", "device"),
    ),
    "calibration": Verb(
        "tl.calibration",
        "simulate cells from the fit: do posterior intervals hold what they should?",
        "uns: coverages (draw them: scuvae plot calibration)",
        ("key", "n_cells", "levels", "covariance", "max_steps", "polish", "rng", "device"),
        {
            "n_cells": number("cells to simulate"),
            "levels": Flag("nominal coverages", float, "LEVEL", more={"nargs": "+"}),
        },
    ),
}

VERBS: dict[str, Verb] = {
    "fit": Verb(
        "tl.fit",
        "fit the model to the counts of a file",
        "the fit: posteriors and map (obsm), model and history (uns), split (obs)",
        own=FIT,
        groups=FIT_GROUPS,
        reads="counts",
    ),
    "project": Verb(
        "tl.project",
        "find the posterior of new cells under a fitted model",
        "posteriors and map of the new cells (obsm), and the reference's model (uns)",
        (
            *("key", "layer", "covariance", "new_batches", "max_steps", "device", "key_added"),
            *("genes", "amortized", "polish"),
        ),
        {
            "new_batches": word("error, or estimate: what a batch adds that the fit lacks", "HOW"),
            "genes": Flag(
                "text file with the names of the genes to condition on, one a line (default: all)",
                lines,
                "FILE",
            ),
            "amortized": switch("the encoder's posterior as it is, without local steps"),
        },
        reads="reference",
    ),
    "refine": Verb(
        "tl.refine",
        "improve the posteriors of fitted cells, the decoder untouched",
        "better posteriors, in place of the fit's own or under --key-added",
        (
            *("key", "key_added", "covariance", "local_step", "max_steps", "n_samples"),
            *("polish", "device"),
        ),
    ),
    "score": Verb(
        "tl.score",
        "score each cell's posterior: ELBO, its parts, an importance-weighted bound",
        "obs: nats per cell",
        ("key", "n_samples", "n_anneal", "rng", "device"),
        {"n_anneal": number("steps of annealed importance sampling; 0 for none")},
    ),
    "gap": Verb(
        "tl.amortization_gap",
        "measure what a fit's encoder costs each cell",
        "obs: nats per cell",
        ("key", "decompose", "max_steps", "n_samples", "rng", "device"),
        {"decompose": switch("also the approximation gaps, for both families of posteriors")},
    ),
    "denoise": Verb(
        "tl.denoise",
        "posterior mean expression of each cell and gene",
        "layers, or obsm where not all genes were modelled: expected counts",
        (
            *("key", "layer_added", "library_size", "genes", "batch", "covariates", "scale"),
            *("n_samples", "device"),
        ),
        {
            "layer_added": word("the slot to write (default: scuvae_denoised)"),
            "library_size": fraction("one total for all cells (default: each cell's own)"),
            "genes": Flag(
                "text file with names of genes, one a line: these alone, as a table",
                lines,
                "FILE",
            ),
            "batch": one_or_more(
                "decode as if from this batch; several, or average: their mean", "BATCH"
            ),
            "covariates": pairs("decode as if these covariates had these values"),
            "scale": switch("standard deviations of the means as well"),
        },
        table="genes",
    ),
    "extend-genes": Verb(
        "tl.extend_genes",
        "fit the decoder's last layer for genes that were not fitted, all else frozen",
        "uns: the further genes, which denoise and rank-genes then know",
        (
            *("genes", "mask_var", "layer", "key", "key_added", "min_counts"),
            *("n_samples", "device"),
        ),
        {
            "genes": Flag(
                "text file with names of genes to add, one a line (default: all that were not "
                "fitted)",
                lines,
                "FILE",
            ),
            "mask_var": column("column of var: add only genes where it is true", "var"),
            "key_added": word(
                "name of a fit to all genes, with posteriors of its own (default: the fit itself "
                "gets them)",
                "KEY",
            ),
            "min_counts": number("genes with fewer counts are left out"),
            "n_samples": number("draws per cell that the genes are fitted to"),
        },
    ),
    "embed": Verb(
        "tl.embed",
        "make the map of a fit anew, with another number of components or unaligned",
        "obsm: the map",
        ("key", "n_components", "align", "device"),
        {
            "n_components": number("principal components to keep"),
            "align": switch_off("cells of a kind are not brought together over covariates"),
        },
    ),
    "neighbors": Verb(
        "pp.neighbors",
        "make a neighbour graph of posteriors, in scanpy's slots",
        "obsp: the graph; obs: how stable each cell's neighbourhood is",
        ("key", "n_neighbors", "n_samples", "key_added", "rng"),
        {
            "n_neighbors": number("cells of a neighbourhood, the cell itself included"),
            "n_samples": number("draws of every cell's posterior"),
            "key_added": word("name of the graph's slots (default: scanpy's own)", "KEY"),
        },
    ),
    "rank-genes": Verb(
        "tl.rank_genes",
        "find genes that differ between groups of cells, donors as replicates",
        "uns: a table a group, as scanpy's rank_genes_groups has them",
        (
            *("groupby", "groups", "reference", "donor_key", "key", "key_added", "threshold"),
            *("min_counts", "n_samples", "device"),
        ),
        {
            "groupby": needed(column("column of obs with names of groups")),
            "groups": some_or_all("those to compare (default: all)", "GROUP"),
            "reference": word("the group to compare with (default: rest, all other cells)"),
            "donor_key": column("column of obs that says whose a cell is"),
            "key_added": word("the slot of uns to write (default: rank_genes_groups)", "KEY"),
            "threshold": fraction("the smallest change that matters, in log2"),
            "min_counts": number("genes with fewer counts are not tested"),
        },
        table="groups",
    ),
    "transfer-labels": Verb(
        "tl.transfer_labels",
        "label new cells by the reference cells that explain them best",
        "obs: the label, its probability and its share of the votes; obsm: all probabilities",
        (
            *("labels", "key", "layer", "key_added", "n_neighbors", "n_reference"),
            *("calibrate", "min_probability", "max_novelty", "rng", "device"),
        ),
        {
            "labels": word("column of the reference's obs (default: cell_type)", "COLUMN"),
            "n_neighbors": number("effective number of voters at least"),
            "calibrate": switch_off("votes as they are, no probabilities"),
            "min_probability": fraction("cells whose label is less probable are unassigned"),
            "max_novelty": fraction("cells that are more novel are unassigned"),
        },
        reads="reference",
    ),
    "novelty": Verb(
        "tl.novelty",
        "how surprising each cell is, against the reference's own",
        "obs: −log10 of the share of reference cells as surprising, and its parts",
        (
            *("key", "layer", "key_added", "n_samples", "n_reference", "n_neighbors"),
            *("adjust_genes", "rng", "device"),
        ),
        {
            "n_neighbors": number("cells of a neighbourhood; 1: each cell by itself"),
            "adjust_genes": switch("take out what each gene is off by in all new cells"),
        },
        reads="reference",
    ),
    "to-encoder": Verb(
        "tl.to_encoder",
        "give a fit without an encoder one",
        "the fit with an encoder, and what the encoder loses on each cell (obs)",
        (
            *("key", "key_added", "max_epochs", "batch_size", "learning_rate", "rng"),
            *("device", "progress"),
        ),
    ),
}

PLOT_FLAGS: dict[str, Flag] = {
    "keys": Flag("the fits to draw (default: all)", str, "KEY", more={"nargs": "+"}),
    "oracle": Flag("layer with the true means, where they are known", str, "NAME", "layers"),
    "layer": Flag("layer with what was observed (default: what was fitted)", str, "NAME", "layers"),
    "max_points": number("points at most, chosen at random"),
    "basis": word("the embedding, such as umap", "NAME"),
    "color": one_or_more(
        "scores, such as scale, elbo, novelty (default: what the fit has)", "SCORE"
    ),
    "groupby": column("column of obs with categories"),
    "labels": column("column of obs with the true labels (default: the reference's own cells)"),
    "refined_key": word("the fit with the refined posteriors", "KEY"),
    "max_arrows": number("cells with an arrow"),
    "group": word("the group to draw (default: the first)"),
    "fdr": fraction("expected share of false genes in the list"),
    "n_genes": number("genes to name"),
}


def _picture(calls: str, text: str, *names: str) -> Verb:
    return Verb(calls, text, "", names, PLOT_FLAGS)


PLOTS: dict[str, Verb] = {
    "loss": _picture("pl.loss", "how the loss fell while fitting", "keys"),
    "observed-vs-predicted": _picture(
        "pl.observed_vs_predicted",
        "counts against their predictions (denoise first)",
        "keys",
        "oracle",
        "layer",
        "max_points",
    ),
    "embedding-scores": _picture(
        "pl.embedding_scores",
        "per-cell scores on a UMAP or another embedding",
        "basis",
        "key",
        "color",
    ),
    "latent-dimensions": _picture(
        "pl.latent_dimensions", "how much each latent dimension is used", "keys"
    ),
    "amortization-gap": _picture(
        "pl.amortization_gap", "what the encoder costs by group (gap first)", "groupby", "key"
    ),
    "calibration": _picture(
        "pl.calibration", "coverage of intervals (check calibration first)", "key"
    ),
    "predictive-check": _picture(
        "pl.predictive_check",
        "genes' zeros, means, variances (check predictive first)",
        "key",
        "n_genes",
    ),
    "elbo-by-size": _picture(
        "pl.elbo_by_size", "ELBO against library size (score first)", "key", "groupby", "layer"
    ),
    "refinement-arrows": _picture(
        "pl.refinement_arrows",
        "where refinement moved the cells",
        "key",
        "refined_key",
        "basis",
        "groupby",
        "max_arrows",
    ),
    "volcano": _picture(
        "pl.volcano",
        "change and probability of each gene (rank-genes first)",
        "group",
        "key",
        "fdr",
        "n_genes",
    ),
    "label-reliability": _picture(
        "pl.label_reliability", "how often labels of a probability are right", "labels", "key"
    ),
}
