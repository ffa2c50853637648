"""What the command line says."""

import argparse
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Errors that speak to the user; any other is a fault of the package, and named as one.
EXPECTED = (ValueError, TypeError, LookupError, OSError, ArithmeticError)


@contextmanager
def messages(verbose: int) -> Iterator[None]:
    """scuvae's log and Python's warnings as plain lines on stderr.

    Where a bar would be drawn on a terminal and there is none, now and then a line says how far
    training has come.
    """
    logger, progress = logging.getLogger("scuvae"), logging.getLogger("scuvae.progress")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("scuvae: %(message)s"))
    levels = logger.level, progress.level
    logger.addHandler(handler)
    logger.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)])
    progress.setLevel(logging.INFO)

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        say(f"warning: {' '.join(str(message).split())}")

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
        logger.setLevel(levels[0])
        progress.setLevel(levels[1])


def say(text: str, status: int = 0) -> int:
    print(f"scuvae: {text}", file=sys.stderr)
    return status


def one_line(error: Exception) -> str:
    # str() of a KeyError is the repr of its message.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = " ".join(text.split())
    if text and isinstance(error, EXPECTED):
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)" if text else type(error).__name__


def located(error: Exception, args: argparse.Namespace) -> str:
    """:func:`one_line`, after the command and the file that it was about."""
    files = getattr(args, "input", "")
    text, file = one_line(error), " ".join(map(str, files if isinstance(files, list) else [files]))
    where = f"{args.command} {file}" if file and file not in text else str(args.command)
    return f"{where}: {text}"
