"""Local steps: q of each cell of a batch towards its optimum, the decoder frozen.

Every cell is treated on its own: the draws are the same fixed points for all of them, so that a
cell's posterior depends neither on the cells beside it nor on their order.
"""

import torch
from torch import Tensor

from scuvae.batches import Batch
from scuvae.distributions.gaussian import Gaussian
from scuvae.distributions.precision import diagonal_tril, expected_precision, scale_tril
from scuvae.distributions.quasi_random import normal_points
from scuvae.inference.posteriors.objectives import elbo, elbo_and_slope
from scuvae.inference.refinement.gauss_newton import Ascent, climb
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
    q: Gaussian,
    *,
    max_steps: int = 10,
    n_samples: int = 2,
    tolerance: float = 0.3,
    kl_weight: float = 1.0,
) -> Gaussian:
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
    q = q.detach()
    points = normal_points(n_samples, q.mean)
    directions = _alternating(normal_points(2 * _PAIRS, q.mean))
    with torch.no_grad():
        start = elbo(model, batch, q.as_family("full"), points).tempered(kl_weight)
    mean, target = climb(model, batch, q.mean, max_steps, _CLIMB * tolerance, kl_weight)
    tril = scale_tril(target) if q.full else diagonal_tril(target)
    value, slope = _value_and_slope(model, batch, mean, tril, points, kl_weight)
    best = value.clone()
    cells = Ascent(batch, value, slope)

    for step_number in range(max_steps):
        rows = cells.rows
        old = Gaussian(mean[rows], tril[rows])
        at = old.draw(directions[step_number % len(directions)])
        expected = expected_precision(
            model.curvature(cells.batch, at), model.prior.precision(old), kl_weight
        )
        # Averaged over the steps so far; the precision at the mean is only where they begin.
        # Where a cell's steps are short, so is the change of its precision.
        share = cells.rate / (step_number + 1)
        blended = torch.lerp(target[rows], expected, share.view(-1, 1, 1))
        factor = scale_tril(blended)
        new_mean = old.mean + cells.step(factor)
        new_tril = factor if q.full else diagonal_tril(blended)
        found = _value_and_slope(model, cells.batch, new_mean, new_tril, points, kl_weight)
        better, gain = cells.settle(*found)
        mean[rows] = torch.where(better[:, None], new_mean, old.mean)
        tril[rows] = torch.where(better[:, None, None], new_tril, old.factor)
        target[rows] = torch.where(better[:, None, None], blended, target[rows])
        best[rows] = cells.value
        cells.keep(cells.going(gain, factor, tolerance))
        if not len(cells):
            break

    # Also where the ELBO is no number. Few points flatter a q that is a little too narrow.
    worse = ~(best >= start - _FLATTERY)
    mean = torch.where(worse[:, None], q.mean, mean)
    tril = torch.where(worse[:, None, None], q.scale_tril, tril)
    return Gaussian(mean, tril).as_family(q.family)


def _alternating(points: Tensor) -> Tensor:
    """Antithetic points in pairs: each followed by its opposite."""
    return torch.stack(points.chunk(2), 1).flatten(0, 1)


def _value_and_slope(
    model: VAE, batch: Batch, mean: Tensor, tril: Tensor, points: Tensor, kl_weight: float
) -> tuple[Tensor, Tensor]:
    """Each cell's ELBO over fixed draws, divided by β, and its slope in the mean."""
    q = Gaussian(mean, tril)
    found, slopes = elbo_and_slope(model, batch, q, points)
    return found.tempered(kl_weight), slopes.mean(0) / kl_weight + model.prior.slope(q)
