"""The catalogue's rows that scvi-tools' SCVI allows, by the rules of the catalogue's tests.

``python tests/benchmarks/peers_catalogue.py [--ours]``. Rows come from the tables of
``tests/test_catalogue_*.py`` and ``test_errors.py``; those whose arguments SCVI has no word for are
left out. A row is as described where

- a wrong input is refused, before the first training step, in words that name the argument, slot,
  column or value, by an exception *or by a warning* (we must raise), and ``adata`` is as it was but
  for what ``setup_anndata`` says that it adds;
- what should be warned of is: any warning that names it counts;
- what should work does: one epoch, and latent means that are finite.

Each row has a process of its own, with 20 seconds and 16 GB. ``--ours`` sends the same rows through
``tl.fit`` by the same lenient rules.
"""

import argparse
import json
import os
import re
import resource
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anndata import AnnData

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import test_catalogue_arguments as arguments
import test_catalogue_columns as columns
import test_catalogue_names as names
import test_catalogue_values as values
import test_errors as errors
from catalogue import FIT, Row
from helpers import fingerprint
from scipy import sparse as sp

from scuvae import tl

# Our arguments, and what SCVI calls them in setup_anndata, the model and train.
SETUP = {
    "layer": "layer",
    "batch_key": "batch_key",
    "categorical_covariate_keys": "categorical_covariate_keys",
    "continuous_covariate_keys": "continuous_covariate_keys",
    "size_factor_key": "size_factor_key",
}
MODEL = {name: name for name in ("n_latent", "n_hidden", "n_layers")}
TRAIN = {name: name for name in ("max_epochs", "batch_size")}
LIKELIHOODS = {
    "auto": "zinb",  # its default
    "nb": "nb",
    "negative_binomial": "nb",
    "zinb": "zinb",
    "zero_inflated_negative_binomial": "zinb",
    "poisson": "poisson",
}
KNOWN = {*SETUP, *MODEL, *TRAIN, "likelihood"}
LIMIT = 20  # seconds of a row
# Words that name a matrix and what is wrong with it.
OF_VALUES = r"adata\.X|layer|count|nan|inf|finite|negative|integer|zero|\bX\b|dtype|sparse"


@dataclass(frozen=True)
class Asked:
    """A row: ``should`` be refused, warned of, or work; ``words``: a pattern of what names it."""

    table: str
    name: str
    should: str
    row: Row
    words: str


def _names(row: Row) -> str:
    """What names the thing that a row's options are about."""
    found = [name for name in row.options if name != "likelihood"]
    for value in row.options.values():
        found += [str(part) for part in (value if isinstance(value, list) else [value])]
    return "|".join(re.escape(part) for part in found if part)


def _table(table: str, should: str, rows: dict[str, Row], words: str = "") -> Iterator[Asked]:
    for name, row in rows.items():
        fits = set(row.options) <= KNOWN
        if fits and row.options.get("likelihood", "auto") in LIKELIHOODS:
            yield Asked(table, name, should, row, words or _names(row))


def _column(values: Any) -> Callable[[AnnData], None]:
    def change(adata: AnnData) -> None:
        adata.obs["c"] = values

    return change


def _matrix(make: Callable[[np.ndarray], Any]) -> Callable[[AnnData], AnnData]:
    return lambda adata: AnnData(make(adata.X), obs=adata.obs, var=adata.var)


def asked() -> list[Asked]:
    sizes = {
        f"{name}={value!r}": Row([], options={name: value})
        for name in (*MODEL, *TRAIN)
        for value in (0, -1, 2.5, True, float("nan"), "10")
        if (name, value) != ("n_layers", 0)
    }
    containers = {
        "CSR": sp.csr_matrix,
        "CSC": sp.csc_matrix,
        "CSR array": sp.csr_array,
        "CSC array": sp.csc_array,
        "Fortran order": np.asfortranarray,
        "int64": lambda x: x.astype(np.int64),
        "uint16": lambda x: x.astype(np.uint16),
        "float16": lambda x: x.astype(np.float16),
        "float64": lambda x: x.astype(np.float64),
        "bool": lambda x: x > 2,
        "big-endian": lambda x: x.astype(">f4"),
        "extended precision": lambda x: x.astype(np.longdouble),
        "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
        "strided": lambda x: np.repeat(x, 2, 0)[::2],
    }
    indexes = {
        f"cells named by {name}": Row(
            [], lambda adata, f=f: setattr(adata.obs, "index", f(adata.obs_names))
        )
        for name, f in names.INDEXES.items()
        if name not in ("all the same",)
    }
    stored = {
        f"batches as {name}": Row([], _column(held), {"batch_key": "c"})
        for name, (held, *_) in columns.NAMES.items()
    }
    shapes = {
        "one gene": Row([], lambda adata: adata[:, :1].copy()),
        "one left over in a batch": Row([], options={"batch_size": 53}),
        "a batch larger than the data": Row([], options={"batch_size": 1000}),
        "a view": Row([], lambda adata: adata[::2]),
    }
    return [
        *_table("values", "refused", values.WRONG, OF_VALUES),
        *_table(
            "values",
            "refused",
            {
                name: Row(says, _matrix(make), kind=TypeError)
                for name, (make, says) in errors.DTYPES.items()
            },
            OF_VALUES,
        ),
        *_table("values", "warned of", {**values.MEANT, **values.ROUNDED}, OF_VALUES),
        *_table("columns", "refused", names.WRONG),
        *_table("columns", "warned of", names.WARNED),
        *_table(
            "columns",
            "refused",
            {
                name: Row(says, _column(held), {"batch_key": "c"}, kind)
                for name, (held, kind, says) in columns.NO_NAMES.items()
            },
        ),
        *_table("columns", "work", stored),
        *_table("numbers", "refused", {**sizes, **arguments.SIZES}),
        *_table(
            "containers",
            "work",
            {name: Row([], _matrix(make)) for name, make in containers.items()},
        ),
        *_table("names and shapes", "work", {**indexes, **shapes}),
    ]


