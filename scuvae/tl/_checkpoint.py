"""Which fit a checkpoint is of."""

from typing import Any

import numpy as np
import torch
from anndata import AnnData

from scuvae.batches import Cells
from scuvae.batches.sparse_rows import dense
from scuvae.inference.training.checkpoint import digest

# Where a fit is made does not make it another one.
_ELSEWHERE = {"device", "torch_version", "anndata_version"}
# Cells whose values tell a data set from another, beside every cell's total.
_LOOKED_AT = 200


def identity(
    adata: AnnData, genes: np.ndarray | None, params: dict[str, Any], cells: Cells
) -> dict[str, Any]:
    """What a checkpoint's fit and this one have in common, if they are the same."""
    found = {name: value for name, value in params.items() if name not in _ELSEWHERE}
    some = torch.linspace(0, len(cells) - 1, min(len(cells), _LOOKED_AT)).long()
    values = dense(cells.batch(some.to(cells.size_factor.device)).x)
    names = adata.var_names if genes is None else adata.var_names[genes]
    batch_key = params.get("batch_key")
    labels = [] if batch_key is None else adata.obs[batch_key].astype(str)
    found["genes"], found["cells"] = digest(names.astype(str)), digest(adata.obs_names.astype(str))
    found["values"] = digest(cells.source.totals(), cells.size_factor, values, labels)
    return found
