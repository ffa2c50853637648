"""How a group's expression differs from that of the other groups, each of these counting for
itself: what markers are ordered by.

Pooled, a few cells of a kind that shares a gene hide it: dendritic cells and monocytes among T
cells. So a gene's logarithm is averaged over groups, not its counts. A group's rate λ has given its
counts y, exposed to e, a gamma posterior, of half a count's prior at the rate of all groups:

    E ln λ = ψ(y + ½) − ln(e + ½ / r),    Var ln λ = ψ′(y + ½),
    δ = E ln λ_A − Σ_k w_k E ln λ_k,

with w_k in proportion to the root of group k's number of cells: between groups alike, of which the
smallest know little, and cells alike, of which one group has most. Several batches' are compared
within each and averaged with weights 1 / (1 / e_A + 1 / e_k), the group's and group k's exposures
there (Mantel and Haenszel's). Of all genes those that differ much *and* clearly come first: by
δ |z| / (|z| + 16), z = δ over its standard error. That the spread of cells within a group is left
out of it is meant: the spread of a marker is large where a group is mixed.
"""

import torch
from torch import Tensor

_SHAPE = 0.5
# Standard errors of which δ counts half.
_HALF = 16.0


def contrast(
    counts: Tensor, exposure: Tensor, cells: Tensor, group: Tensor, batch: Tensor, first: int
) -> Tensor:
    """The score of each gene, (genes,), in natural logarithms; 0 without a count.

    Parameters
    ----------
    counts, exposure, cells
        Of each unit, a group's part of a batch: totals, (units, genes), their exposure and number
        of cells, (units,).
    group, batch
        Each unit's, whole numbers.
    first
        The group of interest; all others are what it is compared with.
    """
    level, variance = _rates(counts, exposure, batch)
    own = {int(batch[unit]): int(unit) for unit in (group == first).nonzero()[:, 0]}
    used = torch.zeros(len(counts), 1, dtype=counts.dtype)
    others = [kind for kind in group.unique().tolist() if kind != first]
    shares = torch.stack([cells[group == kind].sum().sqrt() for kind in others])
    for kind, share in zip(others, shares / shares.sum(), strict=True):
        units = [int(unit) for unit in (group == kind).nonzero()[:, 0]]
        mine = [own[int(batch[unit])] for unit in units]
        weight = 1 / (1 / exposure[mine] + 1 / exposure[units])
        weight = share * weight / weight.sum()
        used[mine, 0] += weight
        used[units, 0] -= weight
    change = (used * level).sum(0)
    z = change.abs() / (used.square() * variance).sum(0).sqrt()
    return torch.where(counts.sum(0) > 0, change * z / (z + _HALF), 0.0)


def _rates(counts: Tensor, exposure: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
    """E ln λ and Var ln λ, (units, genes)."""
    prior = torch.empty_like(counts)
    for one in batch.unique():
        of = batch == one
        prior[of] = _SHAPE * exposure[of].sum() / (counts[of].sum(0) + 0.5)
    shape = counts + _SHAPE
    return shape.digamma() - (exposure[:, None] + prior).log(), torch.special.polygamma(1, shape)