# --- the two ------------------------------------------------------------------------------------


def theirs(adata: AnnData, options: dict[str, Any], begun: Callable[[], None]) -> np.ndarray:
    import scvi

    step = scvi.train.TrainingPlan.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        begun()
        return step(self, *args, **kwargs)

    scvi.train.TrainingPlan.training_step = training_step
    setup = {SETUP[name]: value for name, value in options.items() if name in SETUP}
    scvi.model.SCVI.setup_anndata(adata, **setup)
    sizes = {name: value for name, value in options.items() if name in MODEL}
    kind = LIKELIHOODS[options.get("likelihood", "auto")]
    model = scvi.model.SCVI(adata, gene_likelihood=kind, **{"n_hidden": 8, "n_latent": 3, **sizes})
    given = {name: value for name, value in options.items() if name in TRAIN}
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False}
    model.train(**{"max_epochs": 1, "batch_size": 32, **quiet, **given})
    return model.get_latent_representation()


def ours(adata: AnnData, options: dict[str, Any], begun: Callable[[], None]) -> np.ndarray:
    import scuvae.inference.training.fit as training

    start = training.start

    def started(*args: Any, **kwargs: Any) -> Any:
        begun()
        return start(*args, **kwargs)

    training.start = started
    tl.fit(adata, **{**FIT, **options})
    return adata.obsm["X_scuvae"]


def _picture(adata: AnnData) -> Any:
    """All of ``adata`` but what ``setup_anndata`` adds and says that it adds."""
    found = fingerprint(adata)
    found["uns"] = {k: v for k, v in found["uns"].items() if not k.startswith("_scvi")}
    kept = [i for i, name in enumerate(found["obs"]["order"]) if not name.startswith("_scvi")]
    for part in ("columns", "order"):
        found["obs"][part] = [found["obs"][part][i] for i in kept]
    found["obsm"] = {k: v for k, v in found["obsm"].items() if not k.startswith("_scvi")}
    return found


def _outcome(one: Asked, fit: Callable[..., np.ndarray]) -> str:
    adata, worked = one.row.data(), []
    before = _picture(adata)
    error = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            means = fit(adata, dict(one.row.options), lambda: worked.append(True))
        except (Exception, SystemExit) as raised:
            error = raised
    said = [str(w.message) for w in caught]
    named = any(re.search(one.words, text, re.IGNORECASE) for text in said)
    if one.should == "work":
        if error is not None and ".copy()" in str(error):  # what the catalogue allows of views
            return ""
        if error is not None:
            return f"raises {type(error).__name__}: {str(error)[:80]}"
        return "" if np.isfinite(means).all() else "means that are not finite"
    if one.should == "warned of":
        told = named or (error is not None and re.search(one.words, str(error), re.IGNORECASE))
        return "" if told else "not a word"
    if error is None and not named:
        return "not a word"
    if error is not None and not named and not re.search(one.words, str(error), re.IGNORECASE):
        return f"names nothing: {type(error).__name__}: {str(error)[:80]}"
    if error is not None and worked and not named:
        return f"after the work has begun: {type(error).__name__}"
    if error is not None and _picture(adata) != before:
        return "adata is changed"
    return ""


def _apart(one: Asked, fit: Callable[..., np.ndarray]) -> str:
    """The outcome, of a process of its own."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(LIMIT)
        resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30, 16 * 2**30))
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            os.write(write, json.dumps(_outcome(one, fit)).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else "has not ended by itself"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ours", action="store_true")
    parser.add_argument("--first", type=int, default=0, help="rows before it are left out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.ours:
        pass  # before the processes, once
    fit, rows = (ours if args.ours else theirs), asked()[args.first :]
    right: dict[tuple[str, str], list[bool]] = {}
    for one in rows:
        end = _apart(one, fit)
        right.setdefault((one.table, one.should), []).append(not end)
        if end:
            print(f"{one.table}: {one.name} should be {one.should}: {end}", flush=True)
    for (table, should), ends in right.items():
        print(f"{table:>20} {should:>10} {sum(ends):>4} of {len(ends)}")
    ends = [end for part in right.values() for end in part]
    print(f"{'all':>20} {'':>10} {sum(ends):>4} of {len(ends)} as described")


if __name__ == "__main__":
    main()
