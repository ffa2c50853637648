"""Words of the command line that name files."""

import argparse
import codecs
import os
from collections.abc import Callable
from pathlib import Path

SUFFIXES = (".h5ad", ".zarr")
TABLES = (".csv", ".tsv")
PICTURES = (".png", ".pdf", ".svg")
# First lines of lists of genes that name none.
_HEADERS = {
    *("gene", "genes", "gene_name", "gene_names", "gene_id", "gene_ids", "gene_symbol", "x", "v1"),
    *("gene_symbols", "symbol", "symbols", "name", "names", "id", "ids", "index", "ensembl_id"),
    *("feature", "features", "feature_name", "feature_id", "var_names", "gene symbol", "gene name"),
}


def path_of(*suffixes: str) -> Callable[[str], Path]:
    """What makes a path of a word, if it ends in one of some suffixes."""

    def path(text: str) -> Path:
        found = Path(text)
        if found.suffix not in suffixes:
            raise argparse.ArgumentTypeError(f"{text!r} does not end in {' or '.join(suffixes)}")
        return found

    return path


data_path = path_of(*SUFFIXES)


def source_path(text: str) -> Path:
    """A file of cells, or a folder of such files."""
    found = Path(text)
    return found if os.path.isdir(text) else data_path(text)


model_path = path_of(".scuvae")
reference_path = path_of(*SUFFIXES, ".scuvae")
table_path = path_of(*TABLES)
picture_path = path_of(*PICTURES)
json_path = path_of(".json")


def lines(text: str) -> list[str]:
    """The names in a file, one a line, as editors, spreadsheets and R write them."""
    try:
        if Path(text).exists() and not Path(text).is_file():
            raise argparse.ArgumentTypeError(f"{text!r} is no file: name a text file of genes")
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
