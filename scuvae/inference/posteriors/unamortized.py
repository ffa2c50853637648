"""A row of parameters for every cell, and the steps that move it."""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from scuvae.batches import Batch
from scuvae.distributions.gaussian import Gaussian
from scuvae.distributions.precision import expected_precision, gaussian_at, move_rows
from scuvae.inference.posteriors.base import Posterior
from scuvae.inference.posteriors.row_optimizers import ROW_OPTIMIZERS
from scuvae.model import VAE


class UnamortizedPosterior(Posterior):
    """A row of parameters for every cell, moved by local steps of its own.

    Parameters
    ----------
    mean, raw
        The table: means, (cells, latent), and scale parameters as in
        :meth:`scuvae.distributions.gaussian.Gaussian.of`.
    local_step
        ``"natural"`` or ``"gradient"``.
    optimizer, learning_rate
        For gradient steps: a name from ``ROW_OPTIMIZERS``.
    """

    has_rows = True

    def __init__(
        self,
        mean: Tensor,
        raw: Tensor,
        *,
        local_step: str = "natural",
        optimizer: str = "adam",
        learning_rate: float = 1e-3,
    ) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("raw", raw)
        self.mean: Tensor
        self.raw: Tensor
        self.rule = _LOCAL_RULES[local_step](self, optimizer, learning_rate)
        self._last: tuple[Tensor, Tensor, Gaussian] | None = None

    def rows(self) -> "UnamortizedPosterior":
        return self

    def visit(self, on_host: Tensor) -> str | None:
        return self.rule.visit(on_host)

    def forward(self, model: VAE, batch: Batch, kl_weight: float = 1.0) -> Gaussian:
        mean = self.mean.index_select(0, batch.index)
        raw = self.raw.index_select(0, batch.index)
        if torch.is_grad_enabled() and self.rule.through_q:
            mean.requires_grad_()
            raw.requires_grad_()
        q = Gaussian.of(mean, raw)
        if torch.is_grad_enabled():
            self._last = mean, raw, q
        return q

    def step(
        self,
        model: VAE,
        batch: Batch,
        slope: Tensor,
        *,
        scale: float,
        kl_weight: float,
        rate: float | Tensor = 1.0,
    ) -> None:
        if self._last is None:
            raise RuntimeError("step() follows a call of the posterior and a backward pass")
        mean, raw, q = self._last
        self._last = None
        gradients = [mean.grad, raw.grad] if self.rule.through_q else [slope]
        if any(gradient is None for gradient in gradients):
            raise RuntimeError("step() follows a backward pass through the posterior's q")
        with torch.no_grad():
            known = [gradient for gradient in gradients if gradient is not None]
            self.rule.step(self, model, batch, q, known, scale, kl_weight, rate)

    def store(self, rows: Tensor, q: Gaussian) -> None:
        """Put ``q`` into the table's rows."""
        with torch.no_grad():
            self.mean[rows] = q.mean
            self.raw[rows] = q.raw


class _LocalRule(Protocol):
    """How the rows of a batch move, given their q and gradients of ``scale`` times their loss."""

    through_q: bool
    """Whether it takes the gradients in mean and scale parameters, which cost a step much, or
    that of the reconstruction in the draws alone."""

    def visit(self, on_host: Tensor) -> str | None: ...

    def step(
        self,
        table: "UnamortizedPosterior",
        model: VAE,
        batch: Batch,
        q: Gaussian,
        gradients: list[Tensor],
        scale: float,
        kl_weight: float,
        rate: float | Tensor,
    ) -> None: ...


class _GradientRule:
    """Gradient steps by a row optimiser, as in the plain algorithm."""

    through_q = True

    # Row optimisers move their rows as the networks' optimiser moves weights, by the same schedule.
    def __init__(self, table: UnamortizedPosterior, optimizer: str, learning_rate: float) -> None:
        make = ROW_OPTIMIZERS[optimizer]
        self.optimizers = make(table.mean, learning_rate), make(table.raw, learning_rate)

    def visit(self, on_host: Tensor) -> str | None:
        return "gradient"

    def step(
        self,
        table: UnamortizedPosterior,
        model: VAE,
        batch: Batch,
        q: Gaussian,
        gradients: list[Tensor],
        scale: float,
        kl_weight: float,
        rate: float | Tensor,
    ) -> None:
        for moved, own, gradient in zip(
            (table.mean, table.raw), self.optimizers, gradients, strict=True
        ):
            own.step(moved, batch.index, gradient / scale, rate)


class _NaturalRule:
    """The gradient of the mean, preconditioned by the stored covariance.

    That gradient is the draws' own and the prior's. The precision is
    renewed at a cell's first visit, at its ninth, and after every 16 from then on: a renewal costs
    as much as all else in a step and a third, and renewing more often fits counts no better. More
    rarely does as well there, but ends below the optimum of a linear decoder. Nor is it better to
    renew from more genes than 256, drawn anew each time: the precision is off by some 5 % then.
    Short steps let a cell's mean average over the decoders that dropout draws, shorter ones the
    more these differ; with longer ones held-out cells lose nats.
    """

    through_q = False
    early, period = 8, 16
    n_genes = 256
    rate = 0.1
    longest = 2.0

    def __init__(self, table: UnamortizedPosterior, optimizer: str, learning_rate: float) -> None:
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
        table: UnamortizedPosterior,
        model: VAE,
        batch: Batch,
        q: Gaussian,
        gradients: list[Tensor],
        scale: float,
        kl_weight: float,
        rate: float | Tensor,
    ) -> None:
        rows, mean, due = batch.index, q.mean, self.due
        if due is None:
            raise RuntimeError("step() follows visit()")
        if due.all():
            q = self._renew(table, model, batch, mean, kl_weight)
        elif due.any():
            some = torch.from_numpy(due.nonzero()[0]).to(rows.device)
            self._renew(table, model, batch.take(some), mean[some], kl_weight)
            q = Gaussian.of(mean, table.raw[rows])
        (of_draws,) = gradients
        if of_draws.dim() > 2:
            of_draws = of_draws.sum(0)
        kept = 1 - model.decoder.dropout
        slope = of_draws * (-1 / (scale * kl_weight)) + model.prior.slope(q)
        move_rows(
            *(table.mean, rows, q, slope),
            rate=self.rate * kept**3,
            longest=self.longest,
            by=rate,
        )

    def _renew(
        self,
        table: UnamortizedPosterior,
        model: VAE,
        batch: Batch,
        mean: Tensor,
        kl_weight: float,
    ) -> Gaussian:
        """Put each cell's precision at its present mean into the table."""
        training = model.training
        model.eval()  # the precision is that of the decoder without dropout
        curvature = model.curvature(batch, mean, self.n_genes)
        model.train(training)
        before = Gaussian.of(mean, table.raw[batch.index])
        target = expected_precision(curvature, model.prior.precision(before), kl_weight)
        q = gaussian_at(mean, target, full=before.full)
        table.raw[batch.index] = q.raw
        return q


_LOCAL_RULES: dict[str, Callable[[UnamortizedPosterior, str, float], _LocalRule]] = {
    "natural": _NaturalRule,
    "gradient": _GradientRule,
}
