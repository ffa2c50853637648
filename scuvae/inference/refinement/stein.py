"""q found closely, of either family: its mean climbs, then come steps on its mean and scales.

Natural steps take their precision from the expected curvature of the decoder's output, which is
close to but not the ELBO's own, and few draws say little of L scales: their q is too narrow, and
beside 1,000 steps of Adam they end .2 to .5 nats a cell short. Here the precision follows Stein's
identity, with C the factor of q's covariance and ε = C⁻¹ (z − m),

    −E_q[∇² log p] = −E_q[∇ log p εᵀ] C⁻¹,      Λ ← P − E_q[∇² log p],

P the prior's precision, which is exact at the optimum whatever the likelihood, over 2L points or
more whose second moments are the normal's own; a diagonal q takes the diagonal, 1/s_k² ← Λ_kk. The
gradients are those that the mean needs anyway.

Every step has points of its own. Near the optimum each says where that is, m + Λ⁻¹ g and Λ, but
for the noise of its points: q goes to the average of what the steps have said.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from scuvae.batches import Batch
from scuvae.distributions.gaussian import Gaussian
from scuvae.distributions.precision import cap_length, expected_precision, scale_tril
from scuvae.distributions.quasi_random import normal_points
from scuvae.inference.posteriors.objectives import tempered
from scuvae.inference.refinement.gauss_newton import (
    LONGEST_STEP,
    ROUNDING,
    SHORTEST,
    Ascent,
    at,
    climb,
)
from scuvae.kernels.malloc import keep_freed_memory
from scuvae.model import VAE

# The mean climbs until a step gains less, in nats, in so many steps at most.
_CLIMB, _CLIMBS = 6.0, 8
# Points of the first q that it climbs with: with none, or by longer steps than those that follow,
# it leaves the reach of the best q more often.
_AROUND = 4
# Points that an expectation is taken over, where 2L are fewer.
_FEWEST = 16
# A scale at most doubles or halves in a step.
_WIDEST = 2.0
# Steps are averaged once they promise less than so many nats, and a cell stops after so many. What
# a step promises has a floor, its points' noise: a bound below that would never be reached.
_NEAR, _AVERAGED = 1.5, 2
# A step is taken back where the ELBO, over other points, falls by so many standard errors.
_ERRORS = 4.0
# The longest step in q's own standard deviations: its points know no more of p than that.
_FARTHEST = 2.0


def refine_diagonal(
    model: VAE, batch: Batch, q: Gaussian, *, max_steps: int = 20, tolerance: float = 0.05
) -> Gaussian:
    """A diagonal q from ``q``, at most ``max_steps`` steps of either kind.

    A cell stops by itself when a step promises less than ``tolerance`` nats.
    """
    start = q.as_family("diagonal").detach()
    offsets = start.spread(normal_points(_AROUND, start.mean))
    most = min(max_steps, _CLIMBS)
    mean, expected = climb(
        *(model, batch, start.mean, most, _CLIMB), offsets=offsets, farthest=_FARTHEST
    )
    q = Gaussian(mean, expected.diagonal(dim1=-2, dim2=-1).rsqrt())
    return polish(model, batch, q, max_steps=max_steps, tolerance=tolerance, expected=expected)


def polish(
    model: VAE,
    batch: Batch,
    q: Gaussian,
    *,
    max_steps: int = 15,
    tolerance: float = 0.05,
    kl_weight: float = 1.0,
    expected: Tensor | None = None,
) -> Gaussian:
    """Steps of mean and covariance from a q near its optimum, in its family.

    ``expected`` is the precision that q's mean expects, (cells, latent, latent), where known: it
    stands in where Stein's is not positive.
    """
    keep_freed_memory()
    mean, tril = q.mean.detach().clone(), q.scale_tril.detach().clone()
    if max_steps <= 0:
        return Gaussian(mean, tril).as_family(q.family)
    n_points = max(2 * mean.shape[-1], _FEWEST)
    if expected is None:
        prior = model.prior.precision(at(mean))
        expected = expected_precision(model.curvature(batch, mean), prior, kl_weight)
    age = torch.zeros_like(mean[:, 0])
    value, slope, old = _evaluate(model, batch, Gaussian(mean, tril), n_points, 0, kl_weight)
    cells = Ascent(batch, value, slope)
    precision = old.precision
    for step_number in range(1, max_steps + 1):
        rows, rate = cells.rows, cells.rate
        # A step that is noise by now moves q to the average of those before it and itself.
        factor = scale_tril(_positive(precision, expected))
        promise = cells.promise(factor) + _mismatch(old.tril, precision, q.full)
        near = promise < _NEAR
        age = torch.where(near & (rate == 1), age + 1, torch.zeros_like(age))
        share = rate / age.clamp_min(1)
        whole = (factor @ (factor.mT @ cells.slope.unsqueeze(-1))).squeeze(-1)
        step = _within(old.tril, whole)
        new_mean = old.mean + share[:, None] * cap_length(step, LONGEST_STEP)
        new_tril = (_stretched if q.full else _stretched_diagonal)(old.tril, precision, rate)
        # A long step counts once the ELBO has been seen after it.
        mean[rows] = torch.where(near[:, None], new_mean, old.mean)
        tril[rows] = torch.where(near[:, None, None], new_tril, old.tril)
        going = ((age < _AVERAGED) | (promise > tolerance)) & (rate > SHORTEST)
        if step_number == max_steps or not going.any():
            break
        kept = cells.keep(going)
        if kept is not None:
            old, precision, expected = old.take(kept), precision[kept], expected[kept]
            age, new_mean, new_tril = age[kept], new_mean[kept], new_tril[kept]
        moved = Gaussian(new_mean, new_tril)
        value, slope, new = _evaluate(model, cells.batch, moved, n_points, step_number, kl_weight)
        better, _ = cells.settle(value, slope, _ERRORS * old.variance.sqrt() + ROUNDING)
        old = new.where(better, old)
        blended = torch.lerp(precision, new.precision, 1 / (age + 1).view(-1, 1, 1))
        precision = torch.where(better[:, None, None], blended, precision)
    return Gaussian(mean, tril).as_family(q.family)


class _State(NamedTuple):
    """q of some cells; the variance of its ELBO's error over some points, and the precision that
    these ask for (see :func:`_evaluate`).
    """

    mean: Tensor
    tril: Tensor
    variance: Tensor
    precision: Tensor

    def take(self, rows: Tensor) -> "_State":
        return _State(*(values[rows] for values in self))

    def where(self, better: Tensor, other: "_State") -> "_State":
        """This where ``better``, (cells,), else ``other``."""
        pairs = zip(self, other, strict=True)
        return _State(*(torch.where(better.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in pairs))


def _positive(precision: Tensor, expected: Tensor) -> Tensor:
    """Stein's precision; where its noise makes it no precision, halfway to the expected one."""
    failed = torch.linalg.cholesky_ex(precision).info > 0
    return torch.where(failed[:, None, None], 0.5 * (precision + expected), precision)


