"""Gauss–Newton steps up the joint density, each cell by itself."""

import torch
from torch import Tensor

from scuvae.batches import Batch
from scuvae.distributions.precision import cap_length, expected_precision, precondition, scale_tril
from scuvae.model import VAE
from scuvae.model.vae import frozen

# Longest move of a cell's mean in one step, in prior standard deviations.
LONGEST_STEP = 4.0
# A cell whose steps had to be shortened to this part stands still.
_SHORTEST = 1e-2
# A step is taken back when it costs a cell more than this many nats: float32's noise on sums of
# some thousands of terms.
ROUNDING = 1e-3
# A cell that gained so many times the tolerance goes on whatever its gradient promises: where
# the curvature is overrated, steps fall short.
_SURPRISE = 4


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
        precision = expected_precision(model.curvature(cells.batch, old_mean), kl_weight)
        target[rows] = precision
        factor = scale_tril(precision)
        direction = precondition(factor, cells.gradient)
        step = cells.rate[:, None] * cap_length(direction, LONGEST_STEP)
        if farthest < torch.inf:
            width = precision.diagonal(dim1=-2, dim2=-1).rsqrt()
            step = width * cap_length(step / width, farthest)
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
