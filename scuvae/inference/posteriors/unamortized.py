"""A row of parameters for every cell, and the steps that move it."""

from typing import Any

import torch
from torch import Tensor

from scuvae.batches import Batch
from scuvae.distributions.gaussian import Gaussian
from scuvae.inference.posteriors.base import Posterior
from scuvae.model import VAE


class UnamortizedPosterior(Posterior):
    """A row of parameters for every cell, moved by local steps of its own.

    Parameters
    ----------
    mean, raw
        The table: means, (cells, latent), and scale parameters as in
        :meth:`scuvae.distributions.gaussian.Gaussian.of`.
    local_step
        A name from ``LOCAL_STEPS``.
    optimizer, learning_rate
        Those of the fit, which some steps heed.
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
        # Here, since refinement asks this folder for the ELBO.
        from scuvae.inference.refinement.refine import LOCAL_STEPS

        self.local_step = LOCAL_STEPS[local_step](self, optimizer, learning_rate)
        self._last: tuple[Tensor, Tensor, Gaussian] | None = None

    def rows(self) -> "UnamortizedPosterior":
        return self

    def visit(self, on_host: Tensor) -> str | None:
        return self.local_step.visit(on_host)

    def forward(self, model: VAE, batch: Batch, kl_weight: float = 1.0) -> Gaussian:
        mean = self.mean.index_select(0, batch.index)
        raw = self.raw.index_select(0, batch.index)
        if torch.is_grad_enabled() and self.local_step.through_q:
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
        gradients = [mean.grad, raw.grad] if self.local_step.through_q else [slope]
        if any(gradient is None for gradient in gradients):
            raise RuntimeError("step() follows a backward pass through the posterior's q")
        with torch.no_grad():
            known = [gradient for gradient in gradients if gradient is not None]
            self.local_step.step(
                model, batch, q, known, scale=scale, kl_weight=kl_weight, rate=rate
            )

    def store(self, rows: Tensor, q: Gaussian) -> None:
        """Put ``q`` into the table's rows."""
        with torch.no_grad():
            self.mean[rows] = q.mean
            self.raw[rows] = q.raw

    def training_state(self) -> dict[str, Any]:
        return self.local_step.state_dict()

    def load_training_state(self, state: dict[str, Any]) -> None:
        self.local_step.load_state_dict(state)
