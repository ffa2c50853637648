"""Which fit a checkpoint is of."""

import tempfile
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anndata import AnnData

from scuvae.batches import Cells
from scuvae.batches.sparse_rows import dense
from scuvae.inference.training.checkpoint import Checkpoint, digest

# Where a fit is made does not make it another one.
_ELSEWHERE = {"device", "torch_version", "anndata_version"}
# Cells whose values tell a data set from another, beside every cell's total.
_LOOKED_AT = 200


def check_folder(checkpoint: object) -> None:
    """Raise, before any work, if checkpoints cannot be kept there."""
    if not isinstance(checkpoint, str | PathLike) or not isinstance(fspath(checkpoint), str):
        raise TypeError(
            f"checkpoint={checkpoint!r} is a {type(checkpoint).__name__}: pass the path of a folder"
        )
    shown = repr(fspath(checkpoint))
    if not fspath(checkpoint).strip("\0") or "\0" in fspath(checkpoint):
        raise ValueError(f"checkpoint={shown} is no path: pass that of a folder")
    folder = Path(checkpoint)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        what = "" if there == folder else f"lies in {str(there)!r}, which "
        raise ValueError(f"checkpoint={shown} {what}is a file: pass a folder")
    try:
        # Permission bits do not tell; making a file does.
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise type(error)(
            error.errno,
            f"checkpoint={shown}: {there} cannot be written to, {error.strerror}: pass another "
            "folder",
        ) from error


def kept_in(
    folder: str | PathLike[str],
    every: float,
    adata: AnnData,
    genes: np.ndarray | None,
    params: dict[str, Any],
    cells: Cells,
) -> Checkpoint:
    """The checkpoints of a fit, which say of which cells, genes and settings it is."""
    found = {name: value for name, value in params.items() if name not in _ELSEWHERE}
    where = cells.size_factor.device
    some = torch.linspace(0, len(cells) - 1, min(len(cells), _LOOKED_AT)).long()
    values = dense(cells.batch(some.to(where)).x)
    names = adata.var_names if genes is None else adata.var_names[genes]
    found["genes"], found["cells"] = digest(names.astype(str)), digest(adata.obs_names.astype(str))
    found["values"] = digest(cells.source.totals(), cells.size_factor, values)
    if (told := cells.covariates) is not None:
        parts = torch.arange(len(cells), device=where).split(2**16)
        found["covariates"] = digest(*(told.rows(part) for part in parts))
    return Checkpoint(folder, every=every, fit=found)
