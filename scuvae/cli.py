"""The command line: ``scuvae fit``, ``scuvae project``, ``scuvae demo``.

Flags carry the names of the keyword arguments of ``tl``, and an unset flag is not passed, so
that defaults stand in ``tl`` alone. torch, anndata and scanpy are imported once the arguments
are known to be good: ``--help`` and a mistyped path answer at once.
"""

import argparse
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import TYPE_CHECKING, Any

from scuvae import __version__

if TYPE_CHECKING:
    from anndata import AnnData

SUFFIXES = (".h5ad", ".zarr")
INFERENCE: dict[str, bool | str] = {"unamortized": False, "amortized": True, "semi": "semi"}

# Errors that speak to the user; any other is a fault of the package, and named as one.
EXPECTED = (ValueError, TypeError, LookupError, OSError, ArithmeticError)

# What the command line keeps for itself; every other argument goes to tl under its own name.
OWN = {"run", "input", "output", "reference", "backed", "verbose", "debug"}


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        with _terminable(), _messages(args.verbose):
            args.run(args)
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except _Terminated:
        return _say("terminated", 143)
    except Exception as error:
        if args.debug:
            raise
        return _say(f"error: {_one_line(error)}", 1)
    return 0


# ---------------------------------------------------------------------------------- arguments


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="scuvae",
        description="Variational autoencoders for single-cell counts, with or without an encoder.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"scuvae {__version__}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument(
        "-v", "--verbose", action="count", default=0, help="log what is done; twice for more"
    )
    common.add_argument(
        "--debug", action="store_true", default=False, help="show the traceback of an error"
    )

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = commands.add_parser(
            name,
            parents=[common],
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
        )
        sub.set_defaults(run=run)
        return sub

    _fit_arguments(command("fit", _fit, "fit the model to the counts of a file"))
    _project_arguments(
        command("project", _project, "find the posterior of new cells under a fitted model")
    )
    demo = command("demo", _demo, "fit 700 real cells with and without an encoder, and draw both")
    demo.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("scuvae-demo"),
        metavar="DIR",
        help="folder for demo.h5ad and the pictures, made if missing (default: %(default)s)",
    )
    _progress_argument(demo)
    return top


# Flag, type, metavar, help. Names are checked by tl, which knows what is registered.
LAYER = ("--layer", str, "NAME", "layer with the counts, if not X")
COVARIANCE = ("--covariance", str, "KIND", "full or diagonal: of a cell's posterior")
DEVICE = ("--device", str, "NAME", "auto, cpu, cuda or mps")
KEY_ADDED = ("--key-added", str, "KEY", "name of the slots written (default: X_scuvae, ...)")
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
        DEVICE,
        ("--rng", int, "SEED", "seed of all draws"),
        KEY_ADDED,
    ],
}
PROJECT = [
    ("--key", str, "KEY", "the fit to use, where there are several"),
    LAYER,
    COVARIANCE,
    ("--new-batches", str, "HOW", "error, or estimate: what a batch adds that the fit lacks"),
    ("--max-steps", int, "N", "local steps at most"),
    DEVICE,
    KEY_ADDED,
]


def _fit_arguments(sub: argparse.ArgumentParser) -> None:
    _files(sub)
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
    _switch(
        groups["training"], "--no-early-stopping", "run all epochs, whatever held-out cells say"
    )
    _switch(groups["data"], "--no-check-values", "let fractions pass under a count likelihood")
    _progress_argument(sub)


def _project_arguments(sub: argparse.ArgumentParser) -> None:
    _files(sub)
    text = "the file with the fit"
    sub.add_argument("--reference", type=_data_path, required=True, metavar="FILE", help=text)
    for flag, kind, metavar, text in PROJECT:
        sub.add_argument(flag, type=kind, metavar=metavar, help=text)
    text = "text file with the names of the genes to condition on, one a line (default: all)"
    sub.add_argument("--genes", type=_lines, metavar="FILE", help=text)
    text = "the encoder's posterior as it is, without local steps"
    sub.add_argument("--amortized", action="store_true", help=text)
    text = "further steps on each posterior; with the word moments, then its moments as they are"
    sub.add_argument("--polish", nargs="?", const=True, metavar="moments", help=text)


def _files(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("input", type=_data_path, help=".h5ad or .zarr; never written to")
    text = ".h5ad or .zarr; if it exists, replaced once the new one is complete"
    sub.add_argument("-o", "--output", type=_data_path, required=True, metavar="FILE", help=text)
    text = "leave matrices on disk and read them as needed; inputs of 1 GB and more are by default"
    sub.add_argument("--backed", action="store_true", default=False, help=text)


# Any: the class of an argument group is private to argparse.
def _switch(group: Any, flag: str, text: str) -> None:
    """``--no-x`` passes ``x=False``."""
    name = flag.removeprefix("--no-").replace("-", "_")
    group.add_argument(flag, dest=name, action="store_false", help=text)


def _progress_argument(sub: argparse.ArgumentParser) -> None:
    text = "no progress bar"
    sub.add_argument("-q", "--no-progress", dest="progress", action="store_false", help=text)


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


def _data_path(text: str) -> Path:
    path = Path(text)
    if path.suffix not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"{text!r} does not end in {' or '.join(SUFFIXES)}")
    return path


def _lines(text: str) -> list[str]:
    try:
        lines = Path(text).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "no text in UTF-8"
        raise argparse.ArgumentTypeError(f"cannot read {text!r}: {why}") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r} holds no names")
    return names


