"""``scuvae model``: model files, a fit without its cells."""

import argparse

from scuvae.cli.arguments import KEY, data_path, model_path, subcommand
from scuvae.cli.files import checked_output, described, read

TEXT = "write a fit's model to a file without cells, or show what such a file holds"


def add(sub: argparse.ArgumentParser) -> None:
    kinds = sub.add_subparsers(title="commands", required=True, metavar="COMMAND")

    writing = subcommand(kinds, "write", "write the model of a fit", _write)
    writing.add_argument("input", type=data_path, help="the file with the fit, .h5ad or .zarr")
    text = "a .scuvae file; if it exists, replaced once the new one is complete"
    writing.add_argument("output", type=model_path, help=text)
    flag, kind, metavar, text = KEY
    writing.add_argument(flag, type=kind, metavar=metavar, help=text)
    showing = subcommand(kinds, "show", "check a model file, and show what it holds", _show)
    showing.add_argument("input", type=model_path, help="a .scuvae file")


def _write(args: argparse.Namespace) -> None:
    output = checked_output(args.output, args.input)
    from scuvae import io

    io.write_model(output, read(args.input), key=getattr(args, "key", None))


def _show(args: argparse.Namespace) -> None:
    from scuvae import io

    print(described(io.read_model(args.input)))
