"""Flags of ``scuvae fit`` alone, in the groups of its ``--help``."""

import argparse
from typing import Any

from scuvae.cli.arguments import Flag, column, columns, fraction, number, switch, switch_off, word

INFERENCE: dict[str, bool | str] = {"unamortized": False, "amortized": True, "semi": "semi"}


class _Inference(argparse.Action):
    """Stores what ``tl.fit(amortized=)`` takes for the name of an inference scheme."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, INFERENCE.get(values, values))


FIT: dict[str, Flag] = {
    "amortized": Flag(
        "tl.fit's amortized=: unamortized (False: every cell its own posterior; the default), "
        "amortized (True: an encoder) or semi",
        str,
        "NAME",
        name="--inference",
        more={"action": _Inference},
    ),
    "likelihood": word("gaussian, poisson, nb, zinb, bernoulli; auto: nb for whole counts"),
    "dispersion": word("gene, or gene-batch: a dispersion of every gene in each batch"),
    "prior": word("standard_normal or mixture: of the latent variables"),
    "n_latent": number("latent dimensions"),
    "n_hidden": number("width of a hidden layer"),
    "n_layers": number("hidden layers; 0: a linear decoder"),
    "layer": Flag("layer with the counts, if not X", str, "NAME", "layers"),
    "mask_var": column("column of var: model only the genes where it is true", "var"),
    "batch_key": column("column of obs with each cell's batch"),
    "categorical_covariate_keys": columns(
        "columns of obs with labels that the model is told as well"
    ),
    "continuous_covariate_keys": columns(
        "columns of obs with numbers that the model is told as well"
    ),
    "size_factor_key": column("column of obs to use for the cells' totals"),
    "validation_fraction": fraction("share of the cells held out"),
    "check_values": switch_off("let fractions pass under a count likelihood"),
    "optimizer": word("adam, rmsprop or sgd"),
    "n_samples": number("draws per cell and step"),
    "kl_weight": fraction("weight of the KL divergence"),
    "dropout": fraction("share of the decoder's hidden units that a step drops", "P"),
    "early_stopping": switch_off("run all epochs, whatever held-out cells say"),
    "checkpoint": word("keep how far training has come; go on from there", "FOLDER"),
    "checkpoint_every": fraction("seconds between checkpoints", "S"),
    "key": word("the reference's fit, where it has several", "KEY"),
    "fine_tune": switch("train the reference's model on; without it its decoder stays"),
    "processes": number("how many torchrun has started; 1: this one fits alone"),
}
FIT_GROUPS: dict[str, tuple[str, ...]] = {
    "model": (
        *("amortized", "likelihood", "prior", "n_latent", "n_hidden", "n_layers"),
        *("dispersion", "covariance"),
    ),
    "data": (
        *("layer", "mask_var", "batch_key", "categorical_covariate_keys"),
        *("continuous_covariate_keys", "size_factor_key", "validation_fraction", "check_values"),
    ),
    "a finished fit (--reference)": ("key", "fine_tune"),
    "training": (
        *("max_epochs", "batch_size", "learning_rate", "optimizer", "local_step", "n_samples"),
        *("kl_weight", "dropout", "early_stopping", "checkpoint", "checkpoint_every"),
        "processes",
        *("device", "rng", "key_added", "progress"),
    ),
}
