"""The same cells, less deeply sequenced."""

from dataclasses import replace

import torch

from scuvae.model import Batch
from scuvae.model.batch import sparse


def thinned(batch: Batch) -> Batch:
    """Every count of a batch replaced by a binomial draw of half of it, as half the reads would.

    What depth does to a score is what this does: between cells of other depths the type differs
    too. From torch's random state. Of counts that are not whole the rest is halved.
    """
    x = sparse(batch.x)
    whole = x.value.floor()
    value = torch.binomial(whole, torch.full_like(whole, 0.5)) + 0.5 * (x.value - whole)
    fewer = x.entries(value > 0, value)
    # A total that was given counts what is not observed as well.
    size_factor = batch.size_factor / 2 if batch.size_of_all else fewer.sum()
    return replace(batch, x=fewer, size_factor=size_factor)
