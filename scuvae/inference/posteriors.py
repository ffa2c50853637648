"""q(z) for the cells of a batch: from an encoder, from a row of a table, or from both.

A posterior is called with the model and a batch and hands out q; after the backward pass it may
take a local step. Gradients of the loss reach an encoder through autograd, and a table's rows
through the leaves that the call made.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from scuvae.inference import natural
from scuvae.inference.drawn import simulated
from scuvae.inference.objectives import elbo
from scuvae.inference.rows import ROW_OPTIMIZERS
from scuvae.inference.thinning import with_shallow
from scuvae.model import VAE, Batch, gaussian, raw_scale
from scuvae.model.batch import sparse
from scuvae.model.vae import frozen


class Posterior(nn.Module, ABC):
    """Hands out q for a batch of cells."""

    @abstractmethod
    def forward(self, model: VAE, batch: Batch, kl_weight: float = 1.0) -> Distribution:
        """q for the cells of the batch; ``kl_weight`` is that of the fit."""

    def visit(self, on_host: Tensor) -> str | None:
        """Note that these rows, given on the host, are visited next: before each training step.

        Returned is the kind of step that it will be. Steps of a kind, on as many cells, do the same
        with other numbers; None where what is done depends on numbers.
        """
        return None

    def seen(self, model: VAE, batch: Batch) -> Batch:
        """What a training step is taken on: the batch's cells, and perhaps others behind them.

        Losses are those of the batch's cells; the others count in gradients alone.
        """
        return batch

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
        """A local step after the backward pass.

        ``slope`` is the gradient of the reconstruction's loss in the draws of the last q, ``scale``
        what the loss of a cell weighs, ``rate`` the schedule's factor on step sizes.
        """

    def descend(
        self, model: VAE, batch: Batch, *, weight: float, kl_weight: float
    ) -> Tensor | None:
        """The backward pass of ``weight`` times what is minimised beside the loss of the last q.

        Returned is that, summed over the batch, or None where there is nothing.
        """
        return None


class AmortizedPosterior(Posterior):
    """The encoder's q; it has no parameters of its own.

    Where values are counts it learns from thinned cells too: an encoder that has seen one depth
    only knows no other.
    """

    def visit(self, on_host: Tensor) -> str | None:
        return "encoder"

    def seen(self, model: VAE, batch: Batch) -> Batch:
        return with_shallow(batch) if model.likelihood.counts else batch

    def forward(self, model: VAE, batch: Batch, kl_weight: float = 1.0) -> Distribution:
        return model.encode(batch)


class UnamortizedPosterior(Posterior):
    """A row of parameters for every cell, moved by local steps of its own.

    Parameters
    ----------
    mean, raw
        The table: means, (cells, latent), and scale parameters as in
        :func:`scuvae.model.gaussian`.
    local_step
        ``"natural"`` or ``"gradient"``.
    optimizer, learning_rate
        For gradient steps: a name from ``ROW_OPTIMIZERS``.
    """

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
        self._last: tuple[Tensor, Tensor, Distribution] | None = None

    def visit(self, on_host: Tensor) -> str | None:
        return self.rule.visit(on_host)

    def forward(self, model: VAE, batch: Batch, kl_weight: float = 1.0) -> Distribution:
        mean = self.mean.index_select(0, batch.index)
        raw = self.raw.index_select(0, batch.index)
        if torch.is_grad_enabled() and self.rule.through_q:
            mean.requires_grad_()
            raw.requires_grad_()
        q = gaussian(mean, raw)
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

    def store(self, rows: Tensor, q: Distribution) -> None:
        """Put ``q`` into the table's rows."""
        with torch.no_grad():
            self.mean[rows] = q.mean
            self.raw[rows] = raw_scale(q)


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
        q: Distribution,
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
        q: Distribution,
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

    That gradient is the draws' own, less the mean, which is the prior's part. The precision is
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
        q: Distribution,
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
            q = gaussian(mean, table.raw[rows])
        (of_draws,) = gradients
        if of_draws.dim() > 2:
            of_draws = of_draws.sum(0)
        kept = 1 - model.decoder.dropout
        weight = -1 / (scale * kl_weight)
        natural.move(
            *(table.mean, rows, q, of_draws),
            factor=weight,
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
    ) -> Distribution:
        """Put each cell's precision at its present mean into the table."""
        training = model.training
        model.eval()  # the precision is that of the decoder without dropout
        target = natural.precision(model.curvature(batch, mean, self.n_genes), kl_weight)
        model.train(training)
        full = table.raw.shape[-1] != mean.shape[-1]
        q = natural.posterior(mean, target, full=full)
        table.raw[batch.index] = raw_scale(q)
        return q


