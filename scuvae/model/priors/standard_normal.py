"""N(0, I)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from scuvae._random import normal_like
from scuvae.distributions.gaussian import Gaussian
from scuvae.distributions.quasi_random import normal_points
from scuvae.kernels.dispatch import asks_gradient, compiled
from scuvae.model.priors.base import Prior


class StandardNormal(Prior):
    """N(0, I)."""

    name = "standard_normal"
    kl_is = "exact"

    def log_prob(self, z: Tensor) -> Tensor:
        return -0.5 * z.square().sum(-1) - 0.5 * z.shape[-1] * math.log(2 * math.pi)

    def kl(self, q: Gaussian) -> Tensor:
        """½ (tr Σ + mᵀm − L − ln |Σ|)."""
        mean, factor = q.mean, q.factor
        if q.full and mean.dim() == 2 and compiled(mean) and not asks_gradient(mean, factor):
            from scuvae.kernels.gaussian import kl_to_standard_normal

            return kl_to_standard_normal(mean.detach().contiguous(), factor.detach().contiguous())
        trace = factor.square().sum((-2, -1) if q.full else -1)
        return 0.5 * (trace + mean.square().sum(-1) - mean.shape[-1] - 2 * q.log_det)

    def slope(self, q: Gaussian) -> Tensor:
        return -q.mean

    def precision(self, q: Gaussian) -> Tensor:
        return _eye(q.mean)

    def gaussian(self) -> Gaussian:
        return Gaussian(self.like, _eye(self.like))

    def points(self, n: int) -> Tensor:
        return normal_points(n, self.like).squeeze(1)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return normal_like(self.like, tuple(sample_shape))


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
