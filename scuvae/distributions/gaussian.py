"""Gaussian posteriors q(z), between their unconstrained parameters, moments and distributions.

``raw`` parametrises the scale: L numbers through softplus for a diagonal covariance, or the
L(L+1)/2 entries of a lower-triangular factor C, row by row, with softplus on its diagonal, for a
full one (Σ = C Cᵀ). Its width alone tells the two apart (with L = 1 they are one).
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal
from torch.nn import functional as F

from scuvae.kernels.dispatch import asks_gradient, compiled

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
    return full_gaussian(mean, _factor(raw, n_latent))


def full_gaussian(mean: Tensor, tril: Tensor) -> MultivariateNormal:
    """N(m, C Cᵀ) for means (..., cells, latent) and factors of their full shape.

    Without the constructor, which broadcasts them, and took as long as a small product.
    """
    q = MultivariateNormal.__new__(MultivariateNormal)
    q.loc, q.scale_tril, q._unbroadcasted_scale_tril = mean, tril, tril
    Distribution.__init__(q, mean.shape[:-1], mean.shape[-1:], validate_args=False)
    return q


def _factor(raw: Tensor, n_latent: int) -> Tensor:
    """C of a full covariance."""
    if raw.dim() == 2 and compiled(raw) and not asks_gradient(raw):
        from scuvae.kernels.gaussian import unpack as compiled_unpack

        return compiled_unpack(raw.contiguous(), n_latent, _MIN_SCALE)
    _, on_diagonal = _layout(n_latent, raw.device)
    positive = F.softplus(raw).clamp_min(_MIN_SCALE)
    return unpack(torch.where(on_diagonal, positive, raw), n_latent)


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
    position, _ = _layout(n_latent, packed.device)
    square = F.pad(packed, (0, 1)).index_select(-1, position)
    return square.view(*packed.shape[:-1], n_latent, n_latent)


@lru_cache(maxsize=64)
def _layout(n_latent: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each entry of a square stands in its packed triangle, with the one past the end for
    zeros, (L²,); and which packed entries are on the diagonal.
    """
    i, j = torch.tril_indices(n_latent, n_latent)
    position = torch.full((n_latent, n_latent), len(i))
    position[i, j] = torch.arange(len(i))
    return position.flatten().to(device), (i == j).to(device)


def draw(q: Distribution, points: Tensor) -> Tensor:
    """The draws of q that ``points`` of N(0, I), (samples, 1 or cells, latent), stand for."""
    return q.mean + (scale_tril_of(q) @ points.unsqueeze(-1)).squeeze(-1)


def scale_tril_of(q: Distribution) -> Tensor:
    return q.scale_tril if isinstance(q, MultivariateNormal) else torch.diag_embed(q.stddev)


def kl_to_prior(q: Distribution) -> Tensor:
    """KL(q ‖ N(0, I)) in nats, a cell: ½ (tr Σ + mᵀm − L − ln |Σ|), (cells,)."""
    mean = q.mean
    if isinstance(q, MultivariateNormal):
        tril = q.scale_tril
        trace = tril.square().sum((-2, -1))
        log_det = 2 * tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    else:
        trace = q.stddev.square().sum(-1)
        log_det = 2 * q.stddev.log().sum(-1)
    return 0.5 * (trace + mean.square().sum(-1) - mean.shape[-1] - log_det)


def select(options: Sequence[Distribution], choice: Tensor) -> Distribution:
    """For each cell the distribution that ``choice``, (cells,), names."""
    cells = torch.arange(len(choice), device=choice.device)
    mean = torch.stack([q.mean for q in options])[choice, cells]
    raw = torch.stack([raw_scale(q) for q in options])[choice, cells]
    return gaussian(mean, raw)


def concatenate(parts: Sequence[Distribution]) -> Distribution:
    """One distribution over the cells of several batches, in order."""
    return gaussian(torch.cat([q.mean for q in parts]), torch.cat([raw_scale(q) for q in parts]))


def as_family(q: Distribution, covariance: str) -> Distribution:
    """``q`` as a member of the family: a diagonal one is full too; a full one keeps its margins."""
    if covariance == "full" and not isinstance(q, MultivariateNormal):
        return MultivariateNormal(q.mean, scale_tril=torch.diag_embed(q.stddev))
    if covariance == "diagonal" and isinstance(q, MultivariateNormal):
        return Independent(Normal(q.mean, q.stddev), 1)
    return q


def moments(parts: Iterable[Distribution], covariance: str) -> dict[str, np.ndarray]:
    """Means, scales and, where it is full, packed covariances of q, over parts of the cells.

    A part at a time: factors and covariances of all cells at once would outweigh their table.
    """
    found: dict[str, list[np.ndarray]] = {"mean": [], "scale": []}
    if covariance == "full":
        found["covariance"] = []
    for q in parts:
        found["mean"].append(_array(q.mean))
        found["scale"].append(_array(q.stddev))
        if covariance == "full":
            if isinstance(q, MultivariateNormal):
                matrix = q.covariance_matrix
            else:
                matrix = torch.diag_embed(q.variance)
            found["covariance"].append(_array(pack(matrix)))
    return {name: np.concatenate(arrays) for name, arrays in found.items()}


def _array(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().cpu().numpy(), dtype=np.float32)
