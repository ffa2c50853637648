"""``scuvae plot``: a picture of what is in a file."""

import argparse
from typing import Any

from scuvae.cli.arguments import passed_on
from scuvae.cli.commands.verb_command import add_no_clobber, check_names, function_of, plan
from scuvae.cli.files import checked_output, read_slots, unclobbered
from scuvae.cli.parsers import runs, subcommand
from scuvae.cli.paths import data_path, picture_path
from scuvae.cli.verbs import PLOTS, Verb

TEXT = "draw a picture of what is in a file"


def add(commands: Any, name: str) -> None:
    kinds = subcommand(commands, name, TEXT).add_subparsers(
        title="pictures", required=True, metavar="PICTURE"
    )
    for name, picture in PLOTS.items():
        one = subcommand(kinds, name, picture.text, "INPUT -o FILE [flags]")
        text = ".h5ad or .zarr; never written to"
        one.add_argument("input", type=data_path, metavar="INPUT", help=text)
        text = ".png, .pdf or .svg; if it exists, replaced"
        one.add_argument(
            "-o", "--output", type=picture_path, required=True, metavar="FILE", help=text
        )
        add_no_clobber(one)
        group = one.add_argument_group(f"arguments of scuvae.{picture.calls}")
        for argument, flag in picture.all_flags():
            flag.add(group, argument)
        runs(one, run)
        one.set_defaults(verb=picture, backed=False)


def run(args: argparse.Namespace) -> None:
    picture: Verb = args.verb
    arguments = passed_on(args, picture.names)
    targets = {"output": checked_output(args.output, args.input)}
    unclobbered(args, targets)
    import matplotlib

    matplotlib.use("Agg")  # to a file only: no window, no display needed
    function = function_of(picture.calls)
    adata = read_slots(args)
    if args.dry_run:
        check_names(adata, picture, arguments)
        print(plan(args, adata, arguments, targets))
        return
    function(adata, **arguments, show=False, save=targets["output"])
