"""Words of the command line that name files."""

import argparse
from collections.abc import Callable
from pathlib import Path

SUFFIXES = (".h5ad", ".zarr")
TABLES = (".csv", ".tsv")
PICTURES = (".png", ".pdf", ".svg")


def path_of(*suffixes: str) -> Callable[[str], Path]:
    """What makes a path of a word, if it ends in one of some suffixes."""

    def path(text: str) -> Path:
        found = Path(text)
        if found.suffix not in suffixes:
            raise argparse.ArgumentTypeError(f"{text!r} does not end in {' or '.join(suffixes)}")
        return found

    return path


data_path = path_of(*SUFFIXES)
model_path = path_of(".scuvae")
reference_path = path_of(*SUFFIXES, ".scuvae")
table_path = path_of(*TABLES)
picture_path = path_of(*PICTURES)
json_path = path_of(".json")


def lines(text: str) -> list[str]:
    """The names in a text file, one a line."""
    try:
        lines = Path(text).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "no text in UTF-8"
        raise argparse.ArgumentTypeError(f"cannot read {text!r}: {why}") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r} holds no names")
    return names
