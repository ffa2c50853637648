"""Local steps: q of each cell of a batch towards its optimum, the decoder frozen.

Every cell is treated on its own: the draws are the same fixed points for all of them, so that a
cell's posterior depends neither on the cells beside it nor on their order.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal

from scuvae.inference import natural
from scuvae.inference.memory import keep_freed_memory
from scuvae.inference.objectives import kl_to_prior
from scuvae.model import VAE, Batch, gaussian, raw_scale
from scuvae.model.vae import frozen

# Longest move of a cell's mean in one step, in prior standard deviations.
LONGEST_STEP = 4.0
# A cell whose steps had to be shortened to this part stands still.
_SHORTEST = 1e-2
# A step is taken back when it costs a cell more than this many nats: float32's noise on sums of
# some thousands of terms.
ROUNDING = 1e-3
# By how much few points may overrate where a cell began, in nats.
_FLATTERY = 0.05
# Antithetic pairs of points that curvature is averaged over, a point a step.
_PAIRS = 4
# The mean climbs until a step gains less than so many times the tolerance; the steps after it
# gain on the mean too.
_CLIMB = 20
# A cell that gained so many times the tolerance goes on whatever its gradient promises: where
# the curvature is overrated, steps fall short.
_SURPRISE = 4
# What a diagnosis asks of the steps, where some more of them do not matter.
THOROUGH: dict[str, Any] = {"max_steps": 30, "n_samples": 8, "tolerance": 0.01}


@lru_cache(maxsize=1024)
def _normal_points(n_samples: int, n_latent: int, seed: int) -> Tensor:
    """Antithetic quasi-random draws from N(0, I), (n_samples, n_latent): always the same.

    Their second moment is exact, where they are enough to have the identity's, or else in each
    dimension: without that, few points overrate or underrate every wide q.
    """
    n_pairs = (n_samples + 1) // 2
    sobol = torch.quasirandom.SobolEngine(n_latent, scramble=True, seed=seed)
    points = torch.special.ndtri(sobol.draw(n_pairs, dtype=torch.float64).clamp(1e-6, 1 - 1e-6))
    if n_pairs >= n_latent:
        factor = torch.linalg.cholesky(points.T @ points / n_pairs)
        points = torch.linalg.solve_triangular(factor, points.T, upper=False).T
    else:
        points = points / points.square().mean(0).sqrt()
    return torch.cat([points, -points])[:n_samples]


def normal_points(n_samples: int, like: Tensor, seed: int = 0) -> Tensor:
    """Fixed draws of N(0, I) with the dtype and device of ``like``, (n_samples, 1, latent)."""
    return _normal_points(n_samples, like.shape[-1], seed).to(like).unsqueeze(1)


def draw(q: Distribution, points: Tensor) -> Tensor:
    """The draws of q that ``points`` of N(0, I), (samples, 1 or cells, latent), stand for."""
    return q.mean + (_scale_tril(q) @ points.unsqueeze(-1)).squeeze(-1)


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
    first_mean, first_tril = q.mean.detach(), _scale_tril(q).detach()
    points = normal_points(n_samples, first_mean)
    directions = _alternating(normal_points(2 * _PAIRS, first_mean))
    start = _value(model, batch, first_mean, first_tril, points, kl_weight)
    mean, target = climb(model, batch, first_mean, max_steps, _CLIMB * tolerance, kl_weight)
    tril = natural.scale_tril(target) if full else _diagonal_tril(target)
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
            target[rows], natural.precision(curvature, kl_weight), share.view(-1, 1, 1)
        )
        factor = natural.scale_tril(blended)
        direction = natural.precondition(factor, cells.gradient)
        new_mean = old_mean + cells.rate[:, None] * natural.cap_length(direction, LONGEST_STEP)
        new_tril = factor if full else _diagonal_tril(blended)
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


def climb(
    model: VAE,
    batch: Batch,
    mean: Tensor,
    max_steps: int,
    tolerance: float,
    kl_weight: float = 1.0,
    *,
    offsets: Tensor | None = None,
    farthest: float = torch.inf,
) -> tuple[Tensor, Tensor]:
    """Gauss–Newton steps up the joint density, and the precision where each cell's last began.

    With ``offsets``, (points, cells, latent), up its average over these points around the mean: the
    mean of a wide q lies elsewhere than the density's own mode, at times in another's reach. No
    step is longer than ``farthest`` standard deviations of the diagonal q of that precision.
    """
    mean = mean.clone()
    size = mean.shape[-1]
    target = mean.new_empty(len(batch), size, size)
    cells = _Active(batch, *_joint_and_gradient(model, batch, mean, kl_weight, offsets))
    for _ in range(max_steps):
        rows = cells.rows
        old_mean = mean[rows]
        precision = natural.precision(model.curvature(cells.batch, old_mean), kl_weight)
        target[rows] = precision
        factor = natural.scale_tril(precision)
        direction = natural.precondition(factor, cells.gradient)
        step = cells.rate[:, None] * natural.cap_length(direction, LONGEST_STEP)
        if farthest < torch.inf:
            width = precision.diagonal(dim1=-2, dim2=-1).rsqrt()
            step = width * natural.cap_length(step / width, farthest)
        new_mean = old_mean + step
        around = None if offsets is None else offsets[:, rows]
        found = _joint_and_gradient(model, cells.batch, new_mean, kl_weight, around)
        better = cells.update(*found, factor)
        mean[rows] = torch.where(better[:, None], new_mean, old_mean)
        if not cells.narrow(tolerance):
            break
    return mean, target


class _Active:
    """The cells that still move: their rows in the batch, objective, gradient and step size.

    ``gain`` is what the last step brought, in nats, and ``promise`` what the next one should
    bring at the last precision, gᵀ Λ⁻¹ g / 2.
    """

    def __init__(self, batch: Batch, value: Tensor, gradient: Tensor) -> None:
        self.batch, self.value, self.gradient = batch, value, gradient
        self.rows = torch.arange(len(batch), device=value.device)
        self.rate = torch.ones_like(value)
        self.gain = self.promise = torch.full_like(value, torch.inf)

    def update(self, value: Tensor, gradient: Tensor, factor: Tensor) -> Tensor:
        """Take the step where it lowers the objective by no more than noise, else shorten it."""
        better = value >= self.value - ROUNDING
        # A shortened step gains little, and says little of the next.
        self.gain = torch.where(better, (value - self.value) / self.rate, torch.inf)
        self.value = torch.where(better, value, self.value)
        self.gradient = torch.where(better[:, None], gradient, self.gradient)
        self.rate = torch.where(better, (2 * self.rate).clamp_max(1.0), self.rate / 4)
        ahead = (factor.mT @ self.gradient.unsqueeze(-1)).squeeze(-1)
        self.promise = 0.5 * ahead.square().sum(-1)
        return better

    def narrow(self, tolerance: float) -> bool:
        """Drop the cells that have converged or stand still; whether any is left."""
        ahead = (self.promise > tolerance) | (self.gain > _SURPRISE * tolerance)
        going = (self.gain > tolerance) & ahead & (self.rate > _SHORTEST)
        if going.all():
            return True
        kept = going.nonzero().squeeze(-1)
        self.batch = self.batch.take(kept)
        self.value, self.gradient = self.value[kept], self.gradient[kept]
        self.rate, self.rows = self.rate[kept], self.rows[kept]
        return len(kept) > 0


def _joint_and_gradient(
    model: VAE, batch: Batch, mean: Tensor, kl_weight: float, offsets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """log p(x | z)/β + log p(z) at the mean, but for a constant, and its gradient.

    With offsets, averages over the points around it, but for another constant.
    """
    value, slope = _likelihood_and_slope(model, batch, mean, offsets)
    return value / kl_weight - 0.5 * mean.square().sum(-1), slope / kl_weight - mean


def _likelihood_and_slope(
    model: VAE, batch: Batch, mean: Tensor, offsets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """log p(x | z) at the mean, or its average over points around it; its gradient in the mean."""
    with torch.enable_grad(), frozen(model):
        centre = mean.detach().requires_grad_()
        if offsets is None:
            value = model.log_likelihood(batch, centre)
        else:
            value = model.log_likelihood(batch, centre + offsets).mean(0)
        (slope,) = torch.autograd.grad(value.sum(), centre)
    return value.detach(), slope


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


def _scale_tril(q: Distribution) -> Tensor:
    return q.scale_tril if isinstance(q, MultivariateNormal) else torch.diag_embed(q.stddev)


def _diagonal_tril(precision: Tensor) -> Tensor:
    """The best diagonal q at a precision Λ has s_k² = 1/Λ_kk."""
    return torch.diag_embed(precision.diagonal(dim1=-2, dim2=-1).rsqrt())


def refine_gradient(
    model: VAE,
    batch: Batch,
    q: Distribution,
    *,
    max_steps: int = 200,
    n_samples: int = 4,
    kl_weight: float = 1.0,
    learning_rate: float = 0.1,
) -> Distribution:
    """Adam on each cell's mean and scale over fixed draws, its rate falling to zero."""
    mean = q.mean.detach().clone().requires_grad_()
    raw = raw_scale(q).detach().clone().requires_grad_()
    # A short memory of squared gradients: the first are orders of magnitude larger than the last.
    optimizer = torch.optim.Adam([mean, raw], lr=learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max_steps)
    with torch.enable_grad(), frozen(model):
        for step in range(max_steps):
            current = gaussian(mean, raw)
            # New points at each step, the same for every cell: few fixed ones bias the scales.
            points = normal_points(n_samples, mean, seed=step)
            expected = model.log_likelihood(batch, draw(current, points)).mean(0)
            loss = -(expected - kl_weight * kl_to_prior(current)).sum()
            # Of q alone: the decoder's own gradients are neither needed nor touched.
            mean.grad, raw.grad = torch.autograd.grad(loss, [mean, raw])
            optimizer.step()
            schedule.step()
    return gaussian(mean.detach(), raw.detach())


LOCAL_STEPS: dict[str, Callable[..., Distribution]] = {
    "natural": refine_natural,
    "gradient": refine_gradient,
}
