"""Gauss–Newton steps up the joint density, each cell by itself; and the one backtracking of all."""

import torch
from torch import Tensor

from scuvae.batches import Batch
from scuvae.distributions.gaussian import Gaussian
from scuvae.distributions.precision import cap_length, expected_precision, precondition, scale_tril
from scuvae.model import VAE
from scuvae.model.priors import Prior

# Longest move of a cell's mean in one step, in prior standard deviations.
LONGEST_STEP = 4.0
# A cell whose steps had to be shortened to this part stands still.
SHORTEST = 1e-2
# A step is taken back when it costs a cell more than this many nats: float32's noise on sums of
# some thousands of terms.
ROUNDING = 1e-3
# A cell that gained so many times the tolerance goes on whatever its gradient promises: where
# the curvature is overrated, steps fall short.
_SURPRISE = 4


class Ascent:
    """The cells that still move: their rows in the batch, objective, its slope and step size.

    A step that lowers a cell's objective is taken back and shortened for this cell.
    """

    def __init__(self, batch: Batch, value: Tensor, slope: Tensor) -> None:
        self.batch, self.value, self.slope = batch, value, slope
        self.rows = torch.arange(len(batch), device=value.device)
        self.rate = torch.ones_like(value)

    def step(self, factor: Tensor) -> Tensor:
        """The next step of the means at a precision of factor C, C Cᵀ = Λ⁻¹, (cells, latent)."""
        direction = precondition(factor, self.slope)
        return self.rate[:, None] * cap_length(direction, LONGEST_STEP)

    def promise(self, factor: Tensor) -> Tensor:
        """What it should bring, gᵀ Λ⁻¹ g / 2, in nats, (cells,)."""
        ahead = (factor.mT @ self.slope.unsqueeze(-1)).squeeze(-1)
        return 0.5 * ahead.square().sum(-1)

    def settle(
        self, value: Tensor, slope: Tensor, slack: float | Tensor = ROUNDING
    ) -> tuple[Tensor, Tensor]:
        """Take the step where it lowers the objective by no more than ``slack``, else shorten it.

        Returned is where it was taken, and what it gained, in nats: of a shortened step, what a
        whole one would have; infinity where it was taken back, which says nothing of the next.
        """
        better = value >= self.value - slack
        gain = torch.where(better, (value - self.value) / self.rate, torch.inf)
        self.value = torch.where(better, value, self.value)
        self.slope = torch.where(better[:, None], slope, self.slope)
        self.rate = torch.where(better, (2 * self.rate).clamp_max(1.0), self.rate / 4)
        return better, gain

    def going(self, gain: Tensor, factor: Tensor, tolerance: float) -> Tensor:
        """The cells that neither have converged nor stand still, (cells,)."""
        ahead = (self.promise(factor) > tolerance) | (gain > _SURPRISE * tolerance)
        return (gain > tolerance) & ahead & (self.rate > SHORTEST)

    def keep(self, going: Tensor) -> Tensor | None:
        """Drop the other cells; returned are the places of those kept, None where all are."""
        if going.all():
            return None
        kept = going.nonzero().squeeze(-1)
        self.batch = self.batch.take(kept)
        self.value, self.slope = self.value[kept], self.slope[kept]
        self.rate, self.rows = self.rate[kept], self.rows[kept]
        return kept

    def __len__(self) -> int:
        return len(self.rows)


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
    points = mean if offsets is None else mean + offsets
    found = model.log_likelihood_and_slope(batch, points)
    cells = Ascent(batch, *_joint(model.prior, mean, *found, kl_weight))
    for _ in range(max_steps):
        rows = cells.rows
        old_mean = mean[rows]
        precision = expected_precision(
            model.curvature(cells.batch, old_mean), model.prior.precision(at(old_mean)), kl_weight
        )
        target[rows] = precision
        factor = scale_tril(precision)
        step = cells.step(factor)
        if farthest < torch.inf:
            width = precision.diagonal(dim1=-2, dim2=-1).rsqrt()
            step = width * cap_length(step / width, farthest)
        new_mean = old_mean + step
        points = new_mean if offsets is None else new_mean + offsets[:, rows]
        found = model.log_likelihood_and_slope(cells.batch, points)
        better, gain = cells.settle(*_joint(model.prior, new_mean, *found, kl_weight))
        mean[rows] = torch.where(better[:, None], new_mean, old_mean)
        cells.keep(cells.going(gain, factor, tolerance))
        if not len(cells):
            break
    return mean, target


def at(z: Tensor) -> Gaussian:
    """q without width: of a prior, its slope and precision at a point."""
    return Gaussian(z, torch.zeros_like(z))


def _joint(
    prior: Prior, mean: Tensor, log_likelihood: Tensor, slope: Tensor, kl_weight: float
) -> tuple[Tensor, Tensor]:
    """log p(x | z)/β + log p(z) at the mean, and its slope.

    Of points around it, (points, cells), log p(x | z) and its slope are averaged.
    """
    if log_likelihood.dim() > 1:
        log_likelihood, slope = log_likelihood.mean(0), slope.mean(0)
    value = log_likelihood / kl_weight + prior.log_prob(mean)
    return value, slope / kl_weight + prior.slope(at(mean))
