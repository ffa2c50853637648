"""Labels by the reference cells' votes."""

import torch
from torch import Tensor

# Halvings of the interval in which a cell's temperature lies: float32 knows no finer.
_HALVINGS = 25


def votes(affinities: Tensor, at_least: int) -> Tensor:
    """Each point's share in each cell: p(x | z)^τ over the sum of all points', (cells, points).

    τ is 1, and the shares are then those of Bayes' rule under a prior that has the points alone,
    or as much below as it takes for the effective number of points, 1 / Σ share², to be
    ``at_least`` so many. A model is surer than the data make it, of cells with many counts most.
    """
    at_least = min(at_least, affinities.shape[1])
    low = affinities.new_zeros(len(affinities), 1)
    high = torch.ones_like(low)

    def enough(power: Tensor) -> Tensor:
        shares = (power * affinities).softmax(1)
        return shares.square().sum(1, keepdim=True) * at_least <= 1

    as_it_is = enough(high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        spread = enough(middle)
        low, high = torch.where(spread, middle, low), torch.where(spread, high, middle)
    return (torch.where(as_it_is, 1.0, low) * affinities).softmax(1)
