"""Points to start a clustering from."""

import torch
from torch import Tensor

from scuvae._random import uniform_like


def spread_out(points: Tensor, n: int) -> Tensor:
    """Rows of n points that lie apart: each the farthest of a few drawn by squared distance.

    The seeding of k-means++ (Arthur & Vassilvitskii, SODA 2007).
    """
    centre = (points - points.mean(0)).square().sum(1).argmin()
    chosen = [centre]
    apart = (points - points[centre]).square().sum(1)
    for _ in range(n - 1):
        steps = apart.cumsum(0)
        at = uniform_like(apart.new_empty(4)) * steps[-1]
        tried = torch.searchsorted(steps, at).clamp_max(len(points) - 1)
        after = torch.minimum(apart, torch.cdist(points[tried], points).square())
        best = after.sum(1).argmin()
        chosen.append(tried[best])
        apart = after[best]
    return torch.stack(chosen)
