"""``scuvae demo``: two fits of 700 real cells, and pictures."""

import argparse
from pathlib import Path

from scuvae.cli.arguments import passed_on, progress
from scuvae.cli.files import checked_output, write

TEXT = "fit 700 real cells with and without an encoder, and draw both"


def add(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("scuvae-demo"),
        metavar="DIR",
        help="folder for demo.h5ad and the pictures, made if missing (default: %(default)s)",
    )
    progress(sub)


def run(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    output = checked_output(args.output / "demo.h5ad")
    from scuvae import _demo

    adata, report = _demo.run(args.output, **passed_on(args))
    write(adata, output)
    print(report)
