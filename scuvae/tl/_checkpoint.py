"""Which fit a checkpoint is of."""

from os import PathLike
from typing import Any

import numpy as np
import torch
from anndata import AnnData

from scuvae.batches import Cells
from scuvae.batches.sparse_rows import dense
from scuvae.inference.training.checkpoint import Checkpoint, digest
from scuvae.inference.training.distributed import Processes

# Where a fit is made does not make it another one.
_ELSEWHERE = {"device", "torch_version", "anndata_version"}
# Cells whose values tell a data set from another, beside every cell's total.
_LOOKED_AT = 200


def kept_in(
    folder: str | PathLike[str],
    every: float,
    adata: AnnData,
    genes: np.ndarray | None,
    params: dict[str, Any],
    cells: Cells,
    processes: Processes,
) -> Checkpoint:
    """The checkpoints of a fit, which say of which cells, genes and settings it is.

    ``adata`` has the cells of all processes, ``cells`` those of this one.
    """
    found = {name: value for name, value in params.items() if name not in _ELSEWHERE}
    where = cells.size_factor.device
    some = torch.linspace(0, len(cells) - 1, min(len(cells), _LOOKED_AT)).long()
    values = dense(cells.batch(some.to(where)).x)
    names = adata.var_names if genes is None else adata.var_names[genes]
    found["genes"], found["cells"] = digest(names.astype(str)), digest(adata.obs_names.astype(str))
    found["values"] = _of_all(digest(cells.source.totals(), cells.size_factor, values), processes)
    if (told := cells.covariates) is not None:
        parts = torch.arange(len(cells), device=where).split(2**16)
        found["covariates"] = _of_all(digest(*(told.rows(part) for part in parts)), processes)
    return Checkpoint(folder, every=every, fit=found, processes=processes)


def _of_all(own: str, processes: Processes) -> str:
    """One digest from those of all processes."""
    return digest(processes.texts(own)) if processes.several else own