# ----------------------------------------------------------------------------------- commands


def _fit(args: argparse.Namespace) -> None:
    output = _checked_output(args.output, args.input)
    from scuvae import tl

    adata, write = _opened(args, output)
    tl.fit(adata, **_passed_on(args))
    _replace(output, write)


def _project(args: argparse.Namespace) -> None:
    output = _checked_output(args.output, args.input, args.reference)
    from scuvae import tl

    reference = _read(args.reference)
    adata, write = _opened(args, output)
    tl.project(adata, reference, **_passed_on(args))
    _replace(output, write)


def _demo(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    output = _checked_output(args.output / "demo.h5ad")
    from scuvae import _demo

    adata, report = _demo.run(args.output, **_passed_on(args))
    _replace(output, adata.write_h5ad)
    print(report)


def _passed_on(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if name not in OWN}


# -------------------------------------------------------------------------------------- files


def _checked_output(output: Path, *inputs: Path) -> Path:
    """The file that ``output`` names, links followed, or an error before any work."""
    for path in inputs:
        if not path.exists():
            raise ValueError(f"{path}: no such file")
    target = Path(os.path.realpath(output))
    for path in inputs:
        source = Path(os.path.realpath(path))
        # A .zarr store is a folder: writing into it, or replacing one that holds the input, counts.
        within = target.is_relative_to(source) or source.is_relative_to(target)
        if within or (target.exists() and target.samefile(source)):
            raise ValueError(f"{output} would overwrite {path}, which is read: name another output")
    if not target.parent.is_dir():
        raise ValueError(f"{target.parent}: no such folder to write {target.name} to")
    if target.suffix == ".zarr":
        store = any((target / name).is_file() for name in (".zgroup", "zarr.json"))
        if target.exists() and not store:
            raise ValueError(f"{output} exists and is no zarr store: name another output")
    elif target.is_dir():
        raise ValueError(f"{output} is a folder: name a file")
    try:
        _temporary(target).cleanup()  # permission bits do not tell; making one does
    except OSError as error:
        raise ValueError(f"cannot write to {target.parent}: {error.strerror}") from error
    return target


def _temporary(target: Path) -> "TemporaryDirectory[str]":
    """A folder beside ``target``, hence on its file system, where a rename is one step."""
    return TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.")


def _opened(args: argparse.Namespace, output: Path) -> tuple["AnnData", Callable[[Path], None]]:
    """The input, and what writes it with the results: a large one's matrices stay on disk."""
    path, like = args.input, args.input.suffix == output.suffix
    if args.backed and not like:
        raise ValueError(f"--backed copies the input: name an output that ends in {path.suffix}")
    from scuvae.io.backed_files import is_large, open_backed, write_backed

    if args.backed or (like and is_large(path)):
        backed = _reading(open_backed, path)
        return backed, lambda new: write_backed(backed, path, new, getattr(args, "key_added", None))
    adata = _read(path)
    return adata, adata.write_zarr if output.suffix == ".zarr" else adata.write_h5ad


def _read(path: Path) -> "AnnData":
    import anndata

    return _reading(anndata.read_zarr if path.suffix == ".zarr" else anndata.read_h5ad, path)


def _reading(read: "Callable[[Path], AnnData]", path: Path) -> "AnnData":
    try:
        return read(path)
    except Exception as error:
        raise ValueError(f"cannot read {path}: {_one_line(error)}") from error


def _replace(target: Path, write: Callable[[Path], None]) -> None:
    """Write beside ``target`` and rename, so that it is the old file or the new, never a part."""
    with _temporary(target) as folder:
        new = Path(folder) / target.name
        write(new)
        if not target.is_dir():
            os.replace(new, target)
            return
        # No rename replaces a folder that has files in it: the old store steps aside first.
        old = Path(folder) / "old"
        os.rename(target, old)
        try:
            os.rename(new, target)
        except BaseException:
            os.rename(old, target)
            raise


# ----------------------------------------------------------------------- messages and signals


class _Terminated(BaseException):
    """SIGTERM. Raised like Ctrl-C's, so that temporary folders are removed on the way out."""


@contextmanager
def _terminable() -> Iterator[None]:
    def terminate(signum: int, frame: FrameType | None) -> None:
        raise _Terminated

    try:
        before = signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # not the main thread: signals are the caller's
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _messages(verbose: int) -> Iterator[None]:
    """scuvae's log and Python's warnings as plain lines on stderr."""
    logger = logging.getLogger("scuvae")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("scuvae: %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)])

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        _say(f"warning: {' '.join(str(message).split())}")

    try:
        with warnings.catch_warnings():
            if not sys.warnoptions and not verbose:
                # These speak to the authors of scuvae and of its dependencies.
                warnings.simplefilter("ignore", FutureWarning)
                warnings.simplefilter("ignore", DeprecationWarning)
                warnings.filterwarnings("ignore", message="Writing zarr v2 data")
            warnings.showwarning = show
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _say(text: str, status: int = 0) -> int:
    print(f"scuvae: {text}", file=sys.stderr)
    return status


def _one_line(error: Exception) -> str:
    # str() of a KeyError is the repr of its message.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = " ".join(text.split())
    if text and isinstance(error, EXPECTED):
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)" if text else type(error).__name__


if __name__ == "__main__":
    raise SystemExit(main())
