"""Whether q says what it should of a z that is known: cells simulated from the model itself.

With z* ~ p(z) and x ~ p(x | z*), z* is a draw of p(z | x): were q that posterior, Φ((z* − m)/s)
would be uniform for a Gaussian one, central intervals would cover their nominal share, and
E|C⁻¹ (z* − m)|²/L would be 1, with C Cᵀ the covariance (simulation-based calibration: Talts et al.,
arXiv:1804.06788). The averages hold over the prior, not for any one z*.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scuvae.batches import Batch, SparseRows
from scuvae.distributions.gaussian import Gaussian
from scuvae.model import VAE


def simulate(model: VAE, batch: Batch) -> tuple[Tensor, Batch]:
    """z* ~ p(z), (cells, latent), and the batch with x ~ p(x | z*) in place of its values.

    Size factors, covariates and the mask of genes are the batch's own.
    """
    z = model.prior.sample((len(batch),))
    eta = model.decoder(z, batch.covariates)
    likelihood = model.likelihood_of(batch.covariates)
    x = likelihood.sample(eta, model.size_factor(batch, eta), batch.observed)
    values = x if model.likelihood.support == "real" else SparseRows.from_dense(x)
    return z, dataclasses.replace(batch, x=values)


@dataclass(frozen=True)
class Residuals:
    """Where z* lies in q: (z* − m)/s of each dimension, and C⁻¹ (z* − m); (cells, latent) both.

    On the CPU, in float64: tails, and differences of close numbers.
    """

    z_score: Tensor
    whitened: Tensor

    @classmethod
    def of(cls, q: Gaussian, z: Tensor) -> "Residuals":
        z, q = z.cpu().double(), q.to(torch.device("cpu")).to(torch.float64)
        return cls((z - q.mean) / q.stddev, q.whiten(z))

    @classmethod
    def concatenate(cls, parts: Sequence["Residuals"]) -> "Residuals":
        return cls(
            torch.cat([part.z_score for part in parts]),
            torch.cat([part.whitened for part in parts]),
        )


def scale_ratio(q: Gaussian) -> Tensor:
    """Scales of the best diagonal q over the marginal ones of a full-covariance q, (cells, latent).

    At a precision Λ the former are 1/√Λ_kk, the latter √(Λ⁻¹)_kk: the ratio is at most 1. On the
    CPU, in float64.
    """
    tril = q.scale_tril.cpu().double()
    eye = torch.eye(tril.shape[-1], dtype=tril.dtype).expand_as(tril)
    inverse = torch.linalg.solve_triangular(tril, eye, upper=False)
    return (inverse.square().sum(-2) * tril.square().sum(-1)).rsqrt()


def half_width(levels: Tensor) -> Tensor:
    """z_c = Φ⁻¹((1 + c)/2): central intervals of a Gaussian, in standard deviations."""
    return torch.special.ndtri(0.5 * (1 + levels))


def coverage(z_score: Tensor, levels: Tensor) -> Tensor:
    """Whether each central interval holds z*, (levels, cells, latent), as 0 and 1."""
    return (z_score.abs() <= half_width(levels).view(-1, 1, 1)).to(z_score)


def diagonal_coverage(ratio: Tensor, levels: Tensor) -> Tensor:
    """2 Φ(z_c r) − 1, (levels, cells, latent): what intervals cover that are r times too wide."""
    return torch.special.erf(half_width(levels).view(-1, 1, 1) * ratio / 2**0.5)
