"""q found closely, of either family: a few natural steps, then steps on its mean and scales.

Natural steps take their precision from the expected curvature of the decoder's output, which is
close to but not the ELBO's own, and few draws say little of L scales: their q is too narrow, and
beside 1,000 steps of Adam they end .2 to .5 nats a cell short. Here the precision follows Stein's
identity, with C the factor of q's covariance and ε = C⁻¹ (z − m),

    −E_q[∇² log p] = −E_q[∇ log p εᵀ] C⁻¹,      Λ ← I − E_q[∇² log p],

which is exact at the optimum whatever the likelihood, over 2L points or more whose second moments
are the normal's own; a diagonal q takes the diagonal, 1/s_k² ← Λ_kk. The gradients are those that
the mean needs anyway.
"""

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal

from scuvae.inference import natural
from scuvae.inference.local_steps import (
    LONGEST_STEP,
    ROUNDING,
    draw,
    normal_points,
    refine_natural,
)
from scuvae.inference.objectives import kl_to_prior
from scuvae.inference.refine import as_family
from scuvae.model import VAE, Batch
from scuvae.model.vae import frozen

# Natural steps at most to begin with: they find the optimum's neighbourhood.
_FIRST = 5
# Points that an expectation is taken over, where 2L are fewer.
_FEWEST = 16
# A scale at most doubles or halves in a step.
_WIDEST = 2.0


def refine_diagonal(
    model: VAE, batch: Batch, q: Distribution, *, max_steps: int = 20, tolerance: float = 0.05
) -> Distribution:
    """A diagonal q from ``q``, at most ``max_steps`` steps in all; each step raises the ELBO.

    A cell stops by itself when a step has gained less than ``tolerance`` nats.
    """
    start = as_family(q, "diagonal")
    first = min(max_steps, _FIRST)
    q = refine_natural(model, batch, start, max_steps=first)
    return polish(model, batch, q, max_steps=max_steps - first, tolerance=tolerance)


def polish(
    model: VAE,
    batch: Batch,
    q: Distribution,
    *,
    max_steps: int = 15,
    tolerance: float = 0.05,
    kl_weight: float = 1.0,
) -> Distribution:
    """Steps of mean and covariance over fixed points, from a q near its optimum, in its family."""
    full = isinstance(q, MultivariateNormal)
    tril = q.scale_tril if isinstance(q, MultivariateNormal) else torch.diag_embed(q.stddev)
    mean, tril = q.mean.detach().clone(), tril.detach().clone()
    if max_steps <= 0:
        return _of_family(mean, tril, full)
    points = normal_points(max(2 * mean.shape[-1], _FEWEST), mean)
    expected = natural.precision(model.curvature(batch, mean), kl_weight)
    active = torch.arange(len(batch), device=mean.device)
    rate = torch.ones_like(mean[:, 0])
    value, slope, precision = _evaluate(model, batch, mean, tril, points, kl_weight)

    for _ in range(max_steps):
        old_mean, old_tril = mean[active], tril[active]
        # Stein's precision is noisy and the expected one biased: halfway saves a step in three.
        factor = natural.scale_tril(0.5 * (precision + expected))
        step = (factor @ (factor.mT @ slope.unsqueeze(-1))).squeeze(-1)
        new_mean = old_mean + rate[:, None] * natural.cap_length(step, LONGEST_STEP)
        new_tril = (_stretched if full else _stretched_diagonal)(old_tril, precision, rate)
        new = _evaluate(model, batch, new_mean, new_tril, points, kl_weight)

        better = new[0] >= value - ROUNDING
        mean[active] = torch.where(better[:, None], new_mean, old_mean)
        tril[active] = torch.where(better[:, None, None], new_tril, old_tril)
        gain = torch.where(better, new[0] - value, torch.inf)
        value = torch.where(better, new[0], value)
        slope = torch.where(better[:, None], new[1], slope)
        precision = torch.where(better[:, None, None], new[2], precision)
        rate = torch.where(better, (2 * rate).clamp_max(1.0), rate / 4)
        going = (gain > tolerance) & (rate > 1e-2)
        if not going.any():
            break
        if not going.all():
            batch, active = batch.take(going.nonzero().squeeze(-1)), active[going]
            expected, precision = expected[going], precision[going]
            value, slope, rate = value[going], slope[going], rate[going]
    return _of_family(mean, tril, full)


def _stretched_diagonal(tril: Tensor, precision: Tensor, rate: Tensor) -> Tensor:
    """Scales that go to 1/√Λ_kk, by ``rate`` of the way in their logarithms."""
    scale = tril.diagonal(dim1=-2, dim2=-1)
    # Where the curvature is not positive, the scale grows as far as a step may take it.
    wanted = precision.diagonal(dim1=-2, dim2=-1).clamp_min(1e-6).rsqrt() / scale
    return torch.diag_embed(scale * wanted.clamp(1 / _WIDEST, _WIDEST) ** rate[:, None])


def _stretched(tril: Tensor, precision: Tensor, rate: Tensor) -> Tensor:
    """The same along the principal axes of Cᵀ Λ C, which is the identity where q has arrived."""
    ratio, axes = torch.linalg.eigh(tril.mT @ precision @ tril)
    wanted = ratio.clamp(_WIDEST**-2, _WIDEST**2) ** (-0.5 * rate[:, None])
    root = tril @ (axes * wanted.unsqueeze(-2))
    # R with root = (Q R)ᵀ is a factor too, lower and well conditioned; its signs are free.
    lower = torch.linalg.qr(root.mT).R.mT
    return lower * lower.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)


def _evaluate(
    model: VAE, batch: Batch, mean: Tensor, tril: Tensor, points: Tensor, kl_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Each cell's ELBO over the points, its gradient in the mean, and the precision it asks for.

    The first two divided by β, the weight of the KL term.
    """
    q = MultivariateNormal(mean, scale_tril=tril, validate_args=False)
    with torch.enable_grad(), frozen(model):
        z = draw(q, points).requires_grad_()
        values = model.log_likelihood(batch, z) / kl_weight
        (gradient,) = torch.autograd.grad(values.sum(), z)
    slope = gradient.mean(0) - mean
    curvature = torch.einsum("scj,sk->cjk", gradient, points.squeeze(1)) / len(points)
    curvature = torch.linalg.solve_triangular(tril, curvature, upper=False, left=False)
    precision = natural.precision(-0.5 * (curvature + curvature.mT))
    return values.detach().mean(0) - kl_to_prior(q), slope, precision


def _of_family(mean: Tensor, tril: Tensor, full: bool) -> Distribution:
    if full:
        return MultivariateNormal(mean, scale_tril=tril, validate_args=False)
    scale = tril.diagonal(dim1=-2, dim2=-1)
    return Independent(Normal(mean, scale, validate_args=False), 1, validate_args=False)
