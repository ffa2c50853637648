"""Natural-gradient steps for Gaussian q: variational online Gauss–Newton.

For q_i = N(m_i, Λ_i⁻¹), J_c the Jacobian of the decoder, centred where the likelihood says so, and
P and d the prior's precision and slope (I and −m under a standard normal),

    A = E_q[J_cᵀ diag(w) J_c] / β + P      g = E_q[J_cᵀ score] / β + d
    Λ ← (1−ρ) Λ + ρ A                      m ← m + ρ Λ⁻¹ g

with β the weight of the KL term (Khan & Rue, "The Bayesian Learning Rule", JMLR 2023;
Gauss–Newton in VAEs: Park, Kim & Kim, ICML 2019). One step is exact for linear Gaussian models.
"""

import torch
from torch import Tensor

from scuvae.distributions.gaussian import Gaussian
from scuvae.kernels.dispatch import compiled


def expected_precision(curvature: Tensor, prior: Tensor, kl_weight: float = 1.0) -> Tensor:
    """A = curvature / β + P."""
    return curvature / kl_weight + prior


def scale_tril(precision: Tensor) -> Tensor:
    """The lower-triangular C with C Cᵀ = Λ⁻¹."""
    # With both axes reversed the Cholesky factor of Λ is upper: its inverse is C.
    reversed_factor = _cholesky(precision.flip((-2, -1)))
    factor = reversed_factor.flip((-2, -1)).mT
    eye = torch.eye(precision.shape[-1], dtype=precision.dtype, device=precision.device)
    return torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)


def _cholesky(matrix: Tensor) -> Tensor:
    """Cholesky factors; a cell whose matrix is no longer positive in its precision gets jitter.

    One cell must not fail the others: where even the jitter does not help, its diagonal stands in.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if at_hand(failed) and not failed.any():
        return factor
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    jitter = 1e-5 * diagonal.mean(-1, keepdim=True).expand_as(diagonal)
    jittered, still = torch.linalg.cholesky_ex(matrix + torch.diag_embed(jitter))
    plain = torch.diag_embed(diagonal.abs().sqrt())
    repaired = torch.where((still > 0)[..., None, None], plain, jittered)
    return torch.where((failed > 0)[..., None, None], repaired, factor)


def at_hand(values: Tensor) -> bool:
    """Whether numbers can be looked at without a wait for a device."""
    return values.is_cpu


def gaussian_at(mean: Tensor, precision: Tensor, *, full: bool) -> Gaussian:
    """The best q at a mean and precision: N(m, Λ⁻¹), or s_k² = 1/Λ_kk in the diagonal family."""
    if full:
        return Gaussian(mean, scale_tril(precision))
    return Gaussian(mean, precision.diagonal(dim1=-2, dim2=-1).rsqrt())


def precondition(tril: Tensor, gradient: Tensor) -> Tensor:
    """Λ⁻¹ g = C (Cᵀ g) of each cell, (cells, latent)."""
    if compiled(gradient):
        from scuvae.kernels.gaussian import precondition as compiled_precondition

        return compiled_precondition(tril.contiguous(), gradient.contiguous())
    return (tril @ (tril.mT @ gradient.unsqueeze(-1))).squeeze(-1)


def move_rows(
    means: Tensor,
    rows: Tensor,
    q: Gaussian,
    slope: Tensor,
    *,
    rate: float,
    longest: float,
    by: float | Tensor,
) -> None:
    """Add ``by`` times ρ Λ⁻¹ g to the table's rows, g the ELBO's ``slope`` in each cell's mean.

    ρ is ``rate``; no ρ Λ⁻¹ g is longer than ``longest``.
    """
    if q.full:
        if compiled(slope) and means.is_contiguous():
            from scuvae.kernels.gaussian import move as compiled_move

            tril, slope = q.factor.contiguous(), slope.contiguous()
            compiled_move(means, rows, tril, slope, rate, longest, float(by))
            return
        direction = precondition(q.factor, slope)
    else:
        direction = q.variance * slope
    means.index_add_(0, rows, cap_length(rate * direction, longest) * by)


def cap_length(step: Tensor, longest: float) -> Tensor:
    """Steps (cells, latent) no longer than ``longest``, their direction kept."""
    length = step.norm(dim=-1, keepdim=True)
    return step * (longest / length.clamp_min(longest))


def diagonal_tril(precision: Tensor) -> Tensor:
    """The best diagonal q at a precision Λ has s_k² = 1/Λ_kk."""
    return torch.diag_embed(precision.diagonal(dim1=-2, dim2=-1).rsqrt())
