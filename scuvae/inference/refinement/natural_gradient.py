"""Local steps: q of each cell of a batch towards its optimum, the decoder frozen.

Every cell is treated on its own: the draws are the same fixed points for all of them, so that a
cell's posterior depends neither on the cells beside it nor on their order.
"""

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from scuvae.batches import Batch
from scuvae.distributions.gaussian import Gaussian
from scuvae.distributions.precision import (
    diagonal_tril,
    expected_precision,
    gaussian_at,
    move_rows,
    scale_tril,
)
from scuvae.distributions.quasi_random import normal_points
from scuvae.inference.posteriors.objectives import elbo, tempered
from scuvae.inference.refinement.gauss_newton import Ascent, climb
from scuvae.inference.refinement.local_step import LocalStep, Table
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
    q_now = Gaussian(mean, tril)
    found = model.log_likelihood_and_slope(batch, q_now.draw(points))
    cells = Ascent(batch, *tempered(model.prior, q_now, *found, kl_weight))
    best = cells.value.clone()

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
        new = Gaussian(new_mean, new_tril)
        found = model.log_likelihood_and_slope(cells.batch, new.draw(points))
        better, gain = cells.settle(*tempered(model.prior, new, *found, kl_weight))
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


class NaturalGradient(LocalStep):
    """The gradient of the mean, preconditioned by the stored covariance.

    That gradient is the draws' own and the prior's. A row's precision is renewed at a cell's first
    visit, at its ninth, and after every 16 from then on: a renewal costs as much as all else in a
    step and a third, and renewing more often fits counts no better. More rarely does as well there,
    but ends below the optimum of a linear decoder. Nor is it better to renew from more genes than
    256, drawn anew each time: the precision is off by some 5 % then. Short steps let a cell's mean
    average over the decoders that dropout draws, shorter ones the more these differ; with longer
    ones held-out cells lose nats.
    """

    covariance = "full"
    measured = True
    held_out = (8, 1)
    options: ClassVar[dict[str, Any]] = {"max_steps": 20}  # a cell takes as many as it needs
    thorough: ClassVar[dict[str, Any]] = {"max_steps": 30, "n_samples": 8, "tolerance": 0.01}
    # More would settle cells in their precision's own optimum, at times out of the reach of the
    # best q, and cost more.
    before_polish: ClassVar[dict[str, Any]] = {"max_steps": 5, "tolerance": 1.0}
    refine = staticmethod(refine_natural)

    early, period = 8, 16
    n_genes = 256
    rate = 0.1
    longest = 2.0

    def __init__(self, table: Table, optimizer: str, learning_rate: float) -> None:
        super().__init__(table, optimizer, learning_rate)
        # On the host, so that no device is asked which cells are due.
        self.visits = np.zeros(len(table.mean), np.int32)
        self.due: np.ndarray | None = None

    def visit(self, on_host: Tensor) -> str | None:
        rows = on_host.numpy()
        visits = self.visits[rows]
        self.visits[rows] = visits + 1
        self.due = due = (visits % self.period == 0) | (visits == self.early)
        if due.all():
            return "renewal"
        return None if due.any() else "natural"

    def step(
        self,
        model: VAE,
        batch: Batch,
        q: Gaussian,
        gradients: list[Tensor],
        *,
        scale: float,
        kl_weight: float,
        rate: float | Tensor,
    ) -> None:
        rows, mean, due = batch.index, q.mean, self.due
        if due is None:
            raise RuntimeError("step() follows visit()")
        if due.all():
            q = self._renew(model, batch, mean, kl_weight)
        elif due.any():
            some = torch.from_numpy(due.nonzero()[0]).to(rows.device)
            self._renew(model, batch.take(some), mean[some], kl_weight)
            q = Gaussian.of(mean, self.table.raw[rows])
        (of_draws,) = gradients
        if of_draws.dim() > 2:
            of_draws = of_draws.sum(0)
        kept = 1 - model.decoder.dropout
        slope = of_draws * (-1 / (scale * kl_weight)) + model.prior.slope(q)
        move_rows(
            *(self.table.mean, rows, q, slope),
            rate=self.rate * kept**3,
            longest=self.longest,
            by=rate,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"visits": torch.from_numpy(self.visits)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.visits[:] = state["visits"].numpy()

    def _renew(self, model: VAE, batch: Batch, mean: Tensor, kl_weight: float) -> Gaussian:
        """Put each cell's precision at its present mean into the table."""
        training = model.training
        model.eval()  # the precision is that of the decoder without dropout
        curvature = model.curvature(batch, mean, self.n_genes)
        model.train(training)
        before = Gaussian.of(mean, self.table.raw[batch.index])
        target = expected_precision(curvature, model.prior.precision(before), kl_weight)
        q = gaussian_at(mean, target, full=before.full)
        self.table.raw[batch.index] = q.raw
        return q
