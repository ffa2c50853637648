"""``scuvae project``: posteriors of new cells under a fitted model."""

import argparse

from scuvae.cli.arguments import (
    COVARIANCE,
    DEVICE,
    KEY,
    KEY_ADDED,
    LAYER,
    input_and_output,
    lines,
    passed_on,
    reference_path,
)
from scuvae.cli.files import checked_output, opened, read

TEXT = "find the posterior of new cells under a fitted model"
PROJECT = [
    KEY,
    LAYER,
    COVARIANCE,
    ("--new-batches", str, "HOW", "error, or estimate: what a batch adds that the fit lacks"),
    ("--max-steps", int, "N", "local steps at most"),
    DEVICE,
    KEY_ADDED,
]


def add(sub: argparse.ArgumentParser) -> None:
    input_and_output(sub)
    text = "the file with the fit: .h5ad, .zarr or a model file, .scuvae"
    sub.add_argument("--reference", type=reference_path, required=True, metavar="FILE", help=text)
    for flag, kind, metavar, text in PROJECT:
        sub.add_argument(flag, type=kind, metavar=metavar, help=text)
    text = "text file with the names of the genes to condition on, one a line (default: all)"
    sub.add_argument("--genes", type=lines, metavar="FILE", help=text)
    text = "the encoder's posterior as it is, without local steps"
    sub.add_argument("--amortized", action="store_true", help=text)
    text = "further steps on each posterior; with the word moments, then its moments as they are"
    sub.add_argument("--polish", nargs="?", const=True, metavar="moments", help=text)


def run(args: argparse.Namespace) -> None:
    output = checked_output(args.output, args.input, args.reference)
    from scuvae import tl

    # A model file is read by tl, under the name of --key.
    model = args.reference.suffix == ".scuvae"
    reference = args.reference if model else read(args.reference)
    adata, save = opened(args, output)
    tl.project(adata, reference, **passed_on(args))
    save(adata, output)
