"""``scuvae model``: model files, a fit without its cells."""

import argparse
from typing import Any

from scuvae.cli.arguments import FLAGS
from scuvae.cli.commands.verb_command import add_json, add_no_clobber
from scuvae.cli.files import checked_output, read, unclobbered, write_text
from scuvae.cli.parsers import runs, subcommand
from scuvae.cli.paths import SUFFIXES, data_path, model_path, path_of

TEXT = "write a fit's model to a file without cells, or show what a fit or such a file holds"


def add(commands: Any, name: str) -> None:
    kinds = subcommand(commands, name, TEXT).add_subparsers(
        title="commands", required=True, metavar="COMMAND"
    )

    text = "write the model of a fit"
    writing = subcommand(kinds, "write", text, "INPUT OUTPUT [flags]")
    text = "the file with the fit, .h5ad or .zarr"
    writing.add_argument("input", type=data_path, metavar="INPUT", help=text)
    text = "a .scuvae file; if it exists, replaced once the new one is complete"
    writing.add_argument("output", type=model_path, metavar="OUTPUT", help=text)
    add_no_clobber(writing)
    FLAGS["key"].add(writing, "key")
    runs(writing, _write)

    text = "check a model file or a fit, and show what it holds"
    showing = subcommand(kinds, "show", text, "INPUT [flags]")
    files = path_of(".scuvae", *SUFFIXES)
    text = "a .scuvae file, or .h5ad or .zarr with a fit"
    showing.add_argument("input", type=files, metavar="INPUT", help=text)
    add_json(showing)
    add_no_clobber(showing)
    FLAGS["key"].add(showing, "key")
    runs(showing, _show)


def _write(args: argparse.Namespace) -> None:
    output = checked_output(args.output, args.input)
    unclobbered(args, {"output": output})
    from scuvae import get, io

    adata, key = read(args.input), getattr(args, "key", None)
    if args.dry_run:
        print(f"{get.fit(adata, key=key)}\nwrites {args.output}\ndry run: nothing was written")
        return
    io.write_model(output, adata, key=key)


def _show(args: argparse.Namespace) -> None:
    target = None if args.json is None else checked_output(args.json, args.input)
    if target is not None:
        unclobbered(args, {"json": target})
    from scuvae import get, io
    from scuvae.io.fit_state import read_entry

    is_model, key = args.input.suffix == ".scuvae", getattr(args, "key", None)
    adata = io.read_model(args.input) if is_model else read(args.input)
    model = get.model(adata, key=key)  # checks its arrays
    print(get.fit(adata, key=key))
    numbers = sum(p.numel() for p in model.parameters())
    names = read_entry(adata, key)["var_names"]
    genes = ", ".join([*map(str, names[:5]), *(["..."] if len(names) > 5 else [])])
    print(f"  parameters  {numbers:,}\n  genes       {len(names):,}: {genes}")
    if target is not None and not args.dry_run:
        from scuvae.cli.report import report

        write_text(report(args, adata, {} if key is None else {"key": key}, 0.0), target)
