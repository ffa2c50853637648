"""Fixed draws of N(0, I): quasi-random, antithetic, their second moment exact."""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=1024)
def _normal_points(n_samples: int, n_latent: int, seed: int) -> Tensor:
    """Antithetic quasi-random draws from N(0, I), (n_samples, n_latent): always the same.

    Their second moment is exact, where they are enough to have the identity's, or else in each
    dimension: without that, few points overrate or underrate every wide q.
    """
    n_pairs = (n_samples + 1) // 2
    sobol = torch.quasirandom.SobolEngine(n_latent, scramble=True, seed=seed)
    points = torch.special.ndtri(sobol.draw(n_pairs, dtype=torch.float64).clamp(1e-6, 1 - 1e-6))
    if n_pairs >= n_latent:
        factor = torch.linalg.cholesky(points.T @ points / n_pairs)
        points = torch.linalg.solve_triangular(factor, points.T, upper=False).T
    else:
        points = points / points.square().mean(0).sqrt()
    return torch.cat([points, -points])[:n_samples]


def normal_points(n_samples: int, like: Tensor, seed: int = 0) -> Tensor:
    """Fixed draws of N(0, I) with the dtype and device of ``like``, (n_samples, 1, latent)."""
    return _normal_points(n_samples, like.shape[-1], seed).to(like).unsqueeze(1)
