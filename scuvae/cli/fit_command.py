"""``scuvae fit``: fit the model to the counts of a file."""

import argparse
from typing import Any

from scuvae._launched import launched, number_of_processes
from scuvae.cli.arguments import (
    COVARIANCE,
    DEVICE,
    KEY_ADDED,
    LAYER,
    input_and_output,
    passed_on,
    progress,
    switch,
)
from scuvae.cli.files import checked_output, opened, reading

TEXT = "fit the model to the counts of a file"
INFERENCE: dict[str, bool | str] = {"unamortized": False, "amortized": True, "semi": "semi"}
FIT = {
    "model": [
        (
            "--likelihood",
            str,
            "NAME",
            "gaussian, poisson, nb, zinb, bernoulli; auto: nb for whole counts",
        ),
        ("--prior", str, "NAME", "standard_normal or mixture: of the latent variables"),
        ("--n-latent", int, "N", "latent dimensions"),
        ("--n-hidden", int, "N", "width of a hidden layer"),
        ("--n-layers", int, "N", "hidden layers; 0: a linear decoder"),
        COVARIANCE,
    ],
    "data": [
        LAYER,
        ("--mask-var", str, "COLUMN", "column of var: model only the genes where it is true"),
        ("--batch-key", str, "COLUMN", "column of obs with each cell's batch"),
        ("--size-factor-key", str, "COLUMN", "column of obs to use for the cells' totals"),
        ("--validation-fraction", float, "F", "share of the cells held out"),
    ],
    "training": [
        ("--max-epochs", int, "N", "stop after so many epochs"),
        ("--batch-size", int, "N", "cells in a batch"),
        ("--learning-rate", float, "F", "step size of the optimizer"),
        ("--optimizer", str, "NAME", "adam, rmsprop or sgd"),
        ("--local-step", str, "NAME", "natural or gradient: how a cell's posterior is updated"),
        ("--n-samples", int, "N", "draws per cell and step"),
        ("--kl-weight", float, "F", "weight of the KL divergence"),
        ("--dropout", float, "P", "share of the decoder's hidden units that a step drops"),
        ("--checkpoint", str, "FOLDER", "keep how far training has come; go on from there"),
        ("--checkpoint-every", float, "S", "seconds between checkpoints"),
        ("--processes", int, "N", "how many torchrun has started; 1: this one fits alone"),
        DEVICE,
        ("--rng", int, "SEED", "seed of all draws"),
        KEY_ADDED,
    ],
}


def add(sub: argparse.ArgumentParser) -> None:
    input_and_output(sub)
    groups = {title: sub.add_argument_group(title) for title in FIT}
    groups["model"].add_argument(
        "--inference",
        dest="amortized",
        action=_Inference,
        metavar="NAME",
        help="tl.fit's amortized=: unamortized (False: every cell its own posterior), amortized "
        "(True: an encoder) or semi",
    )
    for title, flags in FIT.items():
        for flag, kind, metavar, text in flags:
            groups[title].add_argument(flag, type=kind, metavar=metavar, help=text)
    for which, what in (("categorical", "labels"), ("continuous", "numbers")):
        groups["data"].add_argument(
            f"--{which}-covariate-keys",
            nargs="+",
            action="extend",
            metavar="COLUMN",
            help=f"columns of obs with {what} that the model is told as well",
        )
    switch(groups["training"], "--no-early-stopping", "run all epochs, whatever held-out cells say")
    switch(groups["data"], "--no-check-values", "let fractions pass under a count likelihood")
    progress(sub)


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


def run(args: argparse.Namespace) -> None:
    number, size = launched()
    number_of_processes(getattr(args, "processes", None))  # said before the file is read
    if number and size > 1:  # the first one writes
        from scuvae import tl

        tl.fit(reading(args), **passed_on(args))
        return
    output = checked_output(args.output, args.input)
    from scuvae import tl

    adata, save = opened(args, output)
    tl.fit(adata, **passed_on(args))
    save(adata, output)
