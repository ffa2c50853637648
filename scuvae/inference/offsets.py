"""The offset in the decoder of a batch that a fit has not seen, all else frozen.

The decoder's first layer is a = W z + b + o, with o the offset of the cell's batch. A new batch's
o, with a prior N(ō, τ²) about the mean of the known ones, maximises

    F(o, q) = Σ_i (E_q[log p(x_i | z, o)] − β KL(q_i ‖ N(0, I))) − |o − ō|² / 2τ²,

τ² the variance of known offsets, so that few cells move it little. Three steps that raise F take
turns until it stands still:

1. local steps on every q_i, which start anew too when F stands still;
2. L-BFGS on o with every q_i fixed, over fixed draws;
3. all means move by a common c, and o by −W c: a, hence the likelihood, stays as it is, and the
   c that is best for KL and prior has a closed form. The two steps before it pass slowly from q
   to o what W z and o can both say, for each holds the other in place: without this one they
   ended .4 nats a cell lower (429 cells, 1,287 genes).
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal

from scuvae.inference.local_steps import THOROUGH, draw, normal_points
from scuvae.inference.objectives import kl_to_prior
from scuvae.inference.refine import refine
from scuvae.inference.validation import starts
from scuvae.model import VAE, Batch

# Turns at most, and the gain in nats a cell that another one is worth.
_MOST_TURNS = 50
_TOLERANCE = 0.01
# Local steps of a turn, from the q of the turn before, and L-BFGS steps.
_LOCAL_STEPS = 3
_OFFSET_STEPS = 8
# Draws that expectations are taken over; many cells make up for few draws of each.
_DRAWS, _FEW_DRAWS, _MANY_CELLS = 8, 2, 256


@dataclass(frozen=True)
class Offset:
    """What a new batch adds to the first layer, (width,), and what that brought.

    ``start`` and ``end`` are ELBOs in nats a cell, with β in place, at the mean of known offsets
    and at ``value``; ``n_turns`` is how long it took.
    """

    value: Tensor
    start: float
    end: float
    n_turns: int


def with_offsets(model: VAE, offsets: Tensor) -> VAE:
    """A copy of ``model`` whose batches have the columns of ``offsets``, (width, batches)."""
    model = copy.deepcopy(model)
    assert model.decoder.offset is not None
    model.decoder.offset.weight = nn.Parameter(offsets.detach().clone())
    model.decoder.offset.in_features = offsets.shape[1]
    return model


def known_offsets(model: VAE) -> Tensor:
    """The offsets of a model's batches, (width, batches)."""
    if model.decoder.offset is None:
        raise ValueError("this decoder was fitted without batches: there is no offset to estimate")
    return model.decoder.offset.weight.detach()


def estimate_offset(
    model: VAE, cells: Iterable[Batch], covariance: str, *, kl_weight: float = 1.0
) -> Offset:
    """The offset of a batch from its cells, under a fitted model that stays as it is.

    Parameters
    ----------
    model
        In evaluation mode, its decoder with an offset for each known batch.
    cells
        The new batch's cells, in any order and any portions; their covariates are not read.
    covariance
        The family of q.
    kl_weight
        β, as the model was fitted.
    """
    climb = _Climb(model, cells, covariance, kl_weight)
    elbo, value = climb.value()
    first = elbo
    n_turns, least = 0, _TOLERANCE * climb.n_cells
    while n_turns < _MOST_TURNS:
        n_turns += 1
        climb.move_offset()
        climb.move_together()
        climb.move_posteriors()
        last = value
        elbo, value = climb.value()
        if value - last > least:
            continue
        # Under the offset of many turns ago a cell may have taken to another mode.
        climb.move_posteriors(anew=True)
        last = value
        elbo, value = climb.value()
        if not value - last > least:
            break
    return Offset(climb.offset.squeeze(1), first / climb.n_cells, elbo / climb.n_cells, n_turns)


