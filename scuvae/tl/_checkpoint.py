"""Which fit a checkpoint is of."""

import tempfile
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anndata import AnnData

from scuvae._checks import path
from scuvae.batches import Cells
from scuvae.batches.sparse_rows import dense
from scuvae.inference.training.checkpoint import Checkpoint, digest
from scuvae.inference.training.distributed import Processes
from scuvae.model.covariates import Covariates

# Where a fit is made does not make it another one.
_ELSEWHERE = {"device", "torch_version", "anndata_version"}
# Cells whose values tell a data set from another, beside every cell's total.
_LOOKED_AT = 200


def check_folder(checkpoint: object) -> None:
    """Raise, before any work, if checkpoints cannot be kept there."""
    text = path("checkpoint", checkpoint, "a folder")
    shown, folder = repr(text), Path(text)
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
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
    covariates: Covariates | None,
    processes: Processes,
) -> Checkpoint:
    """The checkpoints of a fit, which say of which cells, genes and settings it is.

    ``adata`` and ``covariates`` are of the cells of all processes, ``cells`` of this one's.
    """
    found = {name: value for name, value in params.items() if name not in _ELSEWHERE}
    where = cells.size_factor.device
    some = torch.linspace(0, adata.n_obs - 1, min(adata.n_obs, _LOOKED_AT)).long()
    own = some[(some >= processes.first) & (some < processes.first + len(cells))]
    values = processes.together(dense(cells.batch(own.to(where) - processes.first).x))
    names = adata.var_names if genes is None else adata.var_names[genes]
    found["genes"], found["cells"] = digest(names.astype(str)), digest(adata.obs_names.astype(str))
    totals = processes.together(cells.source.totals())
    found["values"] = digest(totals, processes.together(cells.size_factor), values)
    if covariates is not None:
        found["covariates"] = digest(covariates.codes, covariates.values)
    return Checkpoint(folder, every=every, fit=found, processes=processes)
