"""The offset in the decoder of a level that a fit has not seen, such as a new batch's, all else
frozen.

The decoder's first layer is a = W z + b + o + ..., with o the offset of the cell's batch. A new
batch's o, with a prior N(ō, τ²) about the mean of the known ones, maximises

    F(o, q) = Σ_i (E_q[log p(x_i | z, o)] − β KL(q_i ‖ N(0, I))) − |o − ō|² / 2τ²,

τ² the variance of known offsets, so that few cells move it little. Where the decoder has a linear
path, η = W' h(a) + V z + b' + o' + ..., with an o' of its own for each batch: that is estimated
alike and at once. Three steps that raise F take turns until it stands still:

1. local steps on every q_i, which start anew too when F stands still;
2. L-BFGS on o with every q_i fixed, over fixed draws, each unit in terms of its curvature (in
   their own, genes of many counts and of few take twice as many turns);
3. all means move by a common c, o by −W c and o' by −V c: a and η, hence the likelihood, stay as
   they are, and the c that is best for KL and prior has a closed form. The two steps before it pass
   slowly from q to o what W z and o can both say, for each holds the other in place: without this
   one they ended .4 nats a cell lower (429 cells, 1,287 genes).

All cells are of the one batch: its offsets are looked for as intercepts of the two layers.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from scuvae.batches import Batch
from scuvae.distributions.quasi_random import normal_points
from scuvae.inference.mapping.covariate_columns import (
    known_offsets,
    known_slopes,
    with_design,
    with_offsets,
)
from scuvae.inference.refinement.initialization import initial_posteriors
from scuvae.inference.refinement.refine import THOROUGH, refine
from scuvae.model import VAE
from scuvae.model.covariates import Categorical, Design

# Turns at most, and the gain in nats a cell that another one is worth.
_MOST_TURNS = 50
_TOLERANCE = 0.01
# Local steps of a turn, from the q of the turn before or anew, and L-BFGS steps.
_LOCAL_STEPS, _ANEW = 3, 10
_OFFSET_STEPS = 12
# Draws that expectations are taken over, of all cells together: many make up for few of each.
_ALL_DRAWS = 600


@dataclass(frozen=True)
class Offset:
    """What a new batch adds, as :func:`known_offsets` has it, and what that brought.

    ``start`` and ``end`` are ELBOs in nats a cell, with β in place, at the mean of known offsets
    and at ``value``; ``n_turns`` is how long it took, ``n_cells`` by how many cells.
    """

    value: Tensor
    start: float
    end: float
    n_turns: int
    n_cells: int


def estimate_levels(
    model: VAE,
    design: Design,
    cells_of: Callable[[int, int], Iterable[Batch]],
    covariance: str,
    *,
    kl_weight: float = 1.0,
) -> tuple[VAE, list[tuple[Categorical, str, "Offset"]]]:
    """The model under a design with further levels, their offsets estimated one by one.

    Parameters
    ----------
    model
        In evaluation mode, under the fit's design.
    design
        The fit's, with further levels behind each covariate's own.
    cells_of
        The cells of a level, by the covariate's number and the level's, as batches under
        ``design``.
    covariance, kl_weight
        As :func:`estimate_offset`.
    """
    known = model.design
    model = with_design(model, design)
    offsets, found = known_offsets(model).clone(), []
    for number, one in enumerate(design.categorical):
        columns = design.columns_of(number)
        n_known = known.n_levels[number]
        for level in range(n_known, len(one.levels)):
            column = columns.start + level
            offset = estimate_offset(
                model,
                cells_of(number, level),
                covariance,
                kl_weight=kl_weight,
                column=column,
                known=slice(columns.start, columns.start + n_known),
            )
            offsets[:, column] = offset.value
            found.append((one, one.levels[level], offset))
    return with_offsets(model, offsets).eval(), found


def estimate_offset(
    model: VAE,
    cells: Iterable[Batch],
    covariance: str,
    *,
    kl_weight: float = 1.0,
    column: int | None = None,
    known: slice = slice(None),
) -> Offset:
    """The offset of a level from its cells, under a fitted model that stays as it is.

    Parameters
    ----------
    model
        In evaluation mode, its decoder with an offset for each known level.
    cells
        The new level's cells, in any order and any portions; other covariates are as their
        columns say.
    covariance
        The family of q.
    kl_weight
        β, as the model was fitted.
    column
        The level's column, whose present offset is not looked at; None for none.
    known
        The columns of the known levels of the same covariate.
    """
    climb = _Climb(model, cells, covariance, kl_weight, column, known)
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
    n_cells = climb.n_cells
    return Offset(climb.offset, first / n_cells, elbo / n_cells, n_turns, n_cells)


class _Climb:
    """The offset, every q, and the three steps that raise F over the same fixed draws."""

    def __init__(
        self,
        model: VAE,
        cells: Iterable[Batch],
        covariance: str,
        kl_weight: float,
        column: int | None,
        known: slice,
    ) -> None:
        offsets = known_offsets(model)
        levels = offsets[:, known]
        if column is not None:
            offsets = offsets.clone()
            offsets[:, column] = 0.0
        self.model = with_offsets(model, offsets).requires_grad_(False)
        none = offsets.new_zeros(1, offsets.shape[1])
        self.batches = [
            replace(b, covariates=none.expand(len(b), -1)) if b.covariates is None else b
            for b in cells
        ]
        self.n_cells = sum(map(len, self.batches))
        decoder = self.model.decoder
        first = decoder.layers[0]
        assert isinstance(first, nn.Linear)
        width = len(first.weight)
        self.blocks = [
            _Block(first.bias, first.weight.detach()[:, : model.n_latent], levels[:width])
        ]
        if decoder.linear_path:
            output = decoder.output
            of_z = output.weight.detach()[:, output.in_features - decoder.n_beside :]
            of_z = of_z[:, : model.n_latent]
            slopes = known_slopes(self.model)
            if slopes is not None:  # those of the typical cell, exact with one covariate
                typical = torch.cat(
                    [b.covariates for b in self.batches if b.covariates is not None]
                ).mean(0)
                of_z = of_z + torch.einsum("gcl,c->gl", slopes, typical)
            self.blocks.append(_Block(output.bias, of_z, levels[width:]))
        self.covariance, self.kl_weight = covariance, kl_weight
        self.n_samples = 2 * min(4, max(1, round(_ALL_DRAWS / (2 * max(1, self.n_cells)))))
        self.options = THOROUGH | {"kl_weight": kl_weight, "n_samples": self.n_samples}
        self.q = [
            refine(
                self.model, batch, initial_posteriors(self.model, batch, covariance), **self.options
            )
            for batch in self.batches
        ]

    @property
    def offset(self) -> Tensor:
        """o as :func:`known_offsets` has them, (width,) or (width + genes,)."""
        return torch.cat([block.offset for block in self.blocks]).detach()

    def log_likelihood(self, number: int) -> Tensor:
        """E_q[log p] of the cells of a batch, summed."""
        q = self.q[number]
        points = normal_points(self.n_samples, q.mean)
        values = self.model.log_likelihood(self.batches[number], q.draw(points))
        return _total(values) / len(points)

    def penalty(self) -> Tensor:
        return torch.stack([block.penalty() for block in self.blocks]).sum()

    @torch.no_grad()
    def value(self) -> tuple[float, float]:
        """The cells' ELBO in nats, and F."""
        elbo = 0.0
        for number, q in enumerate(self.q):
            kl = self.kl_weight * _total(self.model.prior.kl(q))
            elbo += float(self.log_likelihood(number) - kl)
        return elbo, elbo - float(self.penalty())

    def move_posteriors(self, *, anew: bool = False) -> None:
        """Every q by local steps from where it is, or also from where new cells begin."""
        most = _ANEW if anew else _LOCAL_STEPS
        options = self.options | {"max_steps": most}
        for number, (batch, q) in enumerate(zip(self.batches, self.q, strict=True)):
            others = initial_posteriors(self.model, batch, self.covariance) if anew else []
            self.q[number] = refine(self.model, batch, [q, *others], **options)

    def move_offset(self) -> None:
        """L-BFGS on the offsets, in units of what each is known to by its curvature."""
        offsets = [block.value.requires_grad_() for block in self.blocks]
        units = [curvature.rsqrt() for curvature in self.curvatures()]
        before = [offset.detach().clone() for offset in offsets]
        moves = [torch.zeros_like(offset).detach() for offset in offsets]
        optimizer = torch.optim.LBFGS(
            moves, max_iter=_OFFSET_STEPS, max_eval=_OFFSET_STEPS + 2, line_search_fn="strong_wolfe"
        )
        values: list[float] = []

        def moved() -> None:
            with torch.no_grad():
                for offset, old, unit, move in zip(offsets, before, units, moves, strict=True):
                    offset.copy_(old + unit * move)

        @torch.enable_grad()
        def loss() -> float:
            moved()
            total = self.penalty()
            gradients = torch.autograd.grad(total, offsets)
            for number in range(len(self.batches)):
                # A batch's graph at a time.
                part = -self.log_likelihood(number)
                added = torch.autograd.grad(part, offsets)
                gradients = tuple(a + b for a, b in zip(gradients, added, strict=True))
                total = total.detach() + part.detach()
            for move, unit, gradient in zip(moves, units, gradients, strict=True):
                move.grad = unit * gradient
            values.append(float(total))
            return values[-1]

        optimizer.step(loss)
        moved()
        better = min(values) < values[0]
        for offset, old in zip(offsets, before, strict=True):
            offset.requires_grad_(False).grad = None
            if not better:
                offset.copy_(old)

    @torch.no_grad()
    def curvatures(self) -> list[Tensor]:
        """About −∂²F/∂o² of each unit by itself, (units,) a block, with every q at its mean.

        Of the last layer's the Fisher weights; of the first layer's one number for all units, from
        the curvature in z, which moves them by W z.
        """
        decoder = self.model.decoder
        found = [torch.full_like(b.value, float(1 / b.variance)) for b in self.blocks]
        for batch, q in zip(self.batches, self.q, strict=True):
            if len(decoder.layers) == 1 or decoder.linear_path:
                eta = decoder(q.mean, batch.covariates)
                size = self.model.size_factor(batch, eta)
                likelihood = self.model.likelihood_of(batch.covariates)
                fisher, _ = likelihood.fisher(batch.x, eta, size, batch.observed)
                found[-1] += fisher.sum(0)
            if len(decoder.layers) > 1:
                of_z = self.model.curvature(batch, q.mean).diagonal(dim1=1, dim2=2).sum()
                found[0] += of_z / self.blocks[0].loading.square().sum()
        return found

    @torch.no_grad()
    def move_together(self) -> None:
        """All means by c, the offsets by −W c."""
        total = torch.stack([q.mean.sum(0) for q in self.q]).sum(0)
        pull = -self.kl_weight * total
        matrix = self.kl_weight * self.n_cells * torch.eye(len(total)).to(total)
        for block in self.blocks:
            pull += block.loading.T @ block.deviation / block.variance
            matrix += block.loading.T @ block.loading / block.variance
        c = torch.linalg.solve(matrix, pull)
        before, old = self._cost(), self.q
        self.q = [q.moved(c) for q in old]
        for block in self.blocks:
            block.value.sub_(block.loading @ c)
        if self._cost() > before:  # under another prior than N(0, I) c need not be the best
            self.q = old
            for block in self.blocks:
                block.value.add_(block.loading @ c)

    def _cost(self) -> float:
        """KL and penalty, which move_together lowers."""
        kl = torch.stack([_total(self.model.prior.kl(q)) for q in self.q]).sum()
        return float(self.kl_weight * kl + self.penalty())


class _Block:
    """An offset that is part of an intercept, what z adds to the same units, and its prior.

    Parameters
    ----------
    intercept
        The parameter, (units,), without the offset; with its mean afterwards.
    loading
        (units, latent).
    known
        The known levels' offsets, (units, levels).
    """

    def __init__(self, intercept: Tensor, loading: Tensor, known: Tensor) -> None:
        self.before, mean = intercept.detach().clone(), known.mean(1)
        self.value, self.loading = intercept.add_(mean), loading
        self.centre = self.value.detach().clone()
        # Of a single level nothing is known of the spread: then as far as z moves the units.
        spread = known.var(1) if known.shape[1] > 1 else loading.square().sum(1)
        self.variance = spread.mean().clamp_min(1e-12)

    @property
    def offset(self) -> Tensor:
        return self.value - self.before

    @property
    def deviation(self) -> Tensor:
        return self.value - self.centre

    def penalty(self) -> Tensor:
        return 0.5 * _total(self.deviation.square() / self.variance)


def _total(values: Tensor) -> Tensor:
    """The sum in float64, on the host: some devices have none."""
    return values.cpu().double().sum()
