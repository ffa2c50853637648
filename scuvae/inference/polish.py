"""The best diagonal q, found closely: a few natural steps, then steps on its mean and scales.

Natural steps take their precision from the expected curvature of the decoder's output, which is
close to but not the ELBO's own, and few draws say little of L scales: beside 1,000 steps of Adam
they end .2 to .4 nats a cell short. Here the scales follow Stein's identity,

    −E_q[∂_j ∂_k log p] = −E_q[ε_k ∂_j log p] / s_k,      1/s_k² ← 1 − E_q[ε_k ∂_k log p] / s_k,

which is exact at the optimum whatever the likelihood, over 2L points or more whose second moments
are the normal's own. The gradients are those that the mean needs anyway.
"""

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

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
    model: VAE, batch: Batch, q: Distribution, *, max_steps: int = 15, tolerance: float = 0.05
) -> Distribution:
    """Steps of mean and scales over fixed points, from a diagonal q near its optimum."""
    mean, scale = q.mean.detach().clone(), q.stddev.detach().clone()
    if max_steps <= 0:
        return _diagonal(mean, scale)
    points = normal_points(max(2 * mean.shape[-1], _FEWEST), mean)
    expected = natural.precision(model.curvature(batch, mean))
    active = torch.arange(len(batch), device=mean.device)
    rate = torch.ones_like(mean[:, 0])
    value, slope, precision = _evaluate(model, batch, mean, scale, points)

    for _ in range(max_steps):
        old_mean, old_scale = mean[active], scale[active]
        # Stein's precision is noisy and the expected one biased: halfway saves a step in three.
        tril = natural.scale_tril(0.5 * (precision + expected))
        step = (tril @ (tril.mT @ slope.unsqueeze(-1))).squeeze(-1)
        new_mean = old_mean + rate[:, None] * natural.cap_length(step, LONGEST_STEP)
        # Where the curvature is not positive, the scale grows as far as a step may take it.
        wanted = precision.diagonal(dim1=-2, dim2=-1).clamp_min(1e-6).rsqrt() / old_scale
        new_scale = old_scale * wanted.clamp(1 / _WIDEST, _WIDEST) ** rate[:, None]
        new = _evaluate(model, batch, new_mean, new_scale, points)

        better = new[0] >= value - ROUNDING
        mean[active] = torch.where(better[:, None], new_mean, old_mean)
        scale[active] = torch.where(better[:, None], new_scale, old_scale)
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
    return _diagonal(mean, scale)


def _evaluate(
    model: VAE, batch: Batch, mean: Tensor, scale: Tensor, points: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Each cell's ELBO over the points, its gradient in the mean, and the precision it asks for."""
    q = _diagonal(mean, scale)
    with torch.enable_grad():
        z = draw(q, points).requires_grad_()
        values = model.log_likelihood(batch, z)
        (gradient,) = torch.autograd.grad(values.sum(), z)
    slope = gradient.mean(0) - mean
    curvature = torch.einsum("scj,sk->cjk", gradient, points.squeeze(1)) / len(points)
    curvature = curvature / scale.unsqueeze(-2)
    precision = natural.precision(-0.5 * (curvature + curvature.mT))
    return values.detach().mean(0) - kl_to_prior(q), slope, precision


def _diagonal(mean: Tensor, scale: Tensor) -> Distribution:
    return Independent(Normal(mean, scale, validate_args=False), 1, validate_args=False)
