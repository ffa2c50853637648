"""The same cells, less deeply sequenced."""

from dataclasses import replace

import torch
from torch.nn import functional as F

from scuvae.model import Batch, SparseRows
from scuvae.model.batch import sparse


def thinned(batch: Batch) -> Batch:
    """Every count of a batch replaced by a binomial draw of half of it, as half the reads would.

    What depth does to a score is what this does: between cells of other depths the type differs
    too. From torch's random state. Of counts that are not whole the rest is halved.
    """
    x = sparse(batch.x)
    whole = x.value.floor()
    value = torch.binomial(whole, torch.full_like(whole, 0.5)) + 0.5 * (x.value - whole)
    kept = value > 0
    starts = F.pad(kept.cumsum(0), (1, 0))[x.starts]
    fewer = SparseRows(starts, x.col[kept], value[kept], x.n_vars)
    # A total that was given counts what is not observed as well.
    size_factor = batch.size_factor / 2 if batch.size_of_all else fewer.sum()
    return replace(batch, x=fewer, size_factor=size_factor)
