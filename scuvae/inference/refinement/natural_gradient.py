"""Local steps: q of each cell of a batch towards its optimum, the decoder frozen.

Every cell is treated on its own: the draws are the same fixed points for all of them, so that a
cell's posterior depends neither on the cells beside it nor on their order.
"""

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal

from scuvae.batches import Batch
from scuvae.distributions.gaussian import draw, kl_to_prior, scale_tril_of
from scuvae.distributions.precision import (
    cap_length,
    diagonal_tril,
    expected_precision,
    precondition,
    scale_tril,
)
from scuvae.distributions.quasi_random import normal_points
from scuvae.inference.refinement.gauss_newton import (
    LONGEST_STEP,
    _Active,
    _likelihood_and_slope,
    climb,
)
from scuvae.kernels.malloc import keep_freed_memory
from scuvae.model import VAE

# By how much few points may overrate where a cell began, in nats.
_FLATTERY = 0.05
# Antithetic pairs of points that curvature is averaged over, a point a step.
_PAIRS = 4
# The mean climbs until a step gains less than so many times the tolerance; the steps after it
# gain on the mean too.
_CLIMB = 20


def refine_natural(
    model: VAE,
    batch: Batch,
    q: Distribution,
    *,
    max_steps: int = 10,
    n_samples: int = 2,
    tolerance: float = 0.3,
    kl_weight: float = 1.0,
) -> Distribution:
    """Natural-gradient steps from ``q``, each undone and shortened where it lowers the ELBO.

    The mean climbs the joint density first, where a step costs a third; the steps that follow
    take expectations under q, and their precisions are averaged over them.

    Parameters
    ----------
    max_steps
        Number of steps of either kind at most; a cell stops by itself when a step of its mean
        gained, or the next one promises, less than ``tolerance`` nats.
    n_samples
        Fixed draws that an expectation under q is taken over.

    Returns
    -------
    A distribution of q's own family: full covariance stays full, diagonal stays diagonal.
    """
    keep_freed_memory()
    full = isinstance(q, MultivariateNormal)
    first_mean, first_tril = q.mean.detach(), scale_tril_of(q).detach()
    points = normal_points(n_samples, first_mean)
    directions = _alternating(normal_points(2 * _PAIRS, first_mean))
    start = _value(model, batch, first_mean, first_tril, points, kl_weight)
    mean, target = climb(model, batch, first_mean, max_steps, _CLIMB * tolerance, kl_weight)
    tril = scale_tril(target) if full else diagonal_tril(target)
    value, gradient = _value_and_gradient(model, batch, mean, tril, points, kl_weight)
    best = value.clone()
    cells = _Active(batch, value, gradient)

    for step_number in range(max_steps):
        rows = cells.rows
        old_mean, old_tril = mean[rows], tril[rows]
        spread = (old_tril @ directions[step_number % len(directions)].unsqueeze(-1)).squeeze(-1)
        curvature = model.curvature(cells.batch, old_mean + spread)
        # Averaged over the steps so far; the precision at the mean is only where they begin.
        # Where a cell's steps are short, so is the change of its precision.
        share = cells.rate / (step_number + 1)
        blended = torch.lerp(
            target[rows], expected_precision(curvature, kl_weight), share.view(-1, 1, 1)
        )
        factor = scale_tril(blended)
        direction = precondition(factor, cells.gradient)
        new_mean = old_mean + cells.rate[:, None] * cap_length(direction, LONGEST_STEP)
        new_tril = factor if full else diagonal_tril(blended)
        new_value, new_gradient = _value_and_gradient(
            model, cells.batch, new_mean, new_tril, points, kl_weight
        )
        better = cells.update(new_value, new_gradient, factor)
        mean[rows] = torch.where(better[:, None], new_mean, old_mean)
        tril[rows] = torch.where(better[:, None, None], new_tril, old_tril)
        target[rows] = torch.where(better[:, None, None], blended, target[rows])
        best[rows] = cells.value
        if not cells.narrow(tolerance):
            break

    # Also where the ELBO is no number. Few points flatter a q that is a little too narrow.
    worse = ~(best >= start - _FLATTERY)
    mean = torch.where(worse[:, None], first_mean, mean)
    tril = torch.where(worse[:, None, None], first_tril, tril)
    if full:
        return MultivariateNormal(mean, scale_tril=tril, validate_args=False)
    scale = tril.diagonal(dim1=-2, dim2=-1)
    return Independent(Normal(mean, scale, validate_args=False), 1, validate_args=False)


def _alternating(points: Tensor) -> Tensor:
    """Antithetic points in pairs: each followed by its opposite."""
    return torch.stack(points.chunk(2), 1).flatten(0, 1)


@torch.no_grad()
def _value(
    model: VAE, batch: Batch, mean: Tensor, tril: Tensor, points: Tensor, kl_weight: float
) -> Tensor:
    """Each cell's ELBO over fixed draws, divided by β."""
    q = MultivariateNormal(mean, scale_tril=tril, validate_args=False)
    return model.log_likelihood(batch, draw(q, points)).mean(0) / kl_weight - kl_to_prior(q)


def _value_and_gradient(
    model: VAE, batch: Batch, mean: Tensor, tril: Tensor, points: Tensor, kl_weight: float
) -> tuple[Tensor, Tensor]:
    """Each cell's ELBO over fixed draws, divided by β, and its gradient in the mean."""
    offsets = (tril @ points.unsqueeze(-1)).squeeze(-1)
    expected, slope = _likelihood_and_slope(model, batch, mean, offsets)
    q = MultivariateNormal(mean, scale_tril=tril, validate_args=False)
    value = expected / kl_weight - kl_to_prior(q)
    return value, slope / kl_weight - mean
