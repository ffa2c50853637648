"""q(z) for the cells of a batch: from an encoder, from a row of a table, or from both.

A posterior is called with the model and a batch and hands out q; after the backward pass it may
take a local step. Gradients of the loss reach an encoder through autograd, and a table's rows
through the leaves that the call made.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, MultivariateNormal

from scuvae.inference import natural
from scuvae.inference.local_steps import LOCAL_STEPS
from scuvae.inference.objectives import elbo
from scuvae.inference.rows import ROW_OPTIMIZERS
from scuvae.model import VAE, Batch, gaussian, raw_scale


class Posterior(nn.Module, ABC):
    """Hands out q for a batch of cells."""

    @abstractmethod
    def forward(self, model: VAE, batch: Batch, kl_weight: float = 1.0) -> Distribution:
        """q for the cells of the batch; ``kl_weight`` is that of the fit."""

    def step(
        self, model: VAE, batch: Batch, *, scale: float, kl_weight: float, rate: float = 1.0
    ) -> None:
        """A local step after the backward pass.

        ``scale`` is what the loss of a cell weighs, ``rate`` the schedule's factor on step sizes.
        """

    def extra_loss(self, model: VAE, batch: Batch, kl_weight: float) -> Tensor | None:
        """What is minimised beside the loss of the last q, summed over the batch, or None."""
        return None


class AmortizedPosterior(Posterior):
    """The encoder's q; it has no parameters of its own."""

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

    def forward(self, model: VAE, batch: Batch, kl_weight: float = 1.0) -> Distribution:
        mean = self.mean.index_select(0, batch.index)
        raw = self.raw.index_select(0, batch.index)
        if torch.is_grad_enabled():
            mean.requires_grad_()
            raw.requires_grad_(self.rule.moves_scale)
        q = gaussian(mean, raw)
        if torch.is_grad_enabled():
            self._last = mean, raw, q
        return q

    def step(
        self, model: VAE, batch: Batch, *, scale: float, kl_weight: float, rate: float = 1.0
    ) -> None:
        if self._last is None:
            raise RuntimeError("step() follows a call of the posterior and a backward pass")
        mean, raw, q = self._last
        self._last = None
        if mean.grad is None or (raw.grad is None and raw.requires_grad):
            raise RuntimeError("step() follows a backward pass through the posterior's q")
        raw_grad = None if raw.grad is None else raw.grad / scale
        with torch.no_grad():
            self.rule.step(self, model, batch, q, mean.grad / scale, raw_grad, kl_weight, rate)

    def store(self, rows: Tensor, q: Distribution) -> None:
        """Put ``q`` into the table's rows."""
        with torch.no_grad():
            self.mean[rows] = q.mean
            self.raw[rows] = raw_scale(q)


class _LocalRule(Protocol):
    """How the rows of a batch move, given their q and the gradients of their own loss."""

    moves_scale: bool
    """Whether it asks for the gradient of the scale parameters, which costs a step much."""

    def step(
        self,
        table: "UnamortizedPosterior",
        model: VAE,
        batch: Batch,
        q: Distribution,
        mean_grad: Tensor,
        raw_grad: Tensor | None,
        kl_weight: float,
        rate: float,
    ) -> None: ...


class _GradientRule:
    """Gradient steps by a row optimiser, as in the plain algorithm."""

    moves_scale = True

    # Row optimisers move their rows as the networks' optimiser moves weights, by the same schedule.
    def __init__(self, table: UnamortizedPosterior, optimizer: str, learning_rate: float) -> None:
        make = ROW_OPTIMIZERS[optimizer]
        self.optimizers = make(table.mean, learning_rate), make(table.raw, learning_rate)

    def step(
        self,
        table: UnamortizedPosterior,
        model: VAE,
        batch: Batch,
        q: Distribution,
        mean_grad: Tensor,
        raw_grad: Tensor | None,
        kl_weight: float,
        rate: float,
    ) -> None:
        assert raw_grad is not None
        self.optimizers[0].step(table.mean, batch.index, mean_grad, rate)
        self.optimizers[1].step(table.raw, batch.index, raw_grad, rate)


class _NaturalRule:
    """The backward pass's gradient of the mean, preconditioned by the stored covariance.

    The precision is renewed at a cell's first visit, at its ninth, and after every 16 from then on:
    a renewal costs as much as all else in two steps, and renewing more often fits no better. More
    rarely does on counts, but ends below the optimum of a linear decoder. Short steps let a cell's
    mean average over the decoders that dropout draws, shorter ones the more these differ; with
    longer ones held-out cells lose nats.
    """

    moves_scale = False
    early, period = 8, 16
    rate = 0.1
    longest = 2.0

    def __init__(self, table: UnamortizedPosterior, optimizer: str, learning_rate: float) -> None:
        # On the host, so that no device is asked which cells are due.
        self.visits = torch.zeros(len(table.mean), dtype=torch.int32)

    def step(
        self,
        table: UnamortizedPosterior,
        model: VAE,
        batch: Batch,
        q: Distribution,
        mean_grad: Tensor,
        raw_grad: Tensor | None,
        kl_weight: float,
        rate: float,
    ) -> None:
        rows = batch.index
        on_host = batch.host_index
        visits = self.visits[on_host]
        self.visits[on_host] = visits + 1
        due = (visits % self.period == 0) | (visits == self.early)
        mean = q.mean.detach()
        if due.all():
            q = self._renew(table, model, batch, mean, kl_weight)
        elif due.any():
            some = due.nonzero().squeeze(-1).to(rows.device)
            self._renew(table, model, batch.take(some), mean[some], kl_weight)
            q = gaussian(mean, table.raw[rows])
        gradient = mean_grad / -kl_weight
        if isinstance(q, MultivariateNormal):
            tril = q.scale_tril.detach()
            direction = (tril @ (tril.mT @ gradient.unsqueeze(-1))).squeeze(-1)
        else:
            direction = q.variance.detach() * gradient
        kept = 1 - model.decoder.dropout
        step = natural.cap_length(self.rate * kept**3 * direction, self.longest)
        table.mean.index_copy_(0, rows, torch.add(mean, step, alpha=rate))

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
        target = natural.precision(model.curvature(batch, mean), kl_weight)
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
    """The encoder's q, improved by local steps with the decoder frozen.

    The improved q is what the decoder is fitted under; the encoder learns from the ELBO of its
    own q, which the decoder is fitted under as well. Teaching the encoder the improved q instead,
    by their KL, was measured to diverge: both then follow steps from wherever the encoder is.
    """

    def __init__(self, *, local_step: str = "natural", n_steps: int = 1) -> None:
        super().__init__()
        self.local_step = local_step
        self.n_steps = n_steps
        self._encoded: Distribution | None = None

    def forward(self, model: VAE, batch: Batch, kl_weight: float = 1.0) -> Distribution:
        encoded = model.encode(batch)
        self._encoded = encoded
        training = model.training
        model.eval()
        q = LOCAL_STEPS[self.local_step](
            model, batch, encoded, max_steps=self.n_steps, kl_weight=kl_weight
        )
        model.train(training)
        return q

    def extra_loss(self, model: VAE, batch: Batch, kl_weight: float) -> Tensor | None:
        encoded, self._encoded = self._encoded, None
        if encoded is None:
            raise RuntimeError("extra_loss() follows a call of the posterior")
        own = elbo(model, batch, encoded)
        return (kl_weight * own.kl - own.reconstruction).sum()


POSTERIORS: dict[str, type[Posterior]] = {
    "amortized": AmortizedPosterior,
    "unamortized": UnamortizedPosterior,
    "semi": SemiAmortizedPosterior,
}
