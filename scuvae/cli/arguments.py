"""Flags that several commands have, and what their words become."""

import argparse
import codecs
from collections.abc import Callable
from pathlib import Path
from typing import Any

SUFFIXES = (".h5ad", ".zarr")
# First lines of lists of genes that name none.
_HEADERS = {
    *("gene", "genes", "gene_name", "gene_names", "gene_id", "gene_ids", "gene_symbol", "x", "v1"),
    *("gene_symbols", "symbol", "symbols", "name", "names", "id", "ids", "index", "ensembl_id"),
    *("feature", "features", "feature_name", "feature_id", "var_names", "gene symbol", "gene name"),
}

# Flag, type, metavar, help. Names are checked by tl, which knows what is registered.
Flag = tuple[str, Any, str, str]
LAYER: Flag = ("--layer", str, "NAME", "layer with the counts, if not X")
COVARIANCE: Flag = ("--covariance", str, "KIND", "full or diagonal: of a cell's posterior")
DEVICE: Flag = ("--device", str, "NAME", "auto, cpu, cuda or mps")
KEY: Flag = ("--key", str, "KEY", "the fit to use, where there are several")
KEY_ADDED: Flag = ("--key-added", str, "KEY", "name of the slots written (default: X_scuvae, ...)")

# What the command line keeps for itself; every other argument goes to tl under its own name.
OWN = {"run", "input", "output", "reference", "backed", "verbose", "debug"}


def subcommand(
    commands: Any, name: str, text: str, run: Callable[[argparse.Namespace], None] | None = None
) -> argparse.ArgumentParser:
    """A parser with the flags of all commands; ``run`` is what main calls."""
    sub: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    if run is not None:
        sub.add_argument(
            "-v",
            "--verbose",
            action="count",
            default=0,
            help="log what is done; twice for more",
        )
        sub.add_argument(
            "--debug", action="store_true", default=False, help="show the traceback of an error"
        )
        sub.set_defaults(run=run)
    return sub


def passed_on(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if name not in OWN}


def input_and_output(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("input", type=data_path, help=".h5ad or .zarr; never written to")
    text = ".h5ad or .zarr; if it exists, replaced once the new one is complete"
    sub.add_argument("-o", "--output", type=data_path, required=True, metavar="FILE", help=text)
    text = "leave matrices on disk and read them as needed; inputs of 1 GB and more are by default"
    sub.add_argument("--backed", action="store_true", default=False, help=text)


# Any: the class of an argument group is private to argparse.
def switch(group: Any, flag: str, text: str) -> None:
    """``--no-x`` passes ``x=False``."""
    name = flag.removeprefix("--no-").replace("-", "_")
    group.add_argument(flag, dest=name, action="store_false", help=text)


def progress(sub: argparse.ArgumentParser) -> None:
    text = "no progress bar"
    sub.add_argument("-q", "--no-progress", dest="progress", action="store_false", help=text)


def data_path(text: str) -> Path:
    return _path(text, SUFFIXES)


def model_path(text: str) -> Path:
    return _path(text, (".scuvae",))


def reference_path(text: str) -> Path:
    return _path(text, (*SUFFIXES, ".scuvae"))


def _path(text: str, suffixes: tuple[str, ...]) -> Path:
    path = Path(text)
    if path.suffix not in suffixes:
        raise argparse.ArgumentTypeError(f"{text!r} does not end in {' or '.join(suffixes)}")
    return path


def lines(text: str) -> list[str]:
    """The names in a file, one a line, as editors, spreadsheets and R write them."""
    try:
        data = Path(text).read_bytes()
        # A byte-order mark says which; UTF-8 has one too where Windows wrote it.
        wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        lines = data.decode("utf-16" if wide else "utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError, ValueError) as error:
        why = getattr(error, "strerror", None) or "no text in UTF-8"
        raise argparse.ArgumentTypeError(f"cannot read {text!r}: {why}") from error
    names = [line.strip().strip("\"'").strip() for line in lines]
    names = [name for name in names if name]
    if names and names[0].lower() in _HEADERS:
        names = names[1:]
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r} holds no names")
    return names
