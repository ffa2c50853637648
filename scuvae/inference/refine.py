"""Refine: local steps on q until it converges, the decoder frozen.

The one function behind validation, projection of new cells, repair of encoders, the amortization
gap and bridges to models trained elsewhere. Every cell is treated on its own: the draws are the
same fixed points for all of them, so that a cell's posterior depends neither on the cells beside
it nor on their order.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal

from scuvae.inference import natural
from scuvae.inference.objectives import kl_to_prior
from scuvae.model import VAE, Batch, gaussian, raw_scale

# Longest move of a cell's mean in one step, in prior standard deviations.
_LONGEST_STEP = 4.0
# A step is taken back when it costs a cell more than this many nats: float32's noise on sums of
# some thousands of terms.
_NOISE = 1e-3
# A later start has to be better than the first by so many nats.
_TIE = 0.05


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
    n_samples: int = 4,
    tolerance: float = 0.01,
    kl_weight: float = 1.0,
) -> Distribution:
    """Natural-gradient steps from ``q``, each undone and shortened where it lowers the ELBO.

    Parameters
    ----------
    max_steps
        Number of steps at most; a cell stops by itself when a step promises less than
        ``tolerance`` nats.
    n_samples
        Fixed draws that an expectation under q is taken over.

    Returns
    -------
    A distribution of q's own family: full covariance stays full, diagonal stays diagonal.
    """
    full = isinstance(q, MultivariateNormal)
    first_mean, first_tril = q.mean.detach(), _scale_tril(q).detach()
    mean, tril = first_mean.clone(), first_tril.clone()
    active = torch.arange(len(batch), device=mean.device)
    part = batch
    points = normal_points(n_samples, mean)
    value, gradient = _value_and_gradient(model, part, mean, tril, points, kl_weight)
    start = value
    best = value.clone()
    rate = torch.ones_like(value)

    for step_number in range(max_steps):
        old_mean, old_tril = mean[active], tril[active]
        target = natural.precision(
            _curvature(model, part, old_mean, old_tril, points, step_number), kl_weight
        )
        # Where a cell's steps are short, so is the change of its precision.
        old = torch.cholesky_inverse(old_tril.mT.contiguous(), upper=True)
        blended = torch.lerp(old, target, rate.view(-1, 1, 1))
        factor = natural.scale_tril(blended)
        whole = natural.scale_tril(target)
        direction = (whole @ (whole.mT @ gradient.unsqueeze(-1))).squeeze(-1)
        step = natural.cap_length(direction, _LONGEST_STEP)
        new_mean = old_mean + rate.unsqueeze(-1) * step
        new_tril = factor if full else _diagonal_tril(blended)
        new_value, new_gradient = _value_and_gradient(
            model, part, new_mean, new_tril, points, kl_weight
        )

        # The first step is always taken: a wide q's ELBO says little of where it should go, and
        # a cell that never recovers gets its start back in the end.
        better = (new_value >= value - _NOISE) | (step_number == 0)
        mean[active] = torch.where(better[:, None], new_mean, old_mean)
        tril[active] = torch.where(better[:, None, None], new_tril, old_tril)
        gain = torch.where(better, (new_value - value).abs(), torch.inf)
        value = torch.where(better, new_value, value)
        best[active] = value
        gradient = torch.where(better[:, None], new_gradient, gradient)
        rate = torch.where(better, (2 * rate).clamp_max(1.0), rate / 4)
        going = (gain > tolerance) & (rate > 1e-3)
        if not going.any():
            break
        value, gradient = value[going], gradient[going]
        rate, active = rate[going], active[going]
        if not going.all():
            part = part.take(going.nonzero().squeeze(-1))
    worse = ~(best >= start)  # also where the ELBO is no number
    mean = torch.where(worse[:, None], first_mean, mean)
    tril = torch.where(worse[:, None, None], first_tril, tril)
    if full:
        return MultivariateNormal(mean, scale_tril=tril, validate_args=False)
    scale = tril.diagonal(dim1=-2, dim2=-1)
    return Independent(Normal(mean, scale, validate_args=False), 1, validate_args=False)


def _curvature(
    model: VAE, batch: Batch, mean: Tensor, tril: Tensor, points: Tensor, step_number: int
) -> Tensor:
    """E_q of the curvature: at the mean first, then over one antithetic pair after another."""
    if step_number == 0 or len(points) < 2:
        return natural.gauss_newton(model, batch, mean)
    n_pairs = len(points) // 2
    pair = (step_number - 1) % n_pairs
    spread = (tril @ points[pair].unsqueeze(-1)).squeeze(-1)
    return 0.5 * (
        natural.gauss_newton(model, batch, mean + spread)
        + natural.gauss_newton(model, batch, mean - spread)
    )


def _value_and_gradient(
    model: VAE, batch: Batch, mean: Tensor, tril: Tensor, points: Tensor, kl_weight: float
) -> tuple[Tensor, Tensor]:
    """Each cell's ELBO over fixed draws, divided by β, and its gradient in the mean."""
    with torch.enable_grad():
        centre = mean.detach().requires_grad_()
        z = centre + (tril @ points.unsqueeze(-1)).squeeze(-1)
        expected = model.log_likelihood(batch, z).mean(0)
        (slope,) = torch.autograd.grad(expected.sum(), centre)
    q = MultivariateNormal(mean, scale_tril=tril, validate_args=False)
    value = expected.detach() / kl_weight - kl_to_prior(q)
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
    with torch.enable_grad():
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


