"""Gaussian posteriors q(z), between their unconstrained parameters, moments and distributions.

``raw`` parametrises the scale: L numbers through softplus for a diagonal covariance, or the
L(L+1)/2 entries of a lower-triangular factor C, row by row, with softplus on its diagonal, for a
full one (Σ = C Cᵀ). Its width alone tells the two apart (with L = 1 they are one).
"""

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal
from torch.nn import functional as F

COVARIANCES = ("full", "diagonal")

# The smallest scale: KL and log q stay finite in float32.
_MIN_SCALE = 1e-6


def n_scale_parameters(n_latent: int, covariance: str) -> int:
    return n_latent * (n_latent + 1) // 2 if covariance == "full" else n_latent


def gaussian(mean: Tensor, raw: Tensor) -> Distribution:
    """q with mean ``mean``, (cells, latent), and scale parametrised by ``raw``."""
    n_latent = mean.shape[-1]
    if raw.shape[-1] == n_latent:
        scale = F.softplus(raw).clamp_min(_MIN_SCALE)
        return Independent(Normal(mean, scale, validate_args=False), 1, validate_args=False)
    tril = unpack(raw, n_latent)
    diagonal = F.softplus(tril.diagonal(dim1=-2, dim2=-1)).clamp_min(_MIN_SCALE)
    tril = tril.tril(-1) + torch.diag_embed(diagonal)
    return MultivariateNormal(mean, scale_tril=tril, validate_args=False)


def raw_scale(q: Distribution) -> Tensor:
    """The parameters that :func:`gaussian` would turn into q's scale."""
    if isinstance(q, MultivariateNormal):
        tril = q.scale_tril
        diagonal = _inverse_softplus(tril.diagonal(dim1=-2, dim2=-1))
        return pack(tril.tril(-1) + torch.diag_embed(diagonal))
    return _inverse_softplus(q.stddev)


def _inverse_softplus(y: Tensor) -> Tensor:
    return y + torch.log(-torch.expm1(-y))


def pack(tril: Tensor) -> Tensor:
    """Lower triangles (..., L, L) as rows (..., L(L+1)/2), row-major."""
    i, j = torch.tril_indices(tril.shape[-1], tril.shape[-1], device=tril.device)
    return tril[..., i, j]


def unpack(packed: Tensor, n_latent: int) -> Tensor:
    """The inverse of :func:`pack`, zero above the diagonal."""
    i, j = torch.tril_indices(n_latent, n_latent, device=packed.device)
    out = packed.new_zeros((*packed.shape[:-1], n_latent, n_latent))
    out[..., i, j] = packed
    return out