class _Climb:
    """The offset, every q, and the three steps that raise F over the same fixed draws."""

    def __init__(
        self, model: VAE, cells: Iterable[Batch], covariance: str, kl_weight: float
    ) -> None:
        known = known_offsets(model)
        self.centre = known.mean(1, keepdim=True)
        first = model.decoder.layers[0]
        assert isinstance(first, nn.Linear)
        self.loading = first.weight.detach()
        # Of a single batch nothing is known of the spread: then as far as z moves a.
        spread = known.var(1) if known.shape[1] > 1 else self.loading.square().sum(1)
        self.variance = spread.mean().clamp_min(1e-12)
        self.model = with_offsets(model, self.centre).requires_grad_(False)
        self.batches = [replace(b, covariates=self.centre.new_ones(len(b), 1)) for b in cells]
        self.n_cells = sum(map(len, self.batches))
        self.covariance, self.kl_weight = covariance, kl_weight
        self.n_samples = _DRAWS if self.n_cells < _MANY_CELLS else _FEW_DRAWS
        self.options = THOROUGH | {"kl_weight": kl_weight, "n_samples": self.n_samples}
        self.q = [
            refine(self.model, batch, starts(self.model, batch, covariance), **self.options)
            for batch in self.batches
        ]

    @property
    def offset(self) -> Tensor:
        """o, (width, 1), which the model's decoder holds."""
        assert self.model.decoder.offset is not None
        return self.model.decoder.offset.weight

    def log_likelihood(self, number: int) -> Tensor:
        """E_q[log p] of the cells of a batch, summed."""
        q = self.q[number]
        points = normal_points(self.n_samples, q.mean)
        values = self.model.log_likelihood(self.batches[number], draw(q, points))
        return _total(values) / len(points)

    def penalty(self) -> Tensor:
        return 0.5 * _total((self.offset - self.centre).square() / self.variance)

    @torch.no_grad()
    def value(self) -> tuple[float, float]:
        """The cells' ELBO in nats, and F."""
        elbo = 0.0
        for number, q in enumerate(self.q):
            kl = self.kl_weight * _total(kl_to_prior(q))
            elbo += float(self.log_likelihood(number) - kl)
        return elbo, elbo - float(self.penalty())

    def move_posteriors(self, *, anew: bool = False) -> None:
        """Every q by local steps from where it is, or also from where new cells begin."""
        options = self.options if anew else self.options | {"max_steps": _LOCAL_STEPS}
        for number, (batch, q) in enumerate(zip(self.batches, self.q, strict=True)):
            others = starts(self.model, batch, self.covariance) if anew else []
            self.q[number] = refine(self.model, batch, [q, *others], **options)

    def move_offset(self) -> None:
        offset = self.offset.requires_grad_()
        before = offset.detach().clone()
        optimizer = torch.optim.LBFGS(
            [offset], max_iter=_OFFSET_STEPS, line_search_fn="strong_wolfe"
        )
        values: list[float] = []

        @torch.enable_grad()
        def loss() -> float:
            total = self.penalty()
            (gradient,) = torch.autograd.grad(total, offset)
            for number in range(len(self.batches)):
                # A batch's graph at a time.
                part = -self.log_likelihood(number)
                gradient += torch.autograd.grad(part, offset)[0]
                total = total.detach() + part.detach()
            offset.grad = gradient / self.n_cells
            values.append(float(total) / self.n_cells)
            return values[-1]

        optimizer.step(loss)
        last = loss()
        offset.requires_grad_(False).grad = None
        if not last <= values[0]:
            offset.copy_(before)

    @torch.no_grad()
    def move_together(self) -> None:
        """All means by c, the offset by −W c."""
        w = self.loading / self.variance
        total = torch.stack([q.mean.sum(0) for q in self.q]).sum(0)
        pull = w.T @ (self.offset - self.centre).squeeze(1) - self.kl_weight * total
        eye = torch.eye(len(total), dtype=w.dtype, device=w.device)
        matrix = self.kl_weight * self.n_cells * eye + w.T @ self.loading
        c = torch.linalg.solve(matrix, pull)
        self.offset.sub_((self.loading @ c).unsqueeze(1))
        self.q = [_moved(q, c) for q in self.q]


def _total(values: Tensor) -> Tensor:
    """The sum in float64, on the host: some devices have none."""
    return values.cpu().double().sum()


def _moved(q: Distribution, c: Tensor) -> Distribution:
    mean = q.mean + c
    if isinstance(q, MultivariateNormal):
        return MultivariateNormal(mean, scale_tril=q.scale_tril, validate_args=False)
    return Independent(Normal(mean, q.stddev, validate_args=False), 1, validate_args=False)