@torch.no_grad()
def fixed_elbo(model: VAE, batch: Batch, q: Distribution, n_samples: int | None = None) -> Tensor:
    """Each cell's ELBO over fixed draws, other than those that refinement fits q to, in nats.

    By default there are twice as many draws as latent dimensions: their second moment is exact.
    """
    z = draw(q, normal_points(n_samples or 2 * q.mean.shape[-1], q.mean, seed=1))
    return model.log_likelihood(batch, z).mean(0) - kl_to_prior(q)


def refine(
    model: VAE,
    batch: Batch,
    starts: Sequence[Distribution],
    *,
    local_step: str = "natural",
    **options: Any,
) -> Distribution:
    """q of a batch's cells, refined from each start; the best is kept for each cell.

    Parameters
    ----------
    model
        In evaluation mode; its parameters are not moved.
    starts
        Distributions of one family, over the batch's cells.
    local_step, options
        A name from ``LOCAL_STEPS`` and what that step takes.
    """
    step = LOCAL_STEPS[local_step]
    refined = [step(model, batch, start, **options) for start in starts]
    if len(refined) == 1:
        return refined[0]
    values = torch.stack([fixed_elbo(model, batch, q) for q in refined])
    # Starts that end at one optimum differ by rounding, which must not choose between them.
    values[0] += _TIE
    return select(refined, values.argmax(0))


def select(options: Sequence[Distribution], choice: Tensor) -> Distribution:
    """For each cell the distribution that ``choice``, (cells,), names."""
    cells = torch.arange(len(choice), device=choice.device)
    mean = torch.stack([q.mean for q in options])[choice, cells]
    raw = torch.stack([raw_scale(q) for q in options])[choice, cells]
    return gaussian(mean, raw)


def concatenate(parts: Sequence[Distribution]) -> Distribution:
    """One distribution over the cells of several batches, in order."""
    return gaussian(torch.cat([q.mean for q in parts]), torch.cat([raw_scale(q) for q in parts]))


LOCAL_STEPS: dict[str, Callable[..., Distribution]] = {
    "natural": refine_natural,
    "gradient": refine_gradient,
}


def prior_start(model: VAE, n_cells: int, covariance: str) -> Distribution:
    """q = p(z) for each cell: where refinement starts without an encoder."""
    like = next(model.decoder.parameters())
    mean = like.new_zeros(n_cells, model.n_latent)
    if covariance == "full":
        eye = torch.eye(model.n_latent, dtype=like.dtype, device=like.device)
        return MultivariateNormal(mean, scale_tril=eye.expand(n_cells, -1, -1), validate_args=False)
    return Independent(Normal(mean, torch.ones_like(mean), validate_args=False), 1)


def as_family(q: Distribution, covariance: str) -> Distribution:
    """``q`` as a member of the family: a diagonal one is full too; a full one keeps its margins."""
    if covariance == "full" and not isinstance(q, MultivariateNormal):
        return MultivariateNormal(q.mean, scale_tril=torch.diag_embed(q.stddev))
    if covariance == "diagonal" and isinstance(q, MultivariateNormal):
        return Independent(Normal(q.mean, q.stddev), 1)
    return q