def _within(tril: Tensor, step: Tensor) -> Tensor:
    """Steps no longer than so many standard deviations of q."""
    length = torch.linalg.solve_triangular(tril, step.unsqueeze(-1), upper=False).norm(dim=-2)
    return step * (_FARTHEST / length.clamp_min(_FARTHEST))


def _mismatch(tril: Tensor, precision: Tensor, full: bool) -> Tensor:
    """About what the ELBO gains by scales that fit a precision, in nats, (cells,)."""
    if full:
        fit = torch.linalg.eigvalsh(tril.mT @ precision @ tril)
    else:
        scale = tril.diagonal(dim1=-2, dim2=-1)
        fit = scale.square() * precision.diagonal(dim1=-2, dim2=-1)
    fit = fit.clamp(_WIDEST**-2, _WIDEST**2)
    return 0.5 * (fit - 1 - fit.log()).sum(-1)


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
    model: VAE, batch: Batch, q: Gaussian, n_points: int, seed: int, kl_weight: float
) -> tuple[Tensor, Tensor, _State]:
    """Each cell's ELBO over some points, its slope in the mean, and what else they say of q.

    All but the precision divided by β, the weight of the KL term (the variance by its square).
    """
    points = normal_points(n_points, q.mean, seed=seed)
    log_likelihood, slopes = model.log_likelihood_and_slope(batch, q.draw(points))
    prior = model.prior
    value, slope = tempered(prior, q, log_likelihood, slopes, kl_weight)
    slopes = slopes / kl_weight
    pairs = log_likelihood / kl_weight
    pairs = 0.5 * (pairs[: n_points // 2] + pairs[n_points // 2 :])
    curvature = torch.einsum("scj,sk->cjk", slopes, points.squeeze(1)) / n_points
    curvature = torch.linalg.solve_triangular(q.factor, curvature, upper=False, left=False)
    precision = expected_precision(-0.5 * (curvature + curvature.mT), prior.precision(q))
    state = _State(q.mean, q.factor, pairs.var(0) / len(pairs), precision)
    return value, slope, state
