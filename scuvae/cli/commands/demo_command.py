"""``scuvae demo``: two fits of 700 real cells, and pictures."""

import argparse
from pathlib import Path
from typing import Any

from scuvae.cli.arguments import FLAGS, passed_on
from scuvae.cli.commands.verb_command import add_no_clobber
from scuvae.cli.files import checked_output, unclobbered, write
from scuvae.cli.parsers import runs, subcommand

TEXT = "fit 700 real cells with and without an encoder, and draw both"


def add(commands: Any, name: str) -> None:
    sub = subcommand(commands, name, TEXT, "[flags]")
    sub.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("scuvae-demo"),
        metavar="DIR",
        help="folder for demo.h5ad and the pictures, made if missing (default: %(default)s)",
    )
    add_no_clobber(sub)
    FLAGS["progress"].add(sub, "progress")
    runs(sub, run)


def run(args: argparse.Namespace) -> None:
    file = args.output / "demo.h5ad"
    if args.no_clobber:
        unclobbered(args, {"output": file})
    if args.dry_run:
        print(f"writes     {file} and pictures beside it\ndry run: nothing was computed or written")
        return
    args.output.mkdir(parents=True, exist_ok=True)
    output = checked_output(file)
    from scuvae import _demo

    adata, report = _demo.run(args.output, **passed_on(args, ["progress"]))
    write(adata, output)
    print(report)