_LOCAL_RULES: dict[str, Callable[[UnamortizedPosterior, str, float], _LocalRule]] = {
    "natural": _NaturalRule,
    "gradient": _GradientRule,
}


class SemiAmortizedPosterior(Posterior):
    """A row for every cell, under which the decoder is fitted, and an encoder that follows.

    The rows move as those of an :class:`UnamortizedPosterior` and never ask the encoder, so that
    nothing can go round in circles: steps that started from the encoder and taught it where they
    led were measured to diverge. The encoder maximises the ELBO of its own q under the decoder as
    it is, which gets no gradient from it, on cells drawn from the decoder at their rows and on
    some of the batch's own, of both on thinned ones too. Measured beside an amortized fit's it was
    better on one data set and worse on another (tests/benchmarks/TRIED.md). Draws of counts cost as
    much as the rest of a step, so that the same drawn cells serve some steps.

    Parameters
    ----------
    mean, raw, local_step, optimizer, learning_rate
        Those of the table.
    """

    draw_every = 8
    # One of so many cells that the encoder learns from is the batch's own.
    own_one_of = 4

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
        self.table = UnamortizedPosterior(
            mean, raw, local_step=local_step, optimizer=optimizer, learning_rate=learning_rate
        )
        self._drawn: Batch | None = None
        self._age = 0

    def visit(self, on_host: Tensor) -> str | None:
        self.table.visit(on_host)
        return None  # the steps that draw cells are others than those that do not

    def forward(self, model: VAE, batch: Batch, kl_weight: float = 1.0) -> Distribution:
        q: Distribution = self.table(model, batch, kl_weight)
        return q

    def step(self, model: VAE, batch: Batch, slope: Tensor, **options: Any) -> None:
        self.table.step(model, batch, slope, **options)

    def descend(
        self, model: VAE, batch: Batch, *, weight: float, kl_weight: float
    ) -> Tensor | None:
        decoder, training = model.decoder, model.decoder.training
        decoder.eval()  # the encoder serves the decoder without dropout
        seen = self._cells(model, batch)
        with frozen(decoder), frozen(model.likelihood):
            terms = elbo(model, seen, model.encode(seen))
            loss = kl_weight * terms.kl - terms.reconstruction
            (weight * loss.sum()).backward()
        decoder.train(training)
        return loss.detach().mean() * len(batch)

    @torch.no_grad()
    def _cells(self, model: VAE, batch: Batch) -> Batch:
        """What the encoder learns from in this step: drawn cells, own ones, thinned ones."""
        counts = model.likelihood.counts
        old = self._drawn
        if old is None or (self._age >= self.draw_every and len(batch) >= len(old)):
            drawn = simulated(model, batch, self.table(model, batch))
            if counts:
                x = sparse(drawn.x)
                # A size factor that is the cell's total is that of the drawn cell, too.
                totals = batch.size_factor == sparse(batch.x).sum()
                size_factor = torch.where(totals, x.sum().clamp_min(1), batch.size_factor)
                drawn = replace(drawn, x=x, size_factor=size_factor)
            old, self._age = drawn, 0
        self._drawn, self._age = old, self._age + 1
        n_own = len(batch) // self.own_one_of
        some = torch.randperm(len(old))[: len(batch) - n_own].to(batch.index.device)
        seen = old.take(some)
        if n_own:
            seen = seen.followed_by(batch.take(torch.arange(n_own, device=batch.index.device)))
        return with_shallow(seen) if counts else seen

    def store(self, rows: Tensor, q: Distribution) -> None:
        """Put ``q`` into the table's rows."""
        self.table.store(rows, q)


POSTERIORS: dict[str, type[Posterior]] = {
    "amortized": AmortizedPosterior,
    "unamortized": UnamortizedPosterior,
    "semi": SemiAmortizedPosterior,
}
