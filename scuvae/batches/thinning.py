"""The same cells, less deeply sequenced."""

from dataclasses import replace

import torch
from torch import Tensor

from scuvae._random import binomial, uniform_like
from scuvae.batches.batch import Batch
from scuvae.batches.sparse_rows import at_hand, sparse

# Cells that an encoder learns from at fewer counts too: one for so many of a batch.
ONE_OF = 3
# The fewest counts that they are thinned to.
FEWEST = 10.0


def thinned(batch: Batch) -> Batch:
    """Every count of a batch replaced by a binomial draw of half of it, as half the reads would.

    What depth does to a score is what this does: between cells of other depths the type differs
    too. From torch's random state. Of counts that are not whole the rest is halved.
    """
    x = sparse(batch.x)
    value = _thinned(x.value, torch.full_like(x.value, 0.5))
    fewer = x.entries(value > 0, value)
    # A total that was given counts what is not observed as well.
    size_factor = batch.size_factor / 2 if batch.size_of_all else fewer.sum()
    return replace(batch, x=fewer, size_factor=size_factor)


def with_shallow(batch: Batch) -> Batch:
    """A batch of counts, followed by some of its cells once more, thinned to a random depth.

    Of each three cells one, the first of the batch, which is in random order. A depth is drawn
    log-uniformly between 10 counts and the cell's own total, counts then binomially: thinned
    negative binomial counts are negative binomial, of the same θ. Size factors shrink as totals
    do. From torch's random state.
    """
    n = len(batch) // ONE_OF
    return batch.followed_by(shallow(batch, n)) if n else batch


def shallow(batch: Batch, n: int) -> Batch:
    """The first n cells of a batch of counts, thinned as :func:`with_shallow` says."""
    x = sparse(batch.x).first(n)
    total = x.sum().clamp_min(1e-12)
    fewest = total.clamp_max(FEWEST)
    chance = (fewest / total) ** uniform_like(total)
    value = _thinned(x.value, chance[x.row])
    # On a GPU entries of 0 stay: how many these are must not set the arrays' shapes.
    fewer = x.entries(value > 0, value) if at_hand(value) else replace(x, value=value)
    return replace(
        batch,
        x=fewer,
        index=batch.index[:n],
        size_factor=batch.size_factor[:n] * (fewer.sum() / total),
        covariates=None if batch.covariates is None else batch.covariates[:n],
        on_host=None,
    )


def _thinned(value: Tensor, chance: Tensor) -> Tensor:
    """Binomial draws of counts; of counts that are not whole the rest is multiplied."""
    whole = value.floor()
    return binomial(whole, chance) + chance * (value - whole)
