"""Natural-gradient steps for Gaussian q: variational online Gauss–Newton.

For q_i = N(m_i, Λ_i⁻¹) and J_c the Jacobian of the decoder, centred where the likelihood says so,

    A = E_q[J_cᵀ diag(w) J_c] / β + I      g = E_q[J_cᵀ score] / β − m
    Λ ← (1−ρ) Λ + ρ A                      m ← m + ρ Λ⁻¹ g

with β the weight of the KL term (Khan & Rue, "The Bayesian Learning Rule", JMLR 2023;
Gauss–Newton in VAEs: Park, Kim & Kim, ICML 2019). One step is exact for linear Gaussian models.
"""

import torch
from torch import Tensor

from scuvae.model import VAE, Batch

# Numbers in the Jacobians held at once: 4 MB in float32, about a core's cache; larger is slower.
_JACOBIAN_NUMBERS = 2**20


@torch.no_grad()
def gauss_newton(model: VAE, batch: Batch, z: Tensor) -> Tensor:
    """J_cᵀ diag(w) J_c at z, (cells, latent, latent): the likelihood's part of the precision.

    Memory is bounded whatever the number of cells.
    """
    n_genes = model.likelihood.n_vars
    chunk = max(1, _JACOBIAN_NUMBERS // (n_genes * z.shape[-1]))
    if len(batch) > chunk:
        rows = torch.arange(len(batch), device=z.device)
        return torch.cat(
            [_gauss_newton(model, batch.take(part), z[part]) for part in rows.split(chunk)]
        )
    return _gauss_newton(model, batch, z)


def _gauss_newton(model: VAE, batch: Batch, z: Tensor) -> Tensor:
    eta, jacobian = model.decoder.jacobian(z, batch.covariates)
    weight, centre = model.likelihood.fisher(batch.x, eta, batch.size_factor, batch.observed)
    if centre is not None:
        jacobian = jacobian - jacobian @ centre.unsqueeze(-1)
    jacobian = jacobian * weight.sqrt().unsqueeze(-2)
    return jacobian @ jacobian.mT


def precision(curvature: Tensor, kl_weight: float = 1.0) -> Tensor:
    """A = curvature / β + I."""
    eye = torch.eye(curvature.shape[-1], dtype=curvature.dtype, device=curvature.device)
    return curvature / kl_weight + eye


def scale_tril(precision: Tensor) -> Tensor:
    """The lower-triangular C with C Cᵀ = Λ⁻¹."""
    # Reversing both axes turns the upper factor of Λ = Uᵀ-type into the lower one of Λ⁻¹.
    reversed_factor = torch.linalg.cholesky(precision.flip((-2, -1)))
    factor = reversed_factor.flip((-2, -1)).mT
    eye = torch.eye(precision.shape[-1], dtype=precision.dtype, device=precision.device)
    return torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)


def cap_length(step: Tensor, longest: float) -> Tensor:
    """Steps (cells, latent) no longer than ``longest``, their direction kept."""
    length = step.norm(dim=-1, keepdim=True)
    return step * (longest / length.clamp_min(longest))
