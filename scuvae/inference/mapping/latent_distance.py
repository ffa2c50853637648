"""How far cells are from the posteriors of others."""

import torch
from torch import Tensor

from scuvae.distributions.gaussian import Gaussian

# Cells at once: a few thousand posteriors' distances take 16 MB.
_CHUNK = 512


def distance_to_posteriors(points: Tensor, q: Gaussian, n: int) -> Tensor:
    """Mean Mahalanobis distance √((z−m)ᵀ Λ (z−m)) of each point to the ``n`` nearest posteriors.

    Parameters
    ----------
    points
        z, (points, latent).
    q
        Posteriors N(m, Λ⁻¹) of more than ``n`` cells. A point that is the mean of one is not
        compared with that one.

    Returns
    -------
    (points,), float64.
    """
    mean, z = q.mean.double(), points.double()
    precision = q.precision_matrix.double()
    # A quadratic form is linear in the products of z's entries: all distances by one product.
    shift = precision @ mean.unsqueeze(-1)
    constant = (mean.unsqueeze(-2) @ shift).flatten()
    weights = torch.cat([precision.flatten(1), -2 * shift.squeeze(-1), constant[:, None]], 1)
    out = []
    for some in z.split(_CHUNK):
        products = (some.unsqueeze(-1) * some.unsqueeze(-2)).flatten(1)
        features = torch.cat([products, some, torch.ones_like(some[:, :1])], 1)
        squared = (features @ weights.T).clamp_min(0.0)
        own = (some.unsqueeze(1) == mean).all(-1)
        nearest = squared.masked_fill(own, torch.inf).topk(n, largest=False).values
        out.append(nearest.sqrt().mean(1))
    return torch.cat(out)
